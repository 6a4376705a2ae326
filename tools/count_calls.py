"""Counts the Python calls that the package makes for one call of a user, and the files they cross.

    python3 -m tools.count_calls

A reader of a traceback follows these calls. `returns` counts how often a file is entered again after it was left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import fusednorm
from benchmarks.report.table import table
from fusednorm.dispatch import settings

PACKAGE = str(Path(fusednorm.__file__).parent)


class Count(NamedTuple):
    calls: int
    files: int
    returns: int


def count(call: Callable[[], Any]) -> Count:
    """Python frames of the package in one call, after two that fill its caches."""
    call()
    call()
    entered: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            entered.append(frame.f_code.co_filename)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    visits = [name for i, name in enumerate(entered) if i == 0 or entered[i - 1] != name]
    return Count(len(entered), len(set(entered)), len(visits) - len(set(visits)))


def add_layer_norm() -> None:
    x = torch.ones(4, 64, requires_grad=True)
    normed, residual = fusednorm.add_layer_norm(x, x, 64, layer_scale=torch.ones(64))
    (normed.sum() + residual.sum()).backward()


def causal_attention() -> None:
    q = torch.ones(2, 4, 16, 8)
    fusednorm.scaled_dot_product_attention(q, q, q, is_causal=True)


def encoder_layer() -> Callable[[], None]:
    layer = fusednorm.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    x = torch.ones(2, 8, 32)
    return lambda: layer(x).sum().backward()


def main() -> int:
    with settings.without_fastpath():
        found = {
            "add_layer_norm with layer scale, without the fast path, forward and backward": count(add_layer_norm),
            "causal attention, without the fast path": count(causal_attention),
        }
    found["encoder layer, training step"] = count(encoder_layer())
    print(table(["call", *Count._fields], [[name, *counted] for name, counted in found.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
