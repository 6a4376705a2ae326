"""The curves of the two variants, drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import plots as report_plots
from examples.training.report import subtitles


def new_figure() -> Any:
    """An empty picture of the reports' size, or None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(11, 4.6), layout="constrained")


def save(figure: Any, title: str, below: Iterable[str | None], path: Path) -> None:
    report_plots.set_title(figure, title, below)
    figure.savefig(path, dpi=130)


COLOURS = {"eager, trained": "tab:blue", "fused, trained": "tab:orange"}
GREYS = ("0.8", "0.65", "0.5", "0.35")  # what has no colour of its own
STEEP = 5  # where the first epoch divides the loss by more, a linear axis shows nothing of the others
CROWD = 12  # bars beside which values stand upright, so as not to overlap


def draw_scores(axes: Any, scores: Mapping[str, float]) -> None:
    """A lying bar of each score, from the top, with its label and value."""
    greys = iter(GREYS)
    colours = [COLOURS[label] if label in COLOURS else next(greys) for label in scores]
    # a label of many words takes two lines
    labels = [textwrap.fill(label, 24, break_on_hyphens=False) for label in scores]
    bars = axes.barh(range(len(scores)), list(scores.values()), 0.7, color=colours)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set_yticks(range(len(scores)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def draw_bars(
    axes: Any, groups: Sequence[str], series: Mapping[str, Sequence[float]], colours: Mapping[str, str], form: str
) -> None:
    """A bar of each series, by its label, in every group, with its value."""
    width, greys = 0.8 / len(series), iter(GREYS)
    crowded = len(series) * len(groups) > CROWD
    for place, (label, heights) in enumerate(series.items()):
        left = [group + (place - (len(series) - 1) / 2) * width for group in range(len(groups))]
        colour = colours[label] if label in colours else next(greys)
        bars = axes.bar(left, heights, width * 0.95, label=label, color=colour)
        axes.bar_label(bars, fmt=form, padding=2, fontsize=8, rotation=90 if crowded else 0)
    axes.set_xticks(range(len(groups)), groups, fontsize=8 if crowded else None)
    axes.margins(y=0.2)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=2)


SIDES = {"train": "tab:blue", "test": "tab:orange"}


def draw_losses(
    axes: Any, curves: Mapping[str, Any], colours: Mapping[str, str] = SIDES, suffix: str | None = None
) -> None:
    """Losses over epochs of both variants, on each side that has a colour."""
    epochs = len(curves["eager"]["train"])
    # Eager is drawn wide and pale under fused: where the two agree, both stay visible.
    styles = {
        "eager": {"linewidth": 6, "alpha": 0.35, "marker": "o", "markersize": 10},
        "fused": {"linewidth": 1.6, "marker": "o", "markersize": 4},
    }
    for variant in ("eager", "fused"):
        for side, colour in colours.items():
            first = 1 if side == "train" else 0  # the test curve starts before the first epoch
            label = f"{variant}, {suffix or side}"
            axes.plot(range(first, epochs + 1), curves[variant][side], color=colour, label=label, **styles[variant])


def draw_differences(axes: Any, curves: dict[str, Any], bound: float, unit: str = "token") -> None:
    """Difference of the two variants at every training step, and the bound."""
    steps = [abs(a - b) for a, b in zip(curves["fused"]["steps"], curves["eager"]["steps"])]
    axes.set(xlabel="training step", ylabel=f"|fused − eager| (nats per {unit})", title="Difference of the losses")
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


def plot_curves(report: dict[str, Any], path: Path) -> bool:
    """Draw both curves and their difference; return False where matplotlib is missing."""
    figure = new_figure()
    if figure is None:
        return False
    left, right = figure.subplots(1, 2)
    draw_losses(left, report["curves"])
    if "unigram_loss" in report:
        left.axhline(report["unigram_loss"], color="0.4", linestyle=":", label="unigram baseline, test")
    left.set(xlabel="epoch", ylabel=f"loss (nats per {report['unit']})", title="Loss")
    starts, first = report["curves"]["eager"]["test"][:2]
    left.margins(y=0.1)  # room for the first point's marker
    left.set_yscale("log") if starts > STEEP * first else left.set_ylim(0, None)
    left.legend()
    draw_differences(right, report["curves"], report["checks"]["bound"], report["unit"])
    right.margins(y=0.3)  # room for the legend
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    save(figure, report["title"], subtitles(report), path)
    return True
