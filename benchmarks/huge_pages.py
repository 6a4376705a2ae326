"""What a large result costs where its memory is new: page faults, and huge pages against them (CPU, Linux).

    python3 -m benchmarks.huge_pages [--report DIR] [--shape 16384x4096 ...]

`run.py` keeps freed memory in the process and so measures kernels. A program whose C library gives large tensors back
pays a page fault for every 4 KB of a fresh result instead. This measures add + LayerNorm that way: eager torch, eager
torch with its own setting THP_MEM_ALLOC_ENABLE=1 (huge pages for all it allocates), and fusednorm, which asks for them
on its large results alone. Each runs in a process of its own, because torch reads the setting once; their calls are
interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import measure
from benchmarks.report.files import make_folder
from benchmarks.report.stats import seconds_text
from benchmarks.report.table import table

SHAPES = ((1024, 3072), (4096, 4096), (16384, 4096))
VARIANTS = {
    "eager": ("eager", {}),
    "eager, THP_MEM_ALLOC_ENABLE=1": ("eager", {"THP_MEM_ALLOC_ENABLE": "1"}),
    "fusednorm": ("fused", {}),
    "fusednorm, THP_MEM_ALLOC_ENABLE=1": ("fused", {"THP_MEM_ALLOC_ENABLE": "1"}),
}


def serve(who: str, rows: int, columns: int) -> None:
    """A child: one call for each line read, its seconds and page faults written."""
    import resource
    import time

    from benchmarks.cases import OPS

    torch.manual_seed(0)
    leaves = {name: torch.randn(size) for name, size in OPS["add_layer_norm"].inputs((rows, columns)).items()}
    call = getattr(OPS["add_layer_norm"], who)(leaves)
    call()
    for _ in sys.stdin:
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        call()  # its results are freed here, and their memory given back
        taken = time.perf_counter() - start
        print(json.dumps([taken, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults]), flush=True)


def samples(rows: int, columns: int, rounds: int) -> dict[str, list[list[float]]]:
    """(seconds, page faults) of every call, by variant."""
    children = {}
    for name, (who, setting) in VARIANTS.items():
        command = [sys.executable, "-m", "benchmarks.huge_pages", "--serve", who, "--shape", f"{rows}x{columns}"]
        environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | setting
        children[name] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    found: dict[str, list[list[float]]] = {name: [] for name in children}
    try:
        for _ in range(rounds):
            for name, child in children.items():
                assert child.stdin is not None and child.stdout is not None
                child.stdin.write("\n")
                child.stdin.flush()
                line = child.stdout.readline()
                if not line:
                    raise RuntimeError(f"the process that measures {name!r} has ended")
                found[name].append(json.loads(line))
    finally:
        for child in children.values():
            child.communicate()
    return found


def rows_of(shape: tuple[int, int], found: dict[str, list[list[float]]]) -> list[list[Any]]:
    eager = [seconds for seconds, _ in found["eager"]]
    rows = []
    for name, calls in found.items():
        pairs = [theirs / seconds for theirs, (seconds, _) in zip(eager, calls)]
        low, high = measure.median_interval(pairs)
        faults = median(faults for _, faults in calls)
        times = seconds_text(median(seconds for seconds, _ in calls))
        rows.append(
            [f"{shape[0]}x{shape[1]}", name, times, f"{median(pairs):.2f} [{low:.2f}, {high:.2f}]", f"{faults:g}"]
        )
    return rows


def text(rows: list[list[Any]]) -> str:
    head = ["rows x columns", "float32 add + LayerNorm", "a call", "eager's time over it", "page faults"]
    return (
        f"Fresh outputs on {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}: the "
        f"memory of a call is given back after it\n\n{table(head, rows)}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", type=_shape, metavar="ROWSxCOLUMNS", help="default: three sizes")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="calls of each variant (default 9)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write huge_pages.md there too")
    parser.add_argument("--serve", choices=("eager", "fused"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    shapes = options.shape or SHAPES
    if not sys.platform.startswith("linux"):
        print("fresh outputs are measured on Linux alone: huge pages are asked for there", file=sys.stderr)
        return 0
    if options.serve:
        serve(options.serve, *shapes[0])
        return 0
    rows = [row for shape in shapes for row in rows_of(shape, samples(*shape, options.rounds))]
    print(text(rows))
    if options.report:
        make_folder(options.report)
        (options.report / "huge_pages.md").write_text(text(rows) + "\n", encoding="utf-8")
    return 0


def _shape(value: str) -> tuple[int, int]:
    rows, _, columns = value.partition("x")
    try:
        return int(rows), int(columns)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no ROWSxCOLUMNS") from None


if __name__ == "__main__":
    sys.exit(main())
