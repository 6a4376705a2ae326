"""Records as a run of ``tune`` leaves them."""

from __future__ import annotations


def record(shape: str, best: str, other: str = "torch", ratio: float = 1.5, operation: str = "add_layer_norm") -> dict:
    times = {"median": 10.0, "low": 9.0, "high": 11.0}
    providers = {best: times, other: {name: ratio * value for name, value in times.items()}}
    name = f"{operation}/float32/forward/{shape}"
    ratios = {other: [ratio, ratio - 0.1, ratio + 0.1]}
    return {"name": name, "rejected": {}, "prior": "torch", "providers": providers, "best": best, "ratios": ratios}
