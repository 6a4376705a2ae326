"""Judge the two curves and write them down: JSON, Markdown, PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
# Where it comes from: both variants compute the same function and differ only in where and in which order they round.
# Training amplifies that as it would any change of the last bit, so the bound is measured, not derived. With --small on
# a CPU, against torch's layers: float32 at most 8.6e-7 (2 seeds, native and hand-written kernels, 2 to 4 epochs; 1.1e-5
# at one step), bfloat16 4.7e-4 (1 epoch; 9.5e-3 at a step). The bound leaves orders of magnitude for other kernels,
# larger models and longer runs, and is still narrow enough to see an error as small as eps = 1e-6 instead of 1e-5 in
# the norms, which moves the float32 losses by 5e-3 in the first epoch.
BOUNDS = {"float32": 1e-3, "bfloat16": 2e-2}


def plot(report: dict[str, Any], path: Path) -> bool:
    """Draw both curves and their difference; return False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    curves, bound = report["curves"], report["checks"]["bound"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, curves)
    left.axhline(report["unigram_loss"], color="0.4", linestyle=":", label="unigram baseline, test")
    left.set(xlabel="epoch", ylabel="loss (nats per token)", title="Loss")
    left.legend()
    draw_differences(right, curves, bound)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    below = [f"calls of a fused forward: {calls_text(report)}", report["environment"]["device"], busy_text(report)]
    report_plots.set_title(figure, report["title"], below)
    figure.savefig(path, dpi=130)
    return True


def summary(report: dict[str, Any]) -> str:
    """The Markdown report, which is also what the terminal shows."""
    data, checks, quality = report["data"], report["checks"], report["quality"]
    curves = report["curves"]
    lines = [
        f"# {report['title']}",
        "",
        *(part for text in notices(report) for part in (text, "")),
        f"Text: {data['source']}, {data['train_tokens']:,} tokens to train on, {data['test_tokens']:,} to test on, "
        f"vocabulary {data['vocab']:,}; {data['repeated_characters']:,} characters of repeated paragraphs left out.",
        f"Model: {report['parameters']:,} parameters; {json.dumps(report['model'])}.",
        f"Training: {json.dumps(report['settings'])}.",
        f"Machine: {report['environment']['device']}; torch {report['environment']['torch']}, "
        f"threads: {report['environment']['threads']}; while speed was measured, CPU time of other processes: "
        f"{measure_load.share_text(report['environment']['others'])}.",
        f"Calls of one forward of the fused model: {calls_text(report)}.",
        *refusal_lines(report),
        "",
        table(("", "eager", "fused", "fused / eager"), result_rows(report)),
        "",
        epoch_table(curves),
        "",
        agreement(report),
        f"- Checkpoint reloaded with `weights_only=True`: test loss {checks['reloaded_test_loss']!r}, "
        f"{'bitwise equal' if checks['reload_equal'] else 'NOT EQUAL to ' + repr(curves['fused']['test'][-1])}.",
        f"- Test perplexity {quality['perplexity']:.1f} per token; always predicting the token frequencies gives "
        f"{quality['unigram_perplexity']:.1f}. Bits per byte: {quality['bits_per_byte']:.3f}, "
        f"unigram {quality['unigram_bits_per_byte']:.3f}.",
        f"- {report['notes']}",
        "",
        "A sample (prompt from the test text, then the model's own words):",
    ]
    sample = f"{report['sample']['prompt']} [...] {report['sample']['continuation']}"
    return "\n".join([*map(wrapped, lines), "", "```text", sample, "```", ""])


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write train.json, train.md and, where matplotlib is there, train_curves.png."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "train_curves.png"
    drawn = plot(report, picture)
    text = summary(report) + (f"\n![Loss curves]({picture.name})\n" if drawn else "")
    (folder / "train.md").write_text(text, encoding="utf-8")
    (folder / "train.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return [folder / "train.json", folder / "train.md", *([picture] if drawn else [])]
