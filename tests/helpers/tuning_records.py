"""Records as a run of ``tune`` leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def record(shape: str, best: str, other: str = "torch", ratio: float = 1.5, operation: str = "add_layer_norm") -> dict:
    times = {"median": 10.0, "low": 9.0, "high": 11.0}
    providers = {best: times, other: {name: ratio * value for name, value in times.items()}}
    name = f"{operation}/float32/forward/{shape}"
    ratios = {other: [ratio, ratio - 0.1, ratio + 0.1]}
    return {"name": name, "rejected": {}, "prior": "torch", "providers": providers, "best": best, "ratios": ratios}


def with_forms(found: dict, place: str, tried: dict[str, tuple[list[int], float]]) -> dict:
    """The record, with the numbers of forms and how many times as fast as the table's they were."""
    entries = {
        name: {"numbers": numbers, "median": 10.0, "ratio": [ratio, ratio - 0.01, ratio + 0.01]}
        for name, (numbers, ratio) in {"table": ([], 1.0), **tried}.items()
    }
    return {**found, "forms": {"place": place, "rejected": {}, "tried": entries}}


def with_section(path: Path, forms: object) -> None:
    """Change the forms of a file that is there."""
    content = json.loads(path.read_text())
    content["forms"] = forms
    path.write_text(json.dumps(content))
