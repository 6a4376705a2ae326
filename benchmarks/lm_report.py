"""Judge the two curves and write them down: JSON, Markdown, PNG."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import measure_load, report_plots, report_stats

# Largest allowed difference of the two variants' losses, nats a token, at any epoch.
#
# Where it comes from: both variants compute the same function and differ only in where and in which order they round.
# Training amplifies that as it would any change of the last bit, so the bound is measured, not derived. With --small on
# a CPU, the hand-written reference provider against eager: float32 at most 3.5e-6 (2 seeds, 4 epochs; 1.7e-5 at one
# step; with dropout 0.1, 125 steps: 7e-7), bfloat16 2.4e-4 (125 steps; 5.5e-3 at a step). The bound leaves about two
# orders of magnitude for other kernels, larger models and longer runs, and is still narrow enough to see an error as
# small as eps = 1e-6 instead of 1e-5 in the fused norm, which moves the float32 losses by 5e-3 in the first epoch.
BOUNDS = {"float32": 1e-3, "bfloat16": 2e-2}


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


def plot(report: dict[str, Any], path: Path) -> bool:
    """Draw both curves and their difference; return False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    curves, bound = report["curves"], report["checks"]["bound"]
    epochs = len(curves["eager"]["train"])
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    # Eager is drawn wide and pale under fused: where the two agree, both stay visible.
    styles = {
        "eager": {"linewidth": 6, "alpha": 0.35, "marker": "o", "markersize": 10},
        "fused": {"linewidth": 1.6, "marker": "o", "markersize": 4},
    }
    for variant in ("eager", "fused"):
        curve = curves[variant]
        left.plot(range(1, epochs + 1), curve["train"], color="tab:blue", label=f"{variant}, train", **styles[variant])
        left.plot(range(epochs + 1), curve["test"], color="tab:orange", label=f"{variant}, test", **styles[variant])
    left.axhline(report["unigram_loss"], color="0.4", linestyle=":", label="unigram baseline, test")
    left.set(xlabel="epoch", ylabel="loss (nats per token)", title="Loss")
    left.legend()
    steps = [abs(a - b) for a, b in zip(curves["fused"]["steps"], curves["eager"]["steps"])]
    right.set(xlabel="training step", ylabel="|fused − eager| (nats per token)", title="Difference of the losses")
    drawn = [(step, value) for step, value in enumerate(steps, 1) if value > 0]
    right.axhline(bound, color="tab:red", linestyle="--", label=f"bound on epochs: {bound:g}")
    if drawn:
        # no line: it would pass over steps where the two are equal, which a logarithm cannot show
        right.semilogy(*zip(*drawn), ".", color="tab:green", markersize=4, label="a step's training batch")
        zeros = len(steps) - len(drawn)
        if zeros:
            right.plot([], [], " ", label=f"exactly equal at {zeros} of {len(steps)} steps")
    else:
        right.set(xlim=(0, len(steps)), ylim=(0, 1.3 * bound))
        right.text(0.5, 0.4, f"exactly equal at all {len(steps)} steps", ha="center", transform=right.transAxes)
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    below = [f"fused here: {served_text(report)}", report["environment"]["device"], busy_text(report)]
    report_plots.set_title(figure, report["title"], below)
    figure.savefig(path, dpi=130)
    return True


def served_text(report: dict[str, Any]) -> str:
    return report_stats.served([report["environment"]["route"]])


def notices(report: dict[str, Any]) -> list[str]:
    """What a reader must know before any figure."""
    environment, found = report["environment"], []
    if report_stats.no_kernel([environment["route"]]):
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


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in [header, *rows]]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def summary(report: dict[str, Any]) -> str:
    """The Markdown report, which is also what the terminal shows."""
    data, checks, quality = report["data"], report["checks"], report["quality"]
    curves = report["curves"]
    epoch_rows = [
        (
            str(epoch),
            *(f"{curves[v]['train'][epoch - 1]:.5f}" if epoch else "–" for v in ("eager", "fused")),
            *(f"{curves[v]['test'][epoch]:.5f}" for v in ("eager", "fused")),
        )
        for epoch in range(len(curves["eager"]["test"]))
    ]
    verdict = "yes" if not checks["faults"] else "NO: " + "; ".join(checks["faults"])
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
        f"Fused norm: add_layer_norm is served by {served_text(report)}.",
        *(f"Provider {refusal}." for refusal in report["environment"]["route"]["refusals"]),
        "",
        table(("", "eager", "fused", "fused / eager"), result_rows(report)),
        "",
        table(("epoch", "train eager", "train fused", "test eager", "test fused"), epoch_rows),
        "",
        f"- Curves agree within {checks['bound']:g} nats/token: {verdict}; largest difference of an epoch "
        f"{checks['largest_difference']:.2g}.",
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


def wrapped(line: str) -> str:
    """Running text broken for a terminal; tables and commands stay as they are."""
    if line.startswith(("|", "    ", "#")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def write(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write train.json, train.md and, where matplotlib is there, train_curves.png."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "train_curves.png"
    drawn = plot(report, picture)
    text = summary(report) + (f"\n![Loss curves]({picture.name})\n" if drawn else "")
    (folder / "train.md").write_text(text, encoding="utf-8")
    (folder / "train.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return [folder / "train.json", folder / "train.md", *([picture] if drawn else [])]
