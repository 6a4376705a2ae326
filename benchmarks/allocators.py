"""What the C library's allocator changes: a copy, torch's and our LayerNorm of large tensors, each result fresh memory.

    python3 -m benchmarks.allocators --report DIR

Each allocator is measured in a process of its own: the C library's as it is, and with freed memory kept, as
`python3 -m benchmarks.run` keeps it; jemalloc in both ways too, where its library is found. Medians of microseconds,
and page faults of our call. Writes allocators.json and allocators.md.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

import fusednorm
from benchmarks.measure.machine import environment
from benchmarks.report.files import write_pair
from benchmarks.report.table import table

CASES = ((torch.float32, 4096, 1024), (torch.float32, 4096, 4096), (torch.bfloat16, 8192, 4096))
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62), "MALLOC_TOP_PAD_": str(64 << 20)}
KEPT_BY_JEMALLOC = {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}


def allocators() -> dict[str, dict[str, str]]:
    """Environment variables by name."""
    found = {"the C library's": {}, "the C library's, memory kept": KEPT}
    jemalloc = ctypes.util.find_library("jemalloc")
    if jemalloc is not None:
        preload = {"LD_PRELOAD": jemalloc}
        found |= {"jemalloc": preload, "jemalloc, memory kept": preload | KEPT_BY_JEMALLOC}
    return found


def measured(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """(median of microseconds, page faults a call)."""
    for _ in range(5):
        call()
    times = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
        del result
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return 1e6 * statistics.median(times), faults / rounds


@torch.no_grad()
def here(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for dtype, n, columns in CASES:
        x = torch.randn(n, columns).to(dtype)
        weight, bias = torch.ones(columns, dtype=dtype), torch.zeros(columns, dtype=dtype)
        target = torch.empty_like(x)
        calls = {
            "copy": lambda target=target, x=x: target.copy_(x),
            "clone": x.clone,
            "eager": lambda x=x, w=weight, b=bias: F.layer_norm(x, w.shape, w, b),
            "ours": lambda x=x, w=weight, b=bias: fusednorm.layer_norm(x, w.shape, w, b),
        }
        found = {name: measured(call, rounds) for name, call in calls.items()}
        row: dict[str, Any] = {"case": f"{n} x {columns}, {str(dtype).removeprefix('torch.')}", "mib": x.nbytes >> 20}
        rows.append(row | {name: us for name, (us, _) in found.items()} | {"faults": found["ours"][1]})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="folder for allocators.json and allocators.md")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(here(args.rounds)))
        return 0
    found: dict[str, Any] = {}
    for name, variables in tqdm(allocators().items(), "allocators", disable=None):
        command = [sys.executable, "-m", "benchmarks.allocators", "--here", "--rounds", str(args.rounds)]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    rows = [
        (row["case"], name, *(f"{row[k]:,.0f}" for k in ("copy", "clone", "eager", "ours", "faults")))
        for i in range(len(CASES))
        for name, row in ((name, rows[i]) for name, rows in found.items())
    ]
    machine = environment(torch.device("cpu"))
    columns = ("x", "allocator", "copy, us", "clone, us", "eager, us", "ours, us", "page faults")
    text = "\n".join(
        [
            "# Allocators",
            "",
            "Written by `python3 -m benchmarks.allocators`: do not edit. Plain `layer_norm` without gradients,",
            "medians. The copy writes to memory that is there, all others to fresh memory. Page faults are ours.",
            "",
            f"Machine: {machine['cpu']}, {torch.get_num_threads()} threads.",
            "",
            table(columns, rows, texts=2),
            "",
        ]
    )
    write_pair(args.report, "allocators", {"environment": machine, "allocators": found}, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
