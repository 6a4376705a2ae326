"""The table of docs/drop-in.md: what each swap gains, from the committed raw data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.publish.add_result import RESULTS
from benchmarks.report.files import read_result
from benchmarks.report.stats import Record, groups_by_key
from benchmarks.report.table import table

PAGE = RESULTS.parents[1] / "docs" / "drop-in.md"


def of_layers(theirs: str, ours: str, folder: Path = RESULTS) -> tuple[float, float]:
    """Of two rows of memory.json: how many times as fast a step is, and the share of the bytes that it keeps."""
    cases = {case["name"]: case for case in read_result(folder / "memory.json")["cases"]}
    a, b = cases[theirs], cases[ours]
    return a["seconds"] / b["seconds"], b["kept_bytes"] / a["kept_bytes"]


def of_model(name: str, folder: Path = RESULTS) -> float:
    """How many times as fast a step of an accelerated model of models.json is."""
    return next(row["ratio"] for row in read_result(folder / "models.json")["rows"] if row["model"] == name)


def step() -> str:
    """A training step of two encoder layers: time, and kept bytes."""
    faster, kept = of_layers("torch.nn, float32", "fusednorm, float32")
    return f"a step {faster:.2f} times as fast, which keeps {kept:.0%} of the bytes for its backward"


def models(*names: str) -> str:
    return f"a step {' and '.join(f'{of_model(name):.2f}' for name in names)} times as fast"


def operation(result: Record, op: str) -> str:
    means = [f"{groups_by_key(result)[op, 'both', dtype].mean:.2f}" for dtype in ("float32", "bfloat16")]
    return f"{means[0]} times as fast in float32, {means[1]} in bfloat16"


def block(kept: Sequence[tuple[Path, Record]]) -> str:
    """The operations are those of the newest sweep; all rows are from one machine, which a test sees to."""
    if not kept:
        return "Nothing was measured yet."
    _, result = kept[0]
    rows = [
        ["layers of `torch.nn`, trained with dropout", "the same layers of `fusednorm`", step()],
        ["BERT or GPT-2 of Hugging Face", "`accelerate(model)`", models("bert", "gpt2")],
        ["RMSNorm anywhere", "`rms_norm`", operation(result, "rms_norm")],
        ["a residual sum and its LayerNorm", "`add_layer_norm`", operation(result, "add_layer_norm")],
        ["a plain `nn.LayerNorm`, on an AMD CPU", "`layer_norm`", operation(result, "layer_norm")],
        ["a plain `nn.LayerNorm`, on another CPU", "nothing", "none: torch's own operator runs it"],
    ]
    where = f"gain, {result['environment']['device']}, {result['method']['threads']} threads"
    return table(["your model", "swap", where], rows, texts=3)
