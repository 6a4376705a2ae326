"""Judge the two runs of the task translate and write them down: JSON, Markdown, PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import train_report
from benchmarks.measure import load as measure_load
from benchmarks.report import plots as report_plots
from benchmarks.train_report import (
    agreement,
    busy_text,
    calls_text,
    draw_differences,
    draw_losses,
    epoch_table,
    notices,
    refusal_lines,
    result_rows,
    table,
    wrapped,
)

# Largest allowed difference of the two variants' losses, nats a token, at any epoch, without dropout.
#
# Where it comes from: the variants compute one function and differ in where and in which order they round, which
# training amplifies; so it is measured. With --small on a CPU, native kernels against eager: float32 at most 4.6e-7
# (2 seeds, 9 epochs), and 1.6e-4 in the worst of the settings that were tried (rate 2e-3, a vocabulary of 4000);
# bfloat16 1.4e-2 (2 epochs). An error like GELU's tanh form in place of erf moves the float32 losses by 1e-3 within
# four epochs.
BOUNDS = {"float32": 5e-4, "bfloat16": 1e-1}

NAMES = {
    "untrained": "model before training",
    "nearest": "nearest training source",
    "eager": "eager, trained",
    "fused": "fused, trained",
}


def verdict(curves: dict[str, dict[str, list[float]]], dtype: str, dropout: float) -> dict[str, Any]:
    return train_report.verdict(curves, BOUNDS[dtype], dropout)


def plot_curves(report: dict[str, Any], path: Path) -> bool:
    """Draw both curves and their difference; return False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, report["curves"])
    left.set(xlabel="epoch", ylabel="loss (nats per token)", title="Loss", ylim=(0, None))
    left.legend()
    draw_differences(right, report["curves"], report["checks"]["bound"])
    right.margins(y=0.3)  # room for the legend
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    report_plots.set_title(figure, report["title"], subtitles(report))
    figure.savefig(path, dpi=130)
    return True


def plot_scores(report: dict[str, Any], path: Path) -> bool:
    """Draw chrF over all held-out pairs and over those of each package; return False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    scores = report["scores"]
    origins = scores["fused"]["by_origin"]
    groups = [f"all ({report['data']['test_pairs']} pairs)"]
    groups += [f"{origin} ({entry['pairs']} pairs)" for origin, entry in origins.items()]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(NAMES)
    for place, (name, label) in enumerate(NAMES.items()):
        values = [scores[name]["chrf"], *(scores[name]["by_origin"][origin]["chrf"] for origin in origins)]
        left = [group + (place - (len(NAMES) - 1) / 2) * width for group in range(len(groups))]
        colour = {"untrained": "0.7", "nearest": "tab:gray", "eager": "tab:blue", "fused": "tab:orange"}[name]
        bars = axes.bar(left, values, width * 0.95, label=label, color=colour)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(xlabel="where the held-out pairs come from", ylabel="chrF (0 to 100, higher is better)")
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=2)
    title = "English to Chinese: chrF of greedy translations of held-out sentences"
    report_plots.set_title(figure, title, subtitles(report)[:2])
    figure.savefig(path, dpi=130)
    return True


def subtitles(report: dict[str, Any]) -> list[str | None]:
    return [f"calls of a fused forward: {calls_text(report)}", report["environment"]["device"], busy_text(report)]


def score_table(report: dict[str, Any]) -> str:
    origins = list(report["scores"]["fused"]["by_origin"])
    rows = [
        (
            label,
            f"{entry['chrf']:.1f}",
            *(f"{entry['by_origin'][origin]['chrf']:.1f}" for origin in origins),
            f"{entry['exact']:.0%}",
        )
        for label, entry in ((label, report["scores"][name]) for name, label in NAMES.items())
    ]
    return table(("translation by", "chrF", *(f"chrF, {origin}" for origin in origins), "equal to reference"), rows)


def example_table(report: dict[str, Any]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|") or "(nothing)"

    rows = [
        tuple(cell(example[name]) for name in ("source", "reference", "fused", "nearest"))
        for example in report["examples"]
    ]
    return table(("source", "reference", "fused, trained", "nearest training source"), rows)


def summary(report: dict[str, Any]) -> str:
    """The Markdown report, which is also what the terminal shows."""
    data, checks, environment = report["data"], report["checks"], report["environment"]
    reload = "bitwise equal" if checks["reload_equal"] else f"NOT EQUAL to {report['curves']['fused']['test'][-1]!r}"
    gain = report["scores"]["fused"]["chrf"] - report["scores"]["nearest"]["chrf"]
    sources = ", ".join(f"{origin} {count:,}" for origin, count in data["by_origin"].items())
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in data["left_out"].items())
    lines = [
        f"# {report['title']}",
        "",
        *(part for text in notices(report) for part in (text, "")),
        f"- Pairs: {data['train_pairs']:,} to train on ({data['train_tokens']:,} target tokens), "
        f"{data['test_pairs']:,} held out; by package: {sources}. Left out: {left_out}; at most {data['length']} "
        "characters a side.",
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
        score_table(report),
        "",
        agreement(report),
        f"- Checkpoint reloaded with `weights_only=True`: test loss {checks['reloaded_test_loss']!r}, {reload}.",
        f"- chrF of the fused model is {abs(gain):.1f} {'above' if gain >= 0 else 'BELOW'} that of the nearest "
        "training source's translation.",
        "- chrF counts the n-grams of 1 to 6 characters that translation and reference share, from 0 to 100. The "
        "nearest training source is the one most like the held-out source; its translation is taken as it stands.",
        "- Speed: target tokens over the time of all training steps, the two variants alternating in one process.",
        "",
        "Held-out sentences, taken at equal distances:",
        "",
        example_table(report),
    ]
    return "\n".join([*map(wrapped, lines), ""])


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write translate.json, translate.md and, where matplotlib is there, two pictures: translate_{curves,chrf}.png."""
    folder.mkdir(parents=True, exist_ok=True)
    curves, scores = folder / "translate_curves.png", folder / "translate_chrf.png"
    drawn = [path for path, draw in ((curves, plot_curves), (scores, plot_scores)) if draw(report, path)]
    captions = {curves: "Loss curves", scores: "chrF"}
    text = summary(report) + "".join(f"\n![{captions[path]}]({path.name})\n" for path in drawn)
    (folder / "translate.md").write_text(text, encoding="utf-8")
    content = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "translate.json").write_text(content, encoding="utf-8")
    return [folder / "translate.json", folder / "translate.md", *drawn]
