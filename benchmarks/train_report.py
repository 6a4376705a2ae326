"""What the reports of the training jobs share: the verdict on two curves, tables, curves drawn."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from typing import Any

from benchmarks.measure import load as measure_load
from benchmarks.report import stats as report_stats

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
                    f"difference {abs(a - b):.2g} exceeds {bound:g} nats/token"
                )
    return faults


def largest_difference(fused: dict[str, list[float]], eager: dict[str, list[float]]) -> float:
    return max(abs(a - b) for side in ("train", "test") for a, b in zip(fused[side], eager[side]))


def verdict(curves: dict[str, dict[str, list[float]]], bound: float, dropout: float) -> dict[str, Any]:
    """What is wrong with the pair of runs, in words, and the bounds that say so."""
    fused, eager = curves["fused"], curves["eager"]
    if dropout == 0.0:
        faults = check_curves(fused, eager, bound)
        return {"bound": bound, "faults": faults, "largest_difference": largest_difference(fused, eager)}
    # Each variant draws masks of its own, so that their curves differ as two seeds do. What does not hang on masks is
    # held to the bound, the loss before training; what training comes to, to a share of it.
    start, end = ((c["test"][0], c["test"][-1]) for c in (fused, eager))
    (fused_start, fused_end), (eager_start, eager_end) = start, end
    faults = []
    if not abs(fused_start - eager_start) <= bound:  # true of NaN too
        faults.append(
            f"test loss before training: fused {fused_start:.5f}, eager {eager_start:.5f}, difference exceeds "
            f"{bound:g} nats/token"
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
    checks = report["checks"]
    said = "yes" if not checks["faults"] else "NO: " + "; ".join(checks["faults"])
    if "drawn_bound" not in checks:
        largest = f"{checks['largest_difference']:.2g}"
        return (
            f"- Curves agree within {checks['bound']:g} nats/token: {said}; largest difference of an epoch {largest}."
        )
    return (
        f"- Runs agree: {said}. Before training the test losses differ by {checks['largest_difference']:.2g} "
        f"nats/token (bound {checks['bound']:g}), after it by {checks['end_difference']:.2%} (bound "
        f"{checks['drawn_bound']:.0%}): each variant draws its own dropout masks."
    )


def routes_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """How each call is served of which that is known: one stands for all, or all are listed."""
    route = report["environment"]["route"]
    return route if isinstance(route, list) else [route]


def calls_text(report: dict[str, Any]) -> str:
    """Who serves each function of the fused model, in a few words."""
    parts: dict[str, list[str]] = {}
    for route in routes_of(report):
        parts.setdefault(route["function"], []).append(f"{route['calls']} by {route['provider']}")
    return ", ".join(f"{function} ({', '.join(counts)})" for function, counts in parts.items())


def refusal_lines(report: dict[str, Any]) -> list[str]:
    """Which other providers do not serve the calls, and why, once for all calls that have the same reason."""
    functions: dict[str, dict[str, None]] = {}
    for route in routes_of(report):
        for line in route["refusals"]:
            functions.setdefault(line, {})[route["function"]] = None
    return [f"- For {', '.join(names)}, {line}." for line, names in functions.items()]


def notices(report: dict[str, Any]) -> list[str]:
    """What a reader must know before any figure."""
    environment, found = report["environment"], []
    if report_stats.no_kernel(routes_of(report)):
        found.append(report_stats.NO_KERNEL)
        found += ["This command trains through the fused op here:", f"    PYTHONPATH=. {environment['fused_command']}"]
    return [*found, *filter(None, [busy_text(report)])]


def busy_text(report: dict[str, Any]) -> str | None:
    """The speed on a CPU alone hangs on what else runs there."""
    environment = report["environment"]
    return measure_load.warning(environment["others"], "the speeds") if environment["device_type"] == "cpu" else None


def mebibytes(value: float) -> str:
    return f"{value / 2**20:.1f} MiB"


def ratio(numerator: float, denominator: float) -> str:
    return f"{numerator / denominator:.2f}"


def draw_losses(axes: Any, curves: dict[str, Any]) -> None:
    """Losses over epochs, both variants and both sides."""
    epochs = len(curves["eager"]["train"])
    # Eager is drawn wide and pale under fused: where the two agree, both stay visible.
    styles = {
        "eager": {"linewidth": 6, "alpha": 0.35, "marker": "o", "markersize": 10},
        "fused": {"linewidth": 1.6, "marker": "o", "markersize": 4},
    }
    for variant in ("eager", "fused"):
        curve = curves[variant]
        axes.plot(range(1, epochs + 1), curve["train"], color="tab:blue", label=f"{variant}, train", **styles[variant])
        axes.plot(range(epochs + 1), curve["test"], color="tab:orange", label=f"{variant}, test", **styles[variant])


def draw_differences(axes: Any, curves: dict[str, Any], bound: float) -> None:
    """Difference of the two variants at every training step, and the bound."""
    steps = [abs(a - b) for a, b in zip(curves["fused"]["steps"], curves["eager"]["steps"])]
    axes.set(xlabel="training step", ylabel="|fused − eager| (nats per token)", title="Difference of the losses")
    drawn = [(step, value) for step, value in enumerate(steps, 1) if value > 0]
    axes.axhline(bound, color="tab:red", linestyle="--", label=f"bound on epochs: {bound:g}")
    if drawn:
        # no line: it would pass over steps where the two are equal, which a logarithm cannot show
        axes.semilogy(*zip(*drawn), ".", color="tab:green", markersize=4, label="a step's training batch")
        zeros = len(steps) - len(drawn)
        if zeros:
            axes.plot([], [], " ", label=f"exactly equal at {zeros} of {len(steps)} steps")
    else:
        axes.set(xlim=(0, len(steps)), ylim=(0, 1.3 * bound))
        axes.text(0.5, 0.4, f"exactly equal at all {len(steps)} steps", ha="center", transform=axes.transAxes)
    axes.legend()


def result_rows(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (what, eager, fused, fused / eager) for the terminal and the Markdown file."""
    eager, fused = ({**report["speed"][v], **report["memory"][v]} for v in ("eager", "fused"))
    curves = report["curves"]

    def losses(side: str) -> tuple[str, str, str, str]:
        a, b = curves["eager"][side][-1], curves["fused"][side][-1]
        return f"{side} loss, last epoch (nats/token)", f"{a:.5f}", f"{b:.5f}", f"{b / a:.5f}" if a else "–"

    return [
        losses("train"),
        losses("test"),
        (
            "training speed (tokens/s)",
            f"{eager['tokens_per_s']:,.0f}",
            f"{fused['tokens_per_s']:,.0f}",
            ratio(fused["tokens_per_s"], eager["tokens_per_s"]),
        ),
        (
            "step, median [quartiles] (ms)",
            *(
                f"{s['step_ms_median']:.1f} [{s['step_ms_quartile_1']:.1f}, {s['step_ms_quartile_3']:.1f}]"
                for s in (eager, fused)
            ),
            ratio(fused["step_ms_median"], eager["step_ms_median"]),
        ),
        (
            "peak memory of training",
            mebibytes(eager["peak_bytes"]),
            mebibytes(fused["peak_bytes"]),
            ratio(fused["peak_bytes"], eager["peak_bytes"]),
        ),
        (
            "kept by one forward for its backward",
            mebibytes(eager["saved_bytes"]),
            mebibytes(fused["saved_bytes"]),
            ratio(fused["saved_bytes"], eager["saved_bytes"]),
        ),
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


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(columns(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell + " " * (w - columns(cell)) for cell, w in zip(row, widths)) + " |"
        for row in [header, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def columns(text: str) -> int:
    """How wide a text stands on a terminal: a Chinese character takes two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def wrapped(line: str) -> str:
    """Running text broken for a terminal; tables and commands stay as they are."""
    if line.startswith(("|", "    ", "#")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
