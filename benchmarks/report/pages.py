"""From raw samples to tables, a Markdown page with plots, and a comparison of two runs.

python3 -m benchmarks.report.pages RESULT.json --report DIR    # the page again, from raw data
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles

from benchmarks.cases import DIRECTION_TITLES, OPS
from benchmarks.report import html_page
from benchmarks.report.files import make_folder, read_result
from benchmarks.report.plots import plots
from benchmarks.report.stats import (
    BELIEVABLE,
    LOSS,
    NO_KERNEL,
    PLAIN,
    Record,
    believable,
    busy,
    busy_text,
    bytes_text,
    directions_and_dtypes,
    fraction_text,
    groups,
    losses,
    measured,
    no_kernel,
    ratio,
    ratio_text,
    roofline_fraction,
    seconds_text,
    verdict,
)
from benchmarks.report.table import table
from fusednorm.tuning.load import share_text

CHANGE = 1.10  # addresses and clocks differ between two processes: smaller changes are none


PAGE_BAR = "\\|"  # in a page that is rendered, a bar would end the cell
SIZES = {"attention": "batch x heads x length x head dim", "layer": "batch x length x width"}
SIZES |= {"adaptive": "samples x tokens x width"}


def _families(rows: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """The operations there are, by kind: each kind has shapes of its own. Six columns fit a terminal."""
    families: dict[str, list[str]] = {}
    for name, op in OPS.items():
        if any(name in cells for cells in rows.values()):
            families.setdefault(op.family, []).append(name)
    return [names[i : i + 6] for names in families.values() for i in range(0, len(names), 6)]


def pivots(result: Record) -> str:
    """Time of ours and its ratio to eager: one table a direction, dtype and kind, shapes down, operations across."""
    parts = []
    for direction, dtype in directions_and_dtypes(result):
        records = [r for r in result["cases"] if (r["direction"], r["dtype"]) == (direction, dtype)]
        rows: dict[str, dict[str, str]] = {}
        for record in records:
            cell = record["status"].upper()
            if record["status"] == "measured":
                value = ratio(record)
                cell = seconds_text(median(record["variants"]["fused"]["samples"]))
                cell += f" {value[0]:.2f}x" if value else ""
            rows.setdefault(record["size"], {})[record["op"]] = cell
        for op, *group, size in (name.split("/") for name in result["left_out"]):
            if group == [direction, dtype]:
                rows.setdefault(size, {})[op] = "left out"
        title = f"{DIRECTION_TITLES[direction]}, {dtype}: time of fusednorm, and eager's time over it, by "
        for ops in _families(rows):
            head = ["size", *(op.replace("bias_dropout_add_", "epilogue_").removeprefix("attention_") for op in ops)]
            body = [[size, *(cells.get(op, "") for op in ops)] for size, cells in rows.items() if cells.keys() & ops]
            sizes = SIZES.get(OPS[ops[0]].family, "rows x width")
            parts.append(f"{title}{sizes}\n\n{table(head, body)}")
    return "\n\n".join(parts)


def kept_text(result: Record) -> str:
    """What a layer's forward keeps for its backward, inputs and parameters left out; empty without layers."""
    rows = []
    for record in measured(result):
        if kept := record.get("kept_bytes"):
            ours, theirs = kept["fused"], kept["eager"]
            rows.append([record["name"], bytes_text(theirs), bytes_text(ours), f"{ours / max(theirs, 1):.2f}"])
    return table(["case", "eager keeps", "fusednorm keeps", "ours / eager's"], rows) if rows else ""


def left_out_text(result: Record) -> str:
    """How many cases were not measured and why; the Markdown page names each."""
    counts = Counter((name.split("/")[0], reason) for name, reason in result["left_out"].items())
    reasons: dict[str, list[str]] = {}
    for (op, reason), count in counts.items():
        reasons.setdefault(reason, []).append(f"{count} {op}")
    lines = [f"Left out, {reason}: {', '.join(ops)}." for reason, ops in reasons.items()]
    return "\n".join(textwrap.fill(line, 120) for line in lines)


def summary(result: Record) -> str:
    rows = []
    for g in groups(result):
        figures = [f"{g.mean:.2f}", f"{min(g.ratios):.2f}", f"{max(g.ratios):.2f}"]
        share = f"{g.fraction:.0%}, best {max(g.fractions):.0%}" if g.fractions else "-"
        rows.append([g.op, g.direction, g.dtype, g.cases, *figures, share, g.cases - len(g.fractions)])
    head = ["operation", "direction", "dtype", "cases", "eager / ours", "worst", "best", "of roofline"]
    text = "Geometric mean, worst and best of eager's time over ours; median of the share of the roofline."
    if beyond := [r for r in measured(result) if not believable(r)]:
        head.append(f"> {BELIEVABLE:.0%}")
        most = max(beyond, key=roofline_fraction)
        text += (
            f"\n{len(beyond)} cases over {BELIEVABLE:.0%} of it (most: {roofline_fraction(most):.0%}, {most['name']})\n"
            "are not believable: the time of either, or of the copy or matmul they are held against, was disturbed.\n"
            "They do not count in its column, and no picture of the roofline shows them."
        )
    else:
        rows = [row[:-1] for row in rows]
    return f"{text}\n\n{table(head, rows)}"


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
    same = [i for i in (1, 5, 6) if len({row[i] for row in rows}) == 1]  # said once, and the table stays narrow
    limits += "".join(f"; {head[i]}: {rows[0][i]}" for i in same)
    head, *rows = ([cell for i, cell in enumerate(row) if i not in same] for row in [head, *rows])
    return f"{textwrap.fill(f'{len(found)} of the comparisons ({limits}):', 120)}\n\n{table(head, rows)}"


def conclusion(result: Record) -> str:
    """The verdict in a sentence or two for each baseline."""
    lines = []
    for baseline in dict.fromkeys(name for r in measured(result) for name in r["variants"] if name != "fused"):
        found = [(value, r) for r in measured(result) if (value := ratio(r, baseline)) is not None]
        verdicts = Counter(verdict(value) for value, _ in found)
        counts = ", ".join(f"{verdicts[v]} {v}" for v in ("faster", "equal within the spread", "slower"))
        extremes = min(found, key=lambda pair: pair[0][0]), max(found, key=lambda pair: pair[0][0])
        worst, best = (
            f"{value[0]:.2f}x in {r['name']}" + (" (within its spread)" if verdict(value) != clear else "")
            for (value, r), clear in zip(extremes, ("slower", "faster"))
        )
        lines.append(
            f"Against {baseline}, fusednorm is {counts}, of {len(found)} cases by {result['method']['timer']}. "
            f"Worst: {worst}; best: {best}."
        )
    missing = len(result["cases"]) - len(measured(result))
    lines += [f"{missing} cases were wrong or failed and have no figure."] if missing else []
    lines += [warning] if (warning := busy_text(result)) else []
    return "\n".join(textwrap.fill(line, 120) for line in lines)


def wrong_text(result: Record, bar: str = "|") -> str:
    rows = [[r["name"], r["status"].upper(), r["detail"]] for r in result["cases"] if r["status"] != "measured"]
    return table(["case", "verdict", "detail"], rows, bar) if rows else ""


def providers_text(result: Record) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for record in result["cases"]:
        rows.setdefault((record["provider"], record["how"]), []).append(record["op"])
    every = {record["op"] for record in result["cases"]}
    body = [
        [provider, how, len(ops), "all" if set(ops) == every else ", ".join(dict.fromkeys(ops))]
        for (provider, how), ops in rows.items()
    ]
    text = table(["served by", "how", "cases", "operations"], body)
    if any(how.startswith(PLAIN) for _, how in rows):
        text += (
            "\n\nWhere torch's own operators serve a call there is no kernel of ours: 1.0 is expected, less where host "
            "time\ncounts, and far less with dropout, whose reproducible mask is then made with integer operators."
        )
    return text


def headline(result: Record) -> str:
    e, m, roof = result["environment"], result["method"], result["roofline"]
    size, seconds = roof["copies"][-1]
    lines = [NO_KERNEL] if no_kernel(measured(result)) else []
    lines += [
        f"{e['device']}; torch {e['torch']}, triton {e['triton'] or 'absent'}, Python {e['python']}, {e['system']}",
        f"commit {e['commit'] or 'unknown'}, {e['date']}; {m['threads']} threads; CPU time of other "
        f"processes: {share_text(m.get('others'))}",
        f"copy of {bytes_text(size / 2)}: {size / seconds / 1e9:.4g} GB/s read and written; matmul "
        + ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in roof["matmul"].items()),
    ]
    if warning := busy_text(result):
        lines.append(warning)
    absent = [f"{name} ({reason})" for name, reason in result["baselines"]["absent"].items()]
    lines.append(f"against {', '.join(result['baselines']['used'])}; absent: {', '.join(absent) or 'none'}")
    return "\n".join(textwrap.fill(line, 120) for line in lines)


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
            row += [fraction_text(r, name), f"{r['bytes'] / times[1] / 1e9:.3g}"]
            if e["device_type"] == "cuda":
                row += [seconds_text(median(v["inclusive"])), ratio_text(inclusive), bytes_text(v["peak"])]
            else:
                row += [f"{v['faults']:.3g}"]
            rows.append([*row, r["notes"].get(name, "")])
    head = ["case", "variant", "min", "median", "q1", "q3", "samples", "its time / ours [95%]", "of roofline", "GB/s"]
    cuda_head = ["with host", "with host: its time / ours", "peak memory"]
    head += cuda_head if e["device_type"] == "cuda" else ["page faults a call"]
    text = ["# Benchmark", headline(result).replace("\n", "  \n")]
    if wrong := wrong_text(result, PAGE_BAR):
        text += ["## No figures", wrong]
    text += [
        "## Conclusion",
        conclusion(result).replace("\n", "  \n"),
        "## Where we lose",
        losses_text(result),
        "## Summary",
        summary(result),
        pivots(result),
    ]
    text += [left_out] if (left_out := left_out_text(result)) else []
    text += ["## Kept for the backward", kept] if (kept := kept_text(result)) else []
    text += ["## Who served the cases", providers_text(result)]
    text += ["## Pictures", *(f"![{name}]({name})" for name in pictures)] if pictures else []
    text += ["## Method", *(f"- {key}: {value}" for key, value in m.items())]
    text += [f"- environment, {key}: {value}" for key, value in e.items()]
    text += [f"- left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    refused = Counter(note for r in measured(result) for note in r["notes"].items() if note[0] not in r["variants"])
    text += [f"- {name} gives no figure for {n} cases: {reason}" for (name, reason), n in refused.items()]
    text += ["## Every measurement", table([*head, "note"], rows, PAGE_BAR)]
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


# --- files ---


def write(result: Record, folder: Path) -> list[Path]:
    """Write benchmark.json, benchmark.md, the pictures and benchmark.html, which holds them all; say what cannot be."""
    make_folder(folder)
    pictures = plots(result, folder)
    if pictures is None:
        print("no pictures: matplotlib is not installed", file=sys.stderr)
    text = markdown(result, pictures or [])
    page = html_page.page(text, folder, pictures or [])
    if page is None:
        print("no benchmark.html: markdown-it-py is not installed", file=sys.stderr)
    files = {"benchmark.json": json.dumps(result) + "\n", "benchmark.md": text, "benchmark.html": page}
    written = {folder / name: content for name, content in files.items() if content is not None}
    for path, content in written.items():
        path.write_text(content, encoding="utf-8")
    return [*written, *(folder / name for name in pictures or [])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the Markdown and HTML pages again, from raw data.")
    parser.add_argument("result", type=Path, help="a JSON file that run.py wrote")
    parser.add_argument("--report", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    for path in write(read_result(arguments.result), arguments.report):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
