"""The pictures of a run: speed-ups, fractions of the roofline, peak memory; one panel an operation."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.cases import DIRECTION_TITLES, OPS
from benchmarks.report.stats import (
    Record,
    believable,
    busy_text,
    bytes_text,
    measured,
    ratio,
    roofline_fraction,
    served,
)

Point = tuple[float, ...]  # value, low, high
RANKS = {"v": "narrowest rows among shapes of one size (lines join their mean)", "^": "widest rows among them"}
COLOURS = {"float32": "tab:blue", "bfloat16": "tab:orange", "float16": "tab:green"}


def plots(result: Record, folder: Path) -> list[str] | None:
    """Draw every picture into `folder` and give their names, or None where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return None
    names = []
    for direction in dict.fromkeys(r["direction"] for r in result["cases"]):
        records = [r for r in measured(result) if r["direction"] == direction]
        baselines = list(dict.fromkeys(name for r in records for name in r["variants"] if name != "fused"))
        for baseline in baselines:
            pick = {"": lambda r, b=baseline: ratio(r, b)}
            title = f"Speed-up over {baseline}, {DIRECTION_TITLES[direction]}"
            label = f"time of {baseline} / time of fusednorm (above 1: fusednorm is faster)"
            names.append(_panels(result, records, pick, title, label, f"speedup-{baseline}-{direction}.png", folder))
        both = (("fusednorm", "fused"), ("eager", "eager"))
        pick = {name: lambda r, v=v: _fraction(r, v) for name, v in both}
        title = f"Fraction of the roofline (a device copy of the same bytes), {DIRECTION_TITLES[direction]}"
        label = "shortest possible time / measured time (1: as fast as that copy)"
        names.append(_panels(result, records, pick, title, label, f"roofline-{direction}.png", folder))
        if any("peak" in r["variants"]["fused"] for r in records):
            title = f"Peak memory beside the inputs, {DIRECTION_TITLES[direction]}"
            pick = {"": _memory}
            label = "peak of fusednorm / peak of eager (below 1: fusednorm takes less)"
            names.append(_panels(result, records, pick, title, label, f"memory-{direction}.png", folder))
        if any("kept_bytes" in r for r in records):
            title = f"Kept by a layer's forward for its backward, {DIRECTION_TITLES[direction]}"
            label = "bytes kept by fusednorm / by eager (below 1: fusednorm keeps less)"
            names.append(_panels(result, records, {"": _kept}, title, label, f"kept-{direction}.png", folder))
    return [name for name in names if name]


def _fraction(record: Record, variant: str) -> Point | None:
    if variant not in record["variants"] or not believable(record, variant):
        return None
    return (roofline_fraction(record, variant),) * 3


def _memory(record: Record) -> Point | None:
    if "eager" not in record["variants"]:  # it failed
        return None
    ours, theirs = (record["variants"][name]["peak"] for name in ("fused", "eager"))
    return (ours / max(theirs, 1),) * 3


def _kept(record: Record) -> Point | None:
    kept = record.get("kept_bytes")
    return (kept["fused"] / max(kept["eager"], 1),) * 3 if kept else None


def _markers(records: Iterable[Record]) -> dict[tuple[str, str], str]:
    """A marker for each dtype and shape, by how wide its rows are among those of as many bytes."""
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for record in records:
        groups.setdefault((record["dtype"], record["input_bytes"]), {})[record["shape"][-1]] = record["size"]
    markers = {}
    for (dtype, _), shapes in groups.items():
        widths = sorted(shapes)
        for width in widths:
            marker = "o" if len(widths) == 1 else "v" if width == widths[0] else "^" if width == widths[-1] else "o"
            markers[dtype, shapes[width]] = marker
    return markers


def log_ticks(low: float, high: float, most: int = 9) -> list[float]:
    """Round values from below `low` to above `high`, as many as can be labelled."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        candidates = [float(f"{step}e{decade}") for decade in decades for step in steps]
        below, above = max(c for c in candidates if c <= low), min(c for c in candidates if c >= high)
        ticks = [c for c in candidates if below <= c <= above]
        if len(ticks) <= most:
            break
    return ticks


def size_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Powers of two from `low` or below to `high` or above, an equal step apart."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    step = max(1, math.ceil((last - first) / (most - 1)))
    return [2.0**power for power in range(first, last + step, step)]


def set_title(figure: Any, title: str, below: Iterable[str | None]) -> None:
    """The title over lines of small print, broken where the picture ends."""
    across = int(13 * figure.get_figwidth())  # letters of that size to an inch
    lines = [part for line in (title, *below) if line for part in textwrap.wrap(line, across)]
    figure.suptitle("\n".join(lines), fontsize=10)


def _panels(
    result: Record,
    records: Sequence[Record],
    pick: Mapping[str, Callable[[Record], Point | None]],
    title: str,
    axis_label: str,
    name: str,
    folder: Path,
) -> str | None:
    """One panel an operation, one colour a dtype; a line joins the geometric means of equal sizes.

    Shapes of equal size share a place on the x axis: the marker tells the widest and the narrowest rows apart.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    markers, series = _markers(records), {}
    for record in records:
        for variant, value_of in pick.items():
            if (value := value_of(record)) is not None:
                series.setdefault((record["op"], record["dtype"], variant), []).append((record, value))
    ops = [op for op in OPS if any(key[0] == op for key in series)]
    if not ops:
        return None
    columns = min(3, len(ops))
    rows = math.ceil(len(ops) / columns)
    figure = Figure(figsize=(4.2 * columns + 0.4, 2.9 * rows + 1.3), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for axis, op in zip(axes.flat, ops):
        for (owner, dtype, variant), points in sorted(series.items()):
            if owner != op:
                continue
            style = {"color": COLOURS.get(dtype), "markersize": 5}
            style |= {"linestyle": "--", "markerfacecolor": "none"} if variant == "eager" else {"linestyle": "-"}
            at: dict[int, list[float]] = {}
            for record, (value, low, high, *_) in points:
                marker = markers[record["dtype"], record["size"]]
                bars = [[value - low], [high - value]]
                axis.errorbar(
                    record["input_bytes"], value, bars, **style | {"linestyle": ""}, marker=marker, elinewidth=1
                )
                at.setdefault(record["input_bytes"], []).append(value)
                if marker in RANKS:
                    handles[RANKS[marker]] = Line2D([], [], color="0.3", linestyle="", marker=marker)
            sizes = sorted(at)
            axis.plot(sizes, [geometric_mean(at[size]) for size in sizes], **style, linewidth=1.4)
            label = f"{dtype} {variant}".strip()
            handles.setdefault(label, Line2D([], [], **style, marker="o", linewidth=1.4))
        axis.axhline(1.0, color="0.3", linewidth=0.8, linestyle=":")
        axis.set_title(op, fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("size of query" if OPS[op].family == "attention" else "size of x", fontsize=9)
    for axis in axes.flat[len(ops) :]:
        axis.set_visible(False)
    first = axes.flat[0]
    first.set_xscale("log", base=2)
    sizes = size_ticks(*(extreme(r["input_bytes"] for r in records) for extreme in (min, max)))
    first.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    first.xaxis.set_major_locator(FixedLocator(sizes))
    first.xaxis.set_major_formatter(FuncFormatter(lambda x, _: bytes_text(x).replace(" ", "\n")))
    first.xaxis.set_minor_locator(NullLocator())
    values = [value for points in series.values() for _, p in points for value in p[:3]]
    if 0 < 3 * min(values) < max(values):
        ticks = log_ticks(min(*values, 1.0), max(*values, 1.0))
        first.set_yscale("log")
        first.set_ylim(ticks[0] / 1.05, ticks[-1] * 1.05)
        first.yaxis.set_major_locator(FixedLocator(ticks))
        first.yaxis.set_minor_locator(NullLocator())
        first.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    else:
        first.set_ylim(min(0.75, 0.95 * min(values)), max(1.25, 1.05 * max(values)))
    e = result["environment"]
    below = [f"{e['device']}, torch {e['torch']}, commit {e['commit'] or 'unknown'}", busy_text(result)]
    below.insert(0, f"fusednorm here: {served(records)}")
    set_title(figure, title, below)
    figure.supylabel(axis_label.replace(" (", "\n("), fontsize=10)
    columns = max(1, int(figure.get_figwidth() / 2.2))
    ranks = [name for name in RANKS.values() if name in handles]
    ordered = [name for name in handles if name not in ranks] + ranks
    figure.legend([handles[n] for n in ordered], ordered, loc="outside lower center", ncols=columns, fontsize=9)
    figure.savefig(folder / name, dpi=110)
    return name
