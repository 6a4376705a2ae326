"""What this package means to reach, beside what was measured: the table of targets, made from committed raw data.

    python3 -m benchmarks.publish.targets                              # benchmarks/results/targets.md
    python3 -m benchmarks.publish.targets --check                      # exit status 1 where it is another one
    python3 -m benchmarks.publish.targets bench-report/benchmark.json  # the table of a run, printed

`run.py --targets` measures what a GPU's targets are about; its kept result is taken before one of another sweep.

A target is missed where its worst case is, beyond the spread of the samples; a case that comes short by less is within
the spread. What no case of a run stands for was not measured, and is neither met nor missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.publish import add_result
from benchmarks.report.files import read_result, renew
from benchmarks.report.stats import LOSS, Record, believable, measured, ratio, roofline_fraction
from benchmarks.report.table import table

TABLE = add_result.RESULTS / "targets.md"
MIB = 1 << 20
PEERS = ("quack", "liger_kernel", "flash_attn")
NORMS = ("layer_norm", "rms_norm")
Figures = Callable[[Record], Iterable[tuple[float, float]]]


@dataclass(frozen=True)
class Target:
    """`figures` gives for each comparison of a case its figure, and the most that the spread allows it to be."""

    text: str
    wanted: str
    least: float
    figures: Figures
    written: Callable[[float], str] = "{:.2f}x".format
    of_all: Callable[[list[float]], float] = min  # what of the figures must reach `least`


def cases(
    *ops: str, direction: str, dtype: str = "", at_least: int = 0, below: int = 1 << 62, widths: tuple[int, ...] = ()
):
    """Whether a case is one of these operations, with an x of so many bytes and so wide rows."""

    def chosen(r: Record) -> bool:
        low, high = widths or (0, 1 << 62)
        return (
            r["op"] in ops
            and r["direction"] == direction
            and r["dtype"].startswith(dtype)
            and at_least <= r["input_bytes"] < below
            and low <= r["shape"][-1] <= high
        )

    return chosen


def speed(chosen: Callable[[Record], bool], *baselines: str, key: str = "samples") -> Figures:
    """Baseline's time over ours. What lies within the spread of 1 counts as 1."""

    def figures(r: Record) -> Iterable[tuple[float, float]]:
        for value in (ratio(r, name, key) for name in baselines if chosen(r)):
            if value is not None:
                yield value[0], max(value[2:]) / LOSS

    return figures


def roofline(chosen: Callable[[Record], bool]) -> Figures:
    return lambda r: [(roofline_fraction(r),) * 2] if chosen(r) and believable(r) else []


def host_excess(r: Record) -> Iterable[tuple[float, float]]:
    """Eager's microseconds less ours, of a forward on a tiny tensor, host included."""
    if not cases(*NORMS, direction="forward", below=MIB)(r):
        return
    ours, theirs = (
        variant.get("inclusive") or variant["samples"] for variant in (r["variants"][n] for n in ("fused", "eager"))
    )
    pairs = [(b - a) * 1e6 for a, b in zip(ours, theirs)]
    yield median(pairs), (min(theirs) - min(ours)) * 1e6


def kept(r: Record) -> Iterable[tuple[float, float]]:
    """Eager's bytes over ours."""
    if is_step(r) and r.get("kept_bytes"):
        yield (r["kept_bytes"]["eager"] / r["kept_bytes"]["fused"],) * 2


def is_step(r: Record) -> bool:
    return r["op"] == "encoder_layer" and r["dtype"] == "bfloat16" and list(r["shape"][1:]) == [2048, 1024]


def share(value: float) -> str:
    return f"{value:.0%}"


LARGE = {"dtype": "bfloat16", "at_least": 64 * MIB}
WHOLE = cases("bias_dropout_add_layer_norm", direction="both", **LARGE)
TINY_FORWARD, TINY_BOTH = (cases(*NORMS, direction=d, below=MIB) for d in ("forward", "both"))
ATTENTION = ("attention", "attention_causal")


def both(*ops: str, **limits: Any) -> Callable[[Record], bool]:
    """Forward, and forward + backward."""
    one, other = (cases(*ops, direction=d, **limits) for d in ("forward", "both"))
    return lambda r: one(r) or other(r)


GPU = (
    Target(
        "add + LayerNorm forward, bfloat16, from 64 MiB, 1k to 32k columns, of a device copy's bandwidth",
        *(">= 95%", 0.95, roofline(cases("add_layer_norm", direction="forward", widths=(1024, 32768), **LARGE)), share),
    ),
    Target(
        "the same, 64k to 262k columns",
        *(
            ">= 85%",
            0.85,
            roofline(cases("add_layer_norm", direction="forward", widths=(65536, 1 << 18), **LARGE)),
            share,
        ),
    ),
    Target(
        "its backward, 1k to 32k columns",
        *(
            ">= 90%",
            0.90,
            roofline(cases("add_layer_norm", direction="backward", widths=(1024, 32768), **LARGE)),
            share,
        ),
    ),
    Target(
        "bias + dropout + add + LayerNorm, forward + backward, bfloat16, from 64 MiB, against eager",
        *(">= 2.5x", 2.5, speed(WHOLE, "eager")),
    ),
    Target("the same, against torch.compile", ">= 1.3x", 1.3, speed(WHOLE, "compile", "compile-max-autotune")),
    Target(
        "LayerNorm and RMSNorm, every shape and dtype, against eager",
        *(">= 1x", 1.0, speed(both(*NORMS), "eager")),
    ),
    Target("the same, host time included", ">= 1x", 1.0, speed(both(*NORMS), "eager", key="inclusive")),
    Target(f"the same, against {', '.join(PEERS)}", ">= 1x", 1.0, speed(both(*NORMS), *PEERS)),
    Target(
        "LayerNorm and RMSNorm under 1 MiB, on the device alone, against eager",
        *(">= 1x", 1.0, speed(lambda r: TINY_FORWARD(r) or TINY_BOTH(r), "eager")),
    ),
    Target("their forward, host time less eager's", "<= 2 us", -2.0, host_excess, lambda v: f"{-v:+.1f} us"),
    Target("their forward + backward, host time included", ">= 1x", 1.0, speed(TINY_BOTH, "eager", key="inclusive")),
    Target(
        "attention, bfloat16, against torch's flash backend",
        *(">= 1x", 1.0, speed(both(*ATTENTION, dtype="bfloat16", at_least=MIB), "sdpa-flash")),
    ),
    Target(
        "attention, bfloat16, against torch's cuDNN backend",
        *(">= 1x", 1.0, speed(both(*ATTENTION, dtype="bfloat16", at_least=MIB), "sdpa-cudnn")),
    ),
    Target(
        "training step of an encoder layer, width 1024, length 2048, bfloat16, against eager",
        *(">= 1.5x", 1.5, speed(is_step, "eager")),
    ),
    Target("the same, against torch.compile", ">= 1.1x", 1.1, speed(is_step, "compile", "compile-max-autotune")),
    Target("what it keeps for its backward, of eager's", "<= 60%", 1 / 0.6, kept, lambda v: f"{1 / v:.0%}"),
)


def in_sweep(op: str, dtype: str, wanted: float) -> Target:
    """The median over the sweep's forwards, and forwards + backwards, of one dtype."""
    chosen, name = both(op, dtype=dtype), {"layer_norm": "LayerNorm", "add_layer_norm": "add + LayerNorm"}[op]
    text = f"{name}, {dtype}, median of the sweep, against eager"
    return Target(text, f">= {wanted}x", wanted, speed(chosen, "eager"), of_all=median)


def of_copy(dtype: str, direction: str, least: float) -> Target:
    """The share of a copy's bandwidth that large norms reach at least."""
    what = {"forward": "forward", "both": "forward + backward"}[direction]
    text = f"LayerNorm and add + LayerNorm, {dtype}, {what} from 16 MiB, of a copy's bandwidth"
    chosen = cases("layer_norm", "add_layer_norm", direction=direction, dtype=dtype, at_least=16 * MIB)
    return Target(text, f">= {least:.0%}", least, roofline(chosen), share)


ADAPTIVE = ("adaptive_layer_norm", "add_adaptive_layer_norm", "add_adaptive_rms_norm")
DTYPES = ("float32", "bfloat16")
CPU = (
    in_sweep("layer_norm", "float32", 1.4),
    in_sweep("layer_norm", "bfloat16", 1.8),
    in_sweep("layer_norm", "float16", 1.8),
    in_sweep("add_layer_norm", "float32", 1.7),
    in_sweep("add_layer_norm", "bfloat16", 2.2),
    Target("add + LayerNorm, worst of the sweep, against eager", ">= 1x", 1.0, speed(both("add_layer_norm"), "eager")),
    Target("LayerNorm and RMSNorm, every shape and dtype", ">= 1x", 1.0, speed(both(*NORMS), "eager")),
    Target("their forward under 1 MiB, time less eager's", "<= 2 us", -2.0, host_excess, lambda v: f"{-v:+.1f} us"),
    Target("their forward + backward under 1 MiB", ">= 1x", 1.0, speed(TINY_BOTH, "eager")),
    *(of_copy(dtype, direction, least) for dtype in DTYPES for direction, least in (("forward", 0.7), ("both", 0.55))),
    Target(
        "norms with a gate, a scale and a shift for each sample, worst of the sweep, against eager",
        *(">= 1x", 1.0, speed(both(*ADAPTIVE), "eager")),
    ),
)


def rows(result: Record) -> list[list[str]]:
    """Target, what is wanted, the deciding figure, its case, how many comparisons, verdict."""
    found = []
    for target in GPU if result["environment"]["device_type"] == "cuda" else CPU:
        compared = [(*pair, r["name"]) for r in measured(result) for pair in target.figures(r)]
        if not compared:
            found.append([target.text, target.wanted, "", "", "0", "not measured"])
            continue
        if target.of_all is min:
            value, allowed, name = min(compared, key=lambda each: (each[1] >= target.least, each[0]))
        else:
            value = allowed = target.of_all([figure for figure, _, _ in compared])
            name = ""
        short = "within the spread" if allowed >= target.least else "MISSED"
        verdict = "met" if value >= target.least else short
        found.append([target.text, target.wanted, target.written(value), name, str(len(compared)), verdict])
    return found


def text(result: Record) -> str:
    head = ["target", "wanted", "measured", "worst case", "comparisons", ""]
    return table(head, rows(result))


def page(kept_results: Sequence[tuple[Path, Record]]) -> str:
    parts = ["# Targets", "Written by `benchmarks/publish/targets.py` from the raw data beside it: do not edit."]
    if all(result["environment"]["device_type"] == "cpu" for _, result in kept_results):
        parts.append("No result of a GPU is among the raw data: none of the targets on one is met or missed yet.")
        parts.append(table(["target", "wanted"], [[t.text, t.wanted] for t in GPU]))
    for path, result in kept_results:
        e = result["environment"]
        parts.append(f"## {add_result.device_and_threads(result)}")
        parts.append(f"{e['date'][:10]}, commit `{e['commit']}`, [raw data]({path.parent.name}/{path.name}).")
        parts.append(text(result))
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="a JSON file that run.py wrote: print its table instead")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if there is a difference")
    arguments = parser.parse_args(argv)
    if arguments.result:
        print(text(read_result(arguments.result)))
        return 0
    return renew(TABLE, page(add_result.newest(for_targets=True)), arguments.check)


if __name__ == "__main__":
    sys.exit(main())
