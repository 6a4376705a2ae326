"""Which examples stand in a batch together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def buckets(lengths: Sequence[Any], size: int, seed: int | None = None) -> list[list[int]]:
    """Indices in batches of about equal length; the seed draws who stands with whom, and the order of the batches."""
    order = list(range(len(lengths)))
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    if generator is not None:
        order = torch.randperm(len(order), generator=generator).tolist()
    order.sort(key=lambda i: lengths[i])  # stable: equal lengths stay as drawn
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if generator is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches
