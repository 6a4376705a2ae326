"""From raw samples to tables, a Markdown page with plots, and a comparison of two runs.

PYTHONPATH=. python3 benchmarks/report.py RESULT.json --report DIR    # the page again, from raw data
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from typing import Any

from benchmarks.cases import DIRECTION_TITLES, OPS
from benchmarks.measure import median_interval

LOSS = 0.98  # a ratio whose whole interval lies below counts as a loss; nearer to 1 is no difference
CHANGE = 1.10  # addresses and clocks differ between two processes: smaller changes are none
Record = Mapping[str, Any]


# --- statistics ---


def ratio(record: Record, baseline: str = "eager", key: str = "samples") -> tuple[float, float, float, float] | None:
    """Baseline's time over ours; above 1 we are faster: median of the pairs, its interval, that of the fastest samples.

    What else runs on the machine only adds time, so a difference counts only where the fastest samples show it too.
    """
    ours, theirs = (record["variants"].get(name, {}).get(key) for name in ("fused", baseline))
    if not ours or not theirs:
        return None
    pairs = [b / a for a, b in zip(ours, theirs)]
    return (median(pairs), *median_interval(pairs), min(theirs) / min(ours))


def measured(result: Record) -> list[Record]:
    return [record for record in result["cases"] if record["status"] == "measured"]


def roofline_fraction(record: Record, variant: str = "fused") -> float:
    return record["roofline_seconds"] / median(record["variants"][variant]["samples"])


def losses(result: Record) -> list[tuple[Record, str, str, tuple[float, ...]]]:
    """(record, baseline, which time, ratio) of every measured loss, worst first."""
    found = []
    for record in measured(result):
        for baseline in record["variants"]:
            for key, what in (("samples", result["method"]["timer"]), ("inclusive", "host included, L2 warm")):
                value = None if baseline == "fused" else ratio(record, baseline, key)
                if value is not None and max(value[2:]) < LOSS:
                    found.append((record, baseline, what, value))
    return sorted(found, key=lambda loss: loss[3][0])


# --- text ---


def seconds_text(value: float) -> str:
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    return f"{value * factor:.3g} {unit}" if value < 1000 else f"{value:.0f} s"


def bytes_text(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def ratio_text(value: tuple[float, ...] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose source is aligned too; the first column is text, the others are figures."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(3, *(len(row[i]) for row in [list(head), *rows])) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def _groups(result: Record) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["direction"], r["dtype"]) for r in result["cases"]))


def pivots(result: Record) -> str:
    """Time of ours and its ratio to eager: one table a direction and dtype, shapes down, operations across."""
    parts = []
    for direction, dtype in _groups(result):
        records = [r for r in result["cases"] if (r["direction"], r["dtype"]) == (direction, dtype)]
        ops = [op for op in OPS if any(r["op"] == op for r in records)]
        rows: dict[str, dict[str, str]] = {}
        for record in records:
            cell = record["status"].upper()
            if record["status"] == "measured":
                value = ratio(record)
                cell = seconds_text(median(record["variants"]["fused"]["samples"]))
                cell += f" {value[0]:.2f}x" if value else ""
            rows.setdefault(record["size"], {})[record["op"]] = cell
        head = ["rows x width", *(op.replace("bias_dropout_add_", "epilogue_") for op in ops)]
        body = [[size, *(cells.get(op, "") for op in ops)] for size, cells in rows.items()]
        title = f"{DIRECTION_TITLES[direction]}, {dtype}: time of fusednorm, and eager's time over it"
        parts.append(f"{title}\n\n{table(head, body)}")
    return "\n\n".join(parts)


def summary(result: Record) -> str:
    rows = []
    for op in OPS:
        for direction, dtype in _groups(result):
            chosen = [r for r in measured(result) if (r["op"], r["direction"], r["dtype"]) == (op, direction, dtype)]
            ratios = [value[0] for r in chosen if (value := ratio(r)) is not None]
            if not ratios:
                continue
            fractions = [roofline_fraction(r) for r in chosen]
            figures = [f"{geometric_mean(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}"]
            share = [f"{median(fractions):.0%}", f"{max(fractions):.0%}"]
            rows.append([op, DIRECTION_TITLES[direction], dtype, len(chosen), *figures, *share])
    head = ["operation", "direction", "dtype", "cases", "eager / ours, geometric mean", "worst", "best"]
    return table([*head, "of roofline, median", "best"], rows)


def losses_text(result: Record) -> str:
    found = losses(result)
    limits = f"the whole 95% interval of the paired ratio, and that of the fastest samples, below {LOSS}"
    if not found:
        return f"Nowhere in this run ({limits})."
    rows = []
    for r, baseline, what, value in found:
        key = "samples" if what == result["method"]["timer"] else "inclusive"
        ours, theirs = (median(r["variants"][name][key]) for name in ("fused", baseline))
        cost = f"+{seconds_text(ours - theirs)}" if ours > theirs else "-"
        rows.append([r["name"], baseline, f"{1 / value[0]:.2f}x slower", cost, ratio_text(value), what, r["provider"]])
    head = ["case", "faster is", "ours", "a call", "its time / ours [95%]", "time", "served by"]
    return f"{len(found)} of the comparisons ({limits}):\n\n{table(head, rows)}"


def wrong_text(result: Record) -> str:
    rows = [[r["name"], r["status"].upper(), r["detail"]] for r in result["cases"] if r["status"] != "measured"]
    return table(["case", "verdict", "detail"], rows) if rows else ""


def providers_text(result: Record) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for record in result["cases"]:
        rows.setdefault((record["provider"], record["how"]), []).append(record["op"])
    body = [[provider, how, len(ops), ", ".join(dict.fromkeys(ops))] for (provider, how), ops in rows.items()]
    text = table(["served by", "how", "cases", "operations"], body)
    if any("torch's own operators" in how for _, how in rows):
        text += (
            "\n\nWhere torch's own operators serve a call there is no kernel of ours: 1.0 is expected, less where host "
            "time\ncounts, and far less with dropout, whose reproducible mask is then made with integer operators."
        )
    return text


def busy(result: Record) -> bool:
    e = result["environment"]
    return e["device_type"] == "cpu" and bool(e["load"]) and e["load"][0] > 0.5 * result["method"]["cores"]


def headline(result: Record) -> str:
    e, m, roof = result["environment"], result["method"], result["roofline"]
    size, seconds = roof["copies"][-1]
    lines = [
        f"{e['device']}; torch {e['torch']}, triton {e['triton'] or 'absent'}, Python {e['python']}, {e['system']}",
        f"commit {e['commit'] or 'unknown'}, {e['date']}; {m['threads']} threads; load at start {e['load']}",
        f"copy of {bytes_text(size / 2)}: {size / seconds / 1e9:.4g} GB/s read and written; matmul "
        + ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in roof["matmul"].items()),
    ]
    if busy(result):
        lines.append(f"THE MACHINE WAS BUSY (load {e['load'][0]} on {m['cores']} cores): do not trust these figures.")
    absent = [f"{name} ({reason})" for name, reason in result["baselines"]["absent"].items()]
    lines.append(f"against {', '.join(result['baselines']['used'])}; absent: {', '.join(absent) or 'none'}")
    return "\n".join(lines)


def markdown(result: Record, pictures: Sequence[str]) -> str:
    e, m = result["environment"], result["method"]
    rows = []
    for r in measured(result):
        for name, v in r["variants"].items():
            low, _, high = quantiles(v["samples"], n=4, method="inclusive")
            value = None if name == "fused" else ratio(r, name)
            inclusive = ratio(r, name, "inclusive") if name != "fused" else None
            times = [min(v["samples"]), median(v["samples"]), low, high]
            row = [r["name"], name, *map(seconds_text, times), len(v["samples"]), ratio_text(value)]
            row += [f"{roofline_fraction(r, name):.0%}", f"{r['bytes'] / times[1] / 1e9:.3g}"]
            if e["device_type"] == "cuda":
                row += [seconds_text(median(v["inclusive"])), ratio_text(inclusive), bytes_text(v["peak"])]
            else:
                row += [f"{v['faults']:.3g}"]
            rows.append([*row, r["notes"].get(name, "")])
    head = ["case", "variant", "min", "median", "q1", "q3", "samples", "its time / ours [95%]", "of roofline", "GB/s"]
    cuda_head = ["with host", "with host: its time / ours", "peak memory"]
    head += cuda_head if e["device_type"] == "cuda" else ["page faults a call"]
    text = ["# Benchmark", headline(result).replace("\n", "  \n")]
    if wrong := wrong_text(result):
        text += ["## No figures", wrong]
    text += ["## Where we lose", losses_text(result), "## Summary", summary(result), pivots(result)]
    text += ["## Who served the cases", providers_text(result)]
    text += ["## Pictures", *(f"![{name}]({name})" for name in pictures)] if pictures else []
    text += ["## Method", *(f"- {key}: {value}" for key, value in m.items())]
    text += [f"- environment, {key}: {value}" for key, value in e.items()]
    text += [f"- left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    refused = Counter(note for r in measured(result) for note in r["notes"].items() if note[0] not in r["variants"])
    text += [f"- {name} gives no figure for {n} cases: {reason}" for (name, reason), n in refused.items()]
    text += ["## Every measurement", table([*head, "note"], rows)]
    joined = "\n\n".join(text)
    return joined.replace("\n\n- ", "\n- ") + "\n"


# --- comparison ---


def compare(old: Record, new: Record) -> tuple[str, int]:
    """A table of what changed beyond the spread, relative to eager in the same run, and how many became slower.

    A change counts where the two 95% intervals do not meet, and medians and fastest samples differ by over CHANGE.
    """
    before = {r["name"]: r for r in old["cases"]}
    rows, slower = [], 0
    shared = [r for r in new["cases"] if r["name"] in before]
    for record in shared:
        earlier = before[record["name"]]
        statuses = earlier["status"], record["status"]
        if statuses != ("measured", "measured"):
            if statuses[0] != statuses[1]:
                slower += statuses[0] == "measured"
                rows.append([record["name"], statuses[1].upper(), "-", "-", "-", f"was {statuses[0]}"])
            continue
        for key in ("samples", "inclusive"):
            a, b = ratio(earlier, key=key), ratio(record, key=key)
            if a is None or b is None or not (a[2] < b[1] or b[2] < a[1]):
                continue
            changes = b[0] / a[0], b[3] / a[3]
            if not (max(changes) < 1 / CHANGE or min(changes) > CHANGE):
                continue
            worse = b[0] < a[0]
            slower += worse
            times = [seconds_text(median(r["variants"]["fused"][key])) for r in (earlier, record)]
            row = [record["name"], "SLOWER" if worse else "faster", f"{changes[0]:.2f}", ratio_text(a), ratio_text(b)]
            rows.append([*row, " -> ".join(times)])
    head = ["case", "verdict", "new / old", "eager / ours, old", "eager / ours, new", "our time"]
    lines = [f"Compared {len(shared)} cases with {old['environment']['commit']} of {old['environment']['date']}."]
    if old["environment"]["device"] != new["environment"]["device"]:
        lines.append(f"The old run was on another device, {old['environment']['device']}.")
    if busy(old) or busy(new):
        lines.append("The machine was busy in one of the runs: changes may be the work of others.")
    missing = len(old["cases"]) - len(shared), len(new["cases"]) - len(shared)
    if any(missing):
        lines.append(f"Only in the old run: {missing[0]} cases; only in the new one: {missing[1]}.")
    lines.append(f"{len(rows) or 'None'} changed beyond the spread, {slower} for the worse.")
    return "\n".join(lines) + (f"\n\n{table(head, rows)}" if rows else ""), slower


# --- plots ---

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
        pick = {name: lambda r, v=v: (roofline_fraction(r, v),) * 3 if v in r["variants"] else None for name, v in both}
        title = f"Fraction of the roofline (a device copy of the same bytes), {DIRECTION_TITLES[direction]}"
        names.append(
            _panels(result, records, pick, title, "time of the copy / time", f"roofline-{direction}.png", folder)
        )
        if any("peak" in r["variants"]["fused"] for r in records):
            title = f"Peak memory beside the inputs, {DIRECTION_TITLES[direction]}"
            pick = {"": lambda r: (r["variants"]["fused"]["peak"] / max(r["variants"]["eager"]["peak"], 1),) * 3}
            names.append(_panels(result, records, pick, title, "fusednorm / eager", f"memory-{direction}.png", folder))
    return [name for name in names if name]


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
    figure.suptitle(f"{title}\n{e['device']}, torch {e['torch']}, commit {e['commit'] or 'unknown'}", fontsize=11)
    figure.supylabel(label, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.savefig(folder / name, dpi=110)
    return name


# --- files ---


def write(result: Record, folder: Path) -> list[Path]:
    """Write benchmark.json, benchmark.md and, where matplotlib is there, the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots(result, folder)
    (folder / "benchmark.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    (folder / "benchmark.md").write_text(markdown(result, pictures or []), encoding="utf-8")
    if pictures is None:
        print("no pictures: matplotlib is not installed", file=sys.stderr)
    return [folder / "benchmark.json", folder / "benchmark.md", *(folder / name for name in pictures or [])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the page again from raw data.")
    parser.add_argument("result", type=Path, help="a JSON file that run.py wrote")
    parser.add_argument("--report", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    for path in write(json.loads(arguments.result.read_text(encoding="utf-8")), arguments.report):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
