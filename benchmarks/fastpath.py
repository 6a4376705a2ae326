"""What a call costs where the C++ fast path was built for another torch or Python: small calls, with it and without.

    python3 -m benchmarks.fastpath --report DIR

Processes with FUSEDNORM_FASTPATH=1 and =0 take turns, each on one thread and with freed memory kept; eager is measured
in all of them. Medians of microseconds over all processes. Writes fastpath.json and fastpath.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fusednorm
from benchmarks.allocators import KEPT
from benchmarks.measure.machine import environment
from benchmarks.report.files import write_pair
from benchmarks.report.table import table
from fusednorm.dispatch import fastpath
from fusednorm.tuning.timers import CpuTimer

COLUMNS = 768
ROWS = (4, 64, 1024)
WAYS = {"fast path": "1", "without": "0"}  # FUSEDNORM_FASTPATH

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
CALLS: dict[str, tuple[Call, Call]] = {  # of (x, residual, weight): ours and eager's
    "rms_norm": (lambda x, r, w: fusednorm.rms_norm(x, COLUMNS, w), lambda x, r, w: F.rms_norm(x, w.shape, w)),
    "add_layer_norm": (
        lambda x, r, w: fusednorm.add_layer_norm(x, r, COLUMNS, w)[0],
        lambda x, r, w: F.layer_norm(x + r, w.shape, w),
    ),
    "bias_act_dropout": (
        lambda x, r, w: fusednorm.bias_act_dropout(x, w, "gelu"),
        lambda x, r, w: F.gelu(x + w),
    ),
}


def _step(call: Call, tensors: list[Tensor], backward: bool) -> Callable[[], Any]:
    if not backward:
        return lambda: call(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    cotangent = torch.ones_like(tensors[0])
    return lambda: torch.autograd.grad(call(*leaves), leaves, cotangent, allow_unused=True)


def here(seconds: float) -> dict[str, dict[str, float]]:
    """Medians of microseconds in this process, by case."""
    reason = fastpath.load()[1]
    if bool(reason) != (os.environ.get("FUSEDNORM_FASTPATH") == "0"):
        raise SystemExit(f"the fast path is not here: {reason}")
    torch.set_num_threads(1)
    found = {}
    for name, (ours, eager) in CALLS.items():
        for rows in ROWS:
            tensors = [torch.randn(rows, COLUMNS), torch.randn(rows, COLUMNS), torch.ones(COLUMNS)]
            for backward in (False, True):
                calls = {"ours": _step(ours, tensors, backward), "eager": _step(eager, tensors, backward)}
                taken = CpuTimer().measure(calls, seconds)
                case = f"{name}, {rows} x {COLUMNS}, {'both' if backward else 'forward'}"
                found[case] = {way: 1e6 * median(variant["samples"]) for way, variant in taken.items()}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="folder for fastpath.json and fastpath.md")
    parser.add_argument("--turns", type=int, default=3, help="processes of each way (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each case of a process (default: %(default)s)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(here(args.seconds)))
        return 0
    found: dict[str, list[dict[str, dict[str, float]]]] = {way: [] for way in WAYS}
    for way in tqdm([*WAYS] * args.turns, "processes", disable=None):
        command = [sys.executable, "-m", "benchmarks.fastpath", "--here", "--seconds", str(args.seconds)]
        variables = os.environ | KEPT | {"FUSEDNORM_FASTPATH": WAYS[way], "FUSEDNORM_TUNED": "0"}
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
        found[way].append(json.loads(done.stdout))
    rows = []
    for case in found["without"][0]:
        ours = {way: median(turn[case]["ours"] for turn in found[way]) for way in WAYS}
        eager = median(turn[case]["eager"] for turns in found.values() for turn in turns)
        figures = (ours["fast path"], ours["without"], eager)
        rows.append((case, *(f"{us:,.1f}" for us in figures), f"{ours['without'] / ours['fast path']:.2f}"))
    machine = environment(torch.device("cpu"))
    text = "\n".join(
        [
            "# With and without the fast path",
            "",
            "Written by `python3 -m benchmarks.fastpath`: do not edit. Float32 on one thread, medians of microseconds.",
            "Without the fast path is what a torch or a Python has for which none was built.",
            "",
            f"Machine: {machine['cpu']}, torch {torch.__version__}.",
            "",
            table(("call", "fast path, us", "without, us", "eager, us", "without / fast path"), rows),
            "",
        ]
    )
    write_pair(args.report, "fastpath", {"environment": machine, "ways": found}, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
