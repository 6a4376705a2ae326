"""The pictures of a run: speed-ups, fractions of the roofline, peak memory; one panel an operation."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.cases import DIRECTION_TITLES, OPS
from benchmarks.report_stats import (
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
            label = f"time of {baseline} / time of fusednorm"
            names.append(_panels(result, records, pick, title, label, f"speedup-{baseline}-{direction}.png", folder))
        both = (("fusednorm", "fused"), ("eager", "eager"))
        pick = {name: lambda r, v=v: _fraction(r, v) for name, v in both}
        title = f"Fraction of the roofline (a device copy of the same bytes), {DIRECTION_TITLES[direction]}"
        names.append(
            _panels(result, records, pick, title, "time of the copy / time", f"roofline-{direction}.png", folder)
        )
        if any("peak" in r["variants"]["fused"] for r in records):
            title = f"Peak memory beside the inputs, {DIRECTION_TITLES[direction]}"
            pick = {"": lambda r: (r["variants"]["fused"]["peak"] / max(r["variants"]["eager"]["peak"], 1),) * 3}
            names.append(_panels(result, records, pick, title, "fusednorm / eager", f"memory-{direction}.png", folder))
    return [name for name in names if name]


def _fraction(record: Record, variant: str) -> Point | None:
    if variant not in record["variants"] or not believable(record, variant):
        return None
    return (roofline_fraction(record, variant),) * 3


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
    label: str,
    name: str,
    folder: Path,
) -> str | None:
    """One panel an operation, one colour a dtype; a line joins the geometric means of equal sizes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    series: dict[tuple[str, str, str], list[tuple[int, Point]]] = {}
    for record in records:
        for variant, value_of in pick.items():
            if (value := value_of(record)) is not None:
                series.setdefault((record["op"], record["dtype"], variant), []).append((record["input_bytes"], value))
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
            style = {"color": COLOURS.get(dtype), "linestyle": "--" if variant == "eager" else "-"}
            style |= {"marker": "x" if variant == "eager" else "o", "markersize": 4}
            for size, (value, low, high, *_) in points:
                axis.errorbar(size, value, [[value - low], [high - value]], **style, linewidth=0, elinewidth=1)
            sizes = sorted({size for size, _ in points})
            means = [geometric_mean([p[0] for s, p in points if s == size]) for size in sizes]
            axis.plot(sizes, means, **style | {"marker": ""}, linewidth=1.4)
            legend = figure.axes[0].plot([], [], **style, linewidth=1.4)[0]
            handles.setdefault(f"{dtype} {variant}".strip(), legend)
        axis.axhline(1.0, color="0.3", linewidth=0.8, linestyle=":")
        axis.set_title(op, fontsize=10)
        axis.grid(alpha=0.25)
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("size of x", fontsize=9)
    for axis in axes.flat[len(ops) :]:
        axis.set_visible(False)
    first = axes.flat[0]
    first.set_xscale("log", base=2)
    first.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0,), numticks=8))
    first.xaxis.set_major_formatter(FuncFormatter(lambda x, _: bytes_text(x).replace(" ", "\n")))
    first.xaxis.set_minor_formatter(NullFormatter())
    values = [p[0] for points in series.values() for _, p in points]
    if max(values) > 3 * min(values):
        first.set_yscale("log")
        first.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        first.yaxis.set_minor_formatter(NullFormatter())
        first.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    else:
        first.set_ylim(min(0.75, 0.95 * min(values)), max(1.25, 1.05 * max(values)))
    e = result["environment"]
    below = [f"{e['device']}, torch {e['torch']}, commit {e['commit'] or 'unknown'}", busy_text(result)]
    below.insert(0, f"fusednorm here: {served(records)}")
    set_title(figure, title, below)
    figure.supylabel(label, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.savefig(folder / name, dpi=110)
    return name
