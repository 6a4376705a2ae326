"""Automatic choice before and after `fusednorm tune`, beside eager and each provider, over the default sweep.

    fusednorm tune --quick
    python3 -m benchmarks.tuned --report benchmarks/results            # writes tuned.json and tuned.md
    python3 -m benchmarks.tuned --without-shipped --only '^layer_norm'

All variants take turns. "lost" is what tuned automatic choice takes longer than the fastest provider; below zero it is
none. With `--without-shipped`, the crossovers that the package ships are left out, before and after. Exit status 1
where a case is slower than eager beyond the spread, or loses more than 3 % to the fastest provider beyond it.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import fusednorm
from benchmarks import measure
from benchmarks.baselines import served
from benchmarks.cases import Case, sweep
from benchmarks.measure.machine import environment
from benchmarks.report.files import write_pair
from benchmarks.report.table import table
from fusednorm.dispatch import crossovers, rules, tuned
from fusednorm.tuning.load import BackgroundLoad, warning
from fusednorm.tuning.measure import candidates, paired, served_by

MOST_LOST = 0.03


def measured(case: Case, device: torch.device, timer: Any, seconds: float) -> dict[str, Any]:
    inputs = measure.problem(case, device)
    fused = inputs.runner(case.direction, case.operation.fused)
    calls = {"eager": inputs.runner(case.direction, case.operation.eager), "tuned": fused, "untuned": fused}
    with fusednorm.recording_shapes() as shapes:
        fused()
    (of,) = shapes.classes(device) or (None,)  # attention with masks that torch does not have is of no class
    for name in candidates(of, device) if of else ():
        with contextlib.suppress(ValueError, RuntimeError), fusednorm.use_provider(name):
            fused()
            calls[name] = fused

    def around(name: str) -> contextlib.AbstractContextManager[None]:
        return served_by(of, device, name) if of is not None and name in candidates(of, device) else served(name)

    found = timer.measure(calls, seconds, around)
    times = {name: variant.get("inclusive") or variant["samples"] for name, variant in found.items()}
    best = min((name for name in times if name not in ("eager", "untuned")), key=lambda name: median(times[name]))
    return {
        **case.record(),
        "us": {name: 1e6 * median(samples) for name, samples in times.items()},
        "eager_over_tuned": paired(times["eager"], times["tuned"]),
        "untuned_over_tuned": paired(times["untuned"], times["tuned"]),
        "best": best,
        "tuned_over_best": paired(times["tuned"], times[best]),
    }


def is_slower(record: dict[str, Any]) -> bool:
    """Than eager, beyond the spread."""
    ratio, _, high = record["eager_over_tuned"]
    return bool(ratio < 1.0 and high < 1.0)


def loses(record: dict[str, Any]) -> bool:
    """More than is allowed to the fastest provider, beyond the spread."""
    ratio, low, _ = record["tuned_over_best"]
    return bool(ratio > 1.0 + MOST_LOST and low > 1.0 + MOST_LOST)


def page(result: dict[str, Any]) -> str:
    records = result["cases"]
    head = ["case", "eager, us", "before, us", "tuned, us", "eager / tuned", "interval", "fastest", "lost"]
    rows = []
    for record in records:
        us, (ratio, low, high) = record["us"], record["eager_over_tuned"]
        times = [f"{us[name]:.1f}" for name in ("eager", "untuned", "tuned")]
        lost = f"{100 * (record['tuned_over_best'][0] - 1):.1f} %"
        rows.append([record["name"], *times, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}", record["best"], lost])
    slower, losing = [r["name"] for r in records if is_slower(r)], [r["name"] for r in records if loses(r)]
    machine = result["environment"]
    return "\n".join(
        [
            "# Automatic choice before and after `fusednorm tune`",
            "",
            "Written by `python3 -m benchmarks.tuned`. Medians of samples in turns, host time included.",
            f"Machine: {machine['device']}, {torch.get_num_threads()} threads, torch {machine['torch']}. "
            + ("The shipped crossovers were left out." if result["without_shipped"] else ""),
            "",
            f"- Slower than eager beyond the spread: {', '.join(slower) or 'none'}.",
            f"- More than 3 % slower than the fastest provider, beyond the spread: {', '.join(losing) or 'none'}.",
            f"- Geometric mean of eager / tuned: {geometric(records, 'eager_over_tuned'):.3f}; of before / tuned: "
            f"{geometric(records, 'untuned_over_tuned'):.3f}.",
            "",
            table(head, rows),
            "",
        ]
    )


def geometric(records: list[dict[str, Any]], key: str) -> float:
    """The geometric mean of a ratio."""
    return float(torch.tensor([record[key][0] for record in records], dtype=torch.float64).log().mean().exp())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="folder for tuned.json and tuned.md")
    parser.add_argument("--only", default="", help="a regular expression for the names of cases")
    parser.add_argument("--level", default="default", choices=("quick", "default", "full"))
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing a case")
    parser.add_argument("--without-shipped", action="store_true", help="leave out the crossovers that are shipped")
    args = parser.parse_args(argv)
    device = measure.best_device()
    cases = [
        c for c in sweep(device.type, args.level) if c.operation.family != "layer" and re.search(args.only, c.name)
    ]
    cases = [case for case in cases if case.direction != "backward"]
    if not cases:
        parser.error(f"--only: no case is named like {args.only!r}")
    with contextlib.ExitStack() as stack:
        if args.without_shipped:
            folder, shipped = Path(stack.enter_context(tempfile.TemporaryDirectory())), crossovers.FOLDER
            stack.callback(setattr, crossovers, "FOLDER", shipped)
            crossovers.FOLDER = folder
            rules.forget()
        if tuned.file(device) is None:
            parser.error("nothing was measured on this machine: type `fusednorm tune` first")
        with measure.steady_machine(None):
            timer, load = measure.timer_for(device), BackgroundLoad()
            records = [measured(case, device, timer, args.seconds) for case in tqdm(cases, desc="cases", disable=None)]
    result = {"environment": environment(device), "without_shipped": args.without_shipped, "cases": records}
    text = page(result)
    write_pair(args.report, "tuned", result, text)
    noisy = warning(load.share())
    if noisy:
        print(noisy, file=sys.stderr)
    return 1 if any(is_slower(r) or loses(r) for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
