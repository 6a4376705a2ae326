"""Judge the two runs of a job, and say what came of them in Markdown."""

from __future__ import annotations

import json
import math
import textwrap
from typing import Any

from benchmarks.report import stats as report_stats
from benchmarks.report.table import table
from examples.training.job import Job
from examples.training.loop import WARM_UP
from fusednorm.tuning import load as measure_load

# With dropout each variant draws masks of its own: what the test loss after training may differ by, as a share of it.
# Measured with dropout 0.1 (--small otherwise): 0.2 % after 9 epochs, 1.2 % after 4 of another seed, where training is
# still steep; two runs of eager with other masks 0.3 %.
DRAWN = 0.05


def check_curves(fused: dict[str, list[float]], eager: dict[str, list[float]], bound: float) -> list[str]:
    """Return what is wrong with the pair of curves, in words; an empty list when they agree within `bound`."""
    faults = []
    for side in ("train", "test"):
        if len(fused[side]) != len(eager[side]) or not fused[side]:
            faults.append(
                f"{side} loss: {len(fused[side])} points fused, {len(eager[side])} eager; both must be equal and > 0"
            )
            continue
        first = 1 if side == "train" else 0  # the test curve starts before the first epoch
        for epoch, (a, b) in enumerate(zip(fused[side], eager[side]), first):
            if not (math.isfinite(a) and math.isfinite(b)):
                faults.append(f"{side} loss after epoch {epoch} is not finite: fused {a}, eager {b}")
            elif abs(a - b) > bound:
                faults.append(
                    f"{side} loss after epoch {epoch}: fused {a:.5f}, eager {b:.5f}, "
                    f"difference {abs(a - b):.2g} exceeds {bound:g} nats"
                )
    return faults


def verdict(curves: dict[str, dict[str, list[float]]], bound: float, dropout: float) -> dict[str, Any]:
    """What is wrong with the pair of runs, in words, and the bounds that say so."""
    fused, eager = curves["fused"], curves["eager"]
    if dropout == 0.0:
        largest = max(abs(a - b) for side in ("train", "test") for a, b in zip(fused[side], eager[side]))
        return {"bound": bound, "faults": check_curves(fused, eager, bound), "largest_difference": largest}
    # Each variant draws masks of its own, so that their curves differ as two seeds do. What does not hang on masks is
    # held to the bound, the loss before training; what training comes to, to a share of it.
    start, end = ((c["test"][0], c["test"][-1]) for c in (fused, eager))
    (fused_start, fused_end), (eager_start, eager_end) = start, end
    faults = []
    if not abs(fused_start - eager_start) <= bound:  # true of NaN too
        faults.append(
            f"test loss before training: fused {fused_start:.5f}, eager {eager_start:.5f}, difference exceeds "
            f"{bound:g} nats"
        )
    if not abs(fused_end - eager_end) <= DRAWN * eager_end or not math.isfinite(eager_end):
        faults.append(
            f"test loss after training: fused {fused_end:.5f}, eager {eager_end:.5f}, difference exceeds {DRAWN:.0%} "
            "of it"
        )
    return {
        "bound": bound,
        "drawn_bound": DRAWN,
        "faults": faults,
        "largest_difference": abs(fused_start - eager_start),
        "end_difference": abs(fused_end - eager_end) / eager_end if eager_end else math.nan,
    }


def agreement(report: dict[str, Any]) -> str:
    checks, unit = report["checks"], report["unit"]
    said = "yes" if not checks["faults"] else "NO: " + "; ".join(checks["faults"])
    if "drawn_bound" not in checks:
        largest = f"{checks['largest_difference']:.2g}"
        return (
            f"- Curves agree within {checks['bound']:g} nats/{unit}: {said}; largest difference of an epoch {largest}."
        )
    return (
        f"- Runs agree: {said}. Before training the test losses differ by {checks['largest_difference']:.2g} "
        f"nats/{unit} (bound {checks['bound']:g}), after it by {checks['end_difference']:.2%} (bound "
        f"{checks['drawn_bound']:.0%}): each variant draws its own dropout masks."
    )


def calls_text(report: dict[str, Any]) -> str:
    """Who serves each function of the fused model, in a few words."""
    parts: dict[str, list[str]] = {}
    for route in report["environment"]["route"]:
        parts.setdefault(route["function"], []).append(f"{route['calls']} by {route['provider']}")
    return ", ".join(f"{function} ({', '.join(counts)})" for function, counts in parts.items())


def refusal_lines(report: dict[str, Any]) -> list[str]:
    """Which other providers do not serve the calls, and why, once for all calls that have the same reason."""
    functions: dict[str, dict[str, None]] = {}
    for route in report["environment"]["route"]:
        for line in route["refusals"]:
            functions.setdefault(line, {})[route["function"]] = None
    return [f"- For {', '.join(names)}, {line}." for line, names in functions.items()]


def notices(report: dict[str, Any]) -> list[str]:
    """What a reader must know before any figure."""
    environment, found = report["environment"], []
    if report_stats.no_kernel(report["environment"]["route"]):
        found.append(report_stats.NO_KERNEL)
        found += ["This command trains through the fused op here:", f"    PYTHONPATH=. {environment['fused_command']}"]
    return [*found, *filter(None, [busy_text(report)])]


def busy_text(report: dict[str, Any]) -> str | None:
    """The speed on a CPU alone hangs on what else runs there."""
    environment = report["environment"]
    return measure_load.warning(environment["others"], "the speeds") if environment["device_type"] == "cpu" else None


def subtitles(report: dict[str, Any]) -> list[str | None]:
    """The small print of every picture."""
    return [f"calls of a fused forward: {calls_text(report)}", report["environment"]["device"], busy_text(report)]


# What is measured, its entry, how a variant's value is said, and the ratio of the two.
RESULTS = (
    ("train loss, last epoch (nats/{unit})", "train", "{train:.5f}", "{:.5f}"),
    ("test loss, last epoch (nats/{unit})", "test", "{test:.5f}", "{:.5f}"),
    ("training speed ({unit}s/s)", "tokens_per_s", "{tokens_per_s:,.0f}", "{:.2f}"),
    (
        "step, median [quartiles] (ms)",
        "step_ms_median",
        "{step_ms_median:.1f} [{step_ms_quartile_1:.1f}, {step_ms_quartile_3:.1f}]",
        "{:.2f}",
    ),
    ("peak memory of training", "peak_bytes", "{peak_mib:.1f} MiB", "{:.2f}"),
    ("kept by one forward for its backward", "saved_bytes", "{saved_mib:.1f} MiB", "{:.2f}"),
)


def result_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows (what, eager, fused, fused / eager) for the terminal and the Markdown file."""
    found = {}
    for variant in ("eager", "fused"):
        losses = {side: report["curves"][variant][side][-1] for side in ("train", "test")}
        found[variant] = report["speed"][variant] | report["memory"][variant] | losses
    rows = _rows(found, report["unit"])
    dropped = report["with_dropout"]
    if dropped is None:
        return rows
    return [*rows, *((f"with dropout: {row[0]}", *row[1:]) for row in _rows(dropped, report["unit"]))]


def _rows(found: dict[str, dict[str, Any]], unit: str) -> list[tuple[str, ...]]:
    """Of those results that were measured."""

    def with_mebibytes(entries: dict[str, Any]) -> dict[str, Any]:
        return entries | {
            f"{n}_mib": entries[f"{n}_bytes"] / 2**20 for n in ("peak", "saved") if f"{n}_bytes" in entries
        }

    eager, fused = (with_mebibytes(found[variant]) for variant in ("eager", "fused"))
    return [
        (
            what.format(unit=unit),
            said.format(**eager),
            said.format(**fused),
            ratio.format(fused[key] / eager[key]) if eager[key] else "–",
        )
        for what, key, said, ratio in RESULTS
        if key in eager
    ]


def epoch_table(curves: dict[str, Any]) -> str:
    rows = [
        (
            str(epoch),
            *(f"{curves[v]['train'][epoch - 1]:.5f}" if epoch else "–" for v in ("eager", "fused")),
            *(f"{curves[v]['test'][epoch]:.5f}" for v in ("eager", "fused")),
        )
        for epoch in range(len(curves["eager"]["test"]))
    ]
    return table(("epoch", "train eager", "train fused", "test eager", "test fused"), rows)


def wrapped(line: str) -> str:
    """Running text broken for a terminal; tables and commands stay as they are."""
    if line.startswith(("|", "    ", "#")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def summary(job: Job | type[Job], report: dict[str, Any]) -> str:
    """The Markdown report, which is also what the terminal shows."""
    checks, environment, said = report["checks"], report["environment"], job.say(report)
    reload = "bitwise equal" if checks["reload_equal"] else f"NOT EQUAL to {report['curves']['fused']['test'][-1]!r}"
    lines = [
        f"# {report['title']}",
        "",
        *(part for text in notices(report) for part in (text, "")),
        f"- {said.data}",
        f"- Model: {report['parameters']:,} parameters; {json.dumps(report['model'])}.",
        f"- Training: {json.dumps(report['settings'])}.",
        f"- Machine: {environment['device']}; torch {environment['torch']}, threads: {environment['threads']}; while "
        f"the models trained, CPU time of other processes: {measure_load.share_text(environment['others'])}.",
        f"- Calls of one forward of the fused model: {calls_text(report)}.",
        *refusal_lines(report),
        "",
        table(("", "eager", "fused", "fused / eager"), result_rows(report)),
        "",
        epoch_table(report["curves"]),
        "",
        *([said.scores, ""] if said.scores else []),
        agreement(report),
        f"- Checkpoint reloaded with `weights_only=True`: test loss {checks['reloaded_test_loss']!r}, {reload}.",
        *(f"- {line}" for line in said.quality),
        *(f"- NOT LEARNED: {fault}." for fault in checks["not_learned"]),
        f"- Speed: {report['unit']}s of the loss over the time of all training steps but the first {WARM_UP}, the two "
        "variants alternating in one process.",
        "",
    ]
    return "\n".join([*map(wrapped, lines), *said.examples, ""])
