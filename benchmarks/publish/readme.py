"""Write the figures of README.md, docs/performance.md and docs/drop-in.md from the committed raw data.

python3 -m benchmarks.publish.readme            # all pages
python3 -m benchmarks.publish.readme --check    # exit status 1 where one does not follow the data
python3 -m benchmarks.publish.readme --picture  # docs/images/speedups.png too; it needs matplotlib
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import DIRECTION_TITLES
from benchmarks.publish import add_result, gains
from benchmarks.report.files import read_result, renew
from benchmarks.report.stats import NO_KERNEL, Group, Record, groups, groups_by_key, losses, measured, no_kernel, ratio
from benchmarks.report.table import table

README = Path(__file__).resolve().parents[2] / "README.md"
PERFORMANCE = README.parent / "docs" / "performance.md"
PICTURE = README.parent / "docs" / "images" / "speedups.png"
SHOWN = ("float32", "bfloat16")  # dtypes of the README; docs/performance.md has every dtype
# The README's rows, forward + backward, in the order of what a user would swap first.
SUMMARY = {
    "attention_dropout": "attention, causal, with dropout",
    "attention_causal": "attention, causal",
    "encoder_layer": "encoder layer",
    "bias_dropout_add_layer_norm": "bias + dropout + residual + LayerNorm",
    "bias_gelu_dropout": "bias + GELU + dropout",
    "add_layer_norm": "residual + LayerNorm",
    "rms_norm": "RMSNorm",
    "layer_norm": "LayerNorm",
}
# What a user's model gains: words, and the rows of memory.json (eager's, ours) or of models.json.
LAYERS = (
    ("two encoder layers with dropout, width 512", "torch.nn, float32", "fusednorm, float32"),
    ("the same, autocast to bfloat16", "torch.nn, autocast to bfloat16", "fusednorm, autocast to bfloat16"),
)
MODELS = (
    ("GPT-2 of two layers, width 768, accelerated", "gpt2"),
    ("BERT of two layers, width 768, accelerated", "bert"),
)
NOTE = "<!-- written by benchmarks/publish/readme.py from benchmarks/results: do not edit -->"
NO_GPU = """No GPU figures exist yet: no result of a GPU is among the raw data. With one, these commands make them:

- `python -m benchmarks.run --report bench-report` measures,
- `python -m benchmarks.publish.add_result bench-report/benchmark.json` puts the raw data where they are committed,
- `python -m benchmarks.publish.readme` writes the figures here."""
LEGEND = (
    "A cell is eager's time over ours, the geometric mean over the sizes [worst to best]; above 1 we are faster. After "
    "it is the median share of the roofline, a device copy of the bytes that must move. Each device has its newest "
    "result."
)


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def short_name(result: Record) -> str:
    """A device's name without marks and what every processor's has: "Intel Xeon 2.50GHz"."""
    words = result["environment"]["device"].replace("(R)", "").replace("(TM)", "").split()
    return " ".join(word for word in words if word not in ("CPU", "Processor", "@"))


def facts(result: Record) -> str:
    """Device, driver and versions."""
    e = result["environment"]
    driver = (result["method"].get("clocks before") or {}).get("driver_version")
    versions = [f"driver {driver}" if driver else "", f"CUDA {e['cuda']}" if e.get("cuda") else ""]
    versions += [f"torch {e['torch']}", f"triton {e['triton']}" if e["triton"] else "", f"Python {e['python']}"]
    threads = f"{result['method']['threads']} threads" if e["device_type"] == "cpu" else ""
    return ", ".join(filter(None, [f"**{e['device']}**", threads, *versions]))


def cell(group: Group | None) -> str:
    if group is None:
        return ""
    share = "" if group.fraction is None else f", {group.fraction:.0%}"
    return f"{group.mean:.2f} [{min(group.ratios):.2f} to {max(group.ratios):.2f}]{share}"


def figures(result: Record) -> str:
    """Operations and directions down, dtypes across."""
    found, dtypes = groups_by_key(result), _dtypes(result)
    rows = [
        [f"`{op}`, {DIRECTION_TITLES[direction]}", *(cell(found.get((op, direction, dtype))) for dtype in dtypes)]
        for op, direction in dict.fromkeys((op, direction) for op, direction, _ in found)
    ]
    return table(["", *dtypes], rows)


def where_we_lose(result: Record) -> str:
    found = losses(result)
    baselines = {name for r in measured(result) for name in r["variants"] if name != "fused"}
    compared = sum(
        ratio(r, name, key) is not None
        for r in measured(result)
        for name in baselines
        for key in ("samples", "inclusive")
    )
    if not found:
        return f"Where we lose: in none of {compared} comparisons, beyond the spread."
    record, baseline, what, value = found[0]
    return (
        f"Where we lose: in {len(found)} of {compared} comparisons, beyond the spread. Worst: `{record['name']}`, "
        f"{1 / value[0]:.2f} times as long as {baseline} ({what})."
    )


def section(path: Path, result: Record, root: Path) -> str:
    e, m = result["environment"], result["method"]
    where = os.path.relpath(path, root).replace(os.sep, "/")
    cases = f"{len(measured(result))} cases of the {m['level']} sweep, {len(result['left_out'])} left out"
    origin = f"{facts(result)}. Measured {e['date'][:10]}, commit `{e['commit']}`: {cases} ([raw data]({where}))."
    origin += f" {NO_KERNEL}" if no_kernel(measured(result)) else ""
    return "\n\n".join([wrapped(origin), figures(result), wrapped(where_we_lose(result))])


def steps(folder: Path = add_result.RESULTS) -> str:
    """The README's first table: training steps beside torch's, their speed and what they keep for the backward."""
    rows = []
    for words, theirs, ours in LAYERS:
        speed, share = gains.of_layers(theirs, ours, folder)
        rows.append([f"[{words}](benchmarks/results/memory.md)", f"{speed:.2f}x", f"{share:.0%}"])
    for words, name in MODELS:
        rows.append(
            [f"[{words}](benchmarks/results/models.md)", f"{gains.of_model(name, folder):.2f}x", "not measured"]
        )
    memory = read_result(folder / "memory.json")
    where = f"training step on {memory['threads']} threads of {memory['environment']['device']}"
    return NOTE + "\n\n" + table([where, "speed, against torch", "kept for the backward"], rows)


def summary(kept: Sequence[tuple[Path, Record]]) -> str:
    """The first table of docs/performance.md: mean speed-ups of a few operations on each device."""
    found = {path: groups_by_key(result) for path, result in kept}
    columns = [(path, short_name(result), dtype) for path, result in kept for dtype in SHOWN]
    rows = [
        [words, *(f"{g.mean:.2f}" if (g := found[path].get((op, "both", d))) else "" for path, _, d in columns)]
        for op, words in SUMMARY.items()
    ]
    legend = (
        "Eager's time divided by ours, forward and backward together: the geometric mean over all measured sizes, on "
        "2 threads. An empty cell was not measured."
    )
    return "\n\n".join(
        [NOTE, wrapped(legend), table(["", *(f"{device}, {dtype}" for _, device, dtype in columns)], rows)]
    )


def _dtypes(result: Record) -> list[str]:
    return list(dict.fromkeys(g.dtype for g in groups(result)))


def bars(kept: Sequence[tuple[Path, Record]]) -> dict[str, list[float | None]]:
    """What the picture shows: by dtype, the newest result's mean speed-ups in the order of SUMMARY."""
    found = groups_by_key(kept[0][1])
    return {
        dtype: [round(g.mean, 2) if (g := found.get((op, "both", dtype))) else None for op in SUMMARY]
        for dtype in SHOWN
    }


def draw(kept: Sequence[tuple[Path, Record]], path: Path) -> None:
    """A bar for each dtype. The PNG has the numbers as JSON in its text "Description"."""
    from matplotlib.figure import Figure

    _, result = kept[0]
    shown = bars(kept)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(shown)
    for i, (dtype, values) in enumerate(shown.items()):
        places = [row + (i - (len(shown) - 1) / 2) * height for row in range(len(SUMMARY))]
        drawn = axes.barh(places, [v or 0.0 for v in values], height, label=dtype, color=("#3b7dbd", "#f0a13a")[i])
        axes.bar_label(drawn, [f"{v:.2f}x" if v else "not measured" for v in values], padding=3, fontsize=10)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(SUMMARY)), SUMMARY.values(), fontsize=11)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("eager PyTorch's time / fusednorm's time (right of the line fusednorm is faster)", fontsize=11)
    threads = result["method"]["threads"]
    axes.set_title(f"Forward + backward on {result['environment']['device']}, {threads} threads: speed-up over eager")
    axes.legend(loc="lower right", fontsize=11, frameon=False)
    axes.margins(x=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white", metadata={"Description": json.dumps(shown)})


def block(kept: Sequence[tuple[Path, Record]], root: Path = README.parent) -> str:
    """What stands between the two marks of docs/performance.md."""
    parts = [NOTE]
    if all(result["environment"]["device_type"] == "cpu" for _, result in kept):
        parts.append(NO_GPU)
    if kept:
        parts.append(wrapped(LEGEND))
    parts += [section(path, result, root) for path, result in kept]
    return "\n\n".join(parts)


def replaced(text: str, new: str, name: str = "figures") -> str:
    """The text with another block between the marks of a name."""
    marks = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"{marks[0]} and {marks[1]} are not both there")
    return f"{before}{begin}\n{new}\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if there is a difference")
    parser.add_argument("--picture", action="store_true", help="draw docs/images/speedups.png too")
    arguments = parser.parse_args(argv)
    kept = add_result.newest()
    if arguments.picture:
        draw(kept, PICTURE)
    pages = (
        (README, "steps", steps()),
        (PERFORMANCE, "summary", summary(kept)),
        (PERFORMANCE, "figures", block(kept, PERFORMANCE.parent)),
        (gains.PAGE, "gains", f"{NOTE}\n\n{gains.block(kept)}"),
    )
    return max(
        renew(page, replaced(page.read_text(encoding="utf-8"), new, name), arguments.check) for page, name, new in pages
    )


if __name__ == "__main__":
    sys.exit(main())
