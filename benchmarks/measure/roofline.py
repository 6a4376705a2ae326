"""The shortest time that a device's copies and matmuls allow, measured in the same run."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusednorm.tuning.load import available_memory


@dataclass(frozen=True)
class Roofline:
    """Seconds of a device copy by the bytes it moves (read and written), and matmul rates, of this run."""

    copies: tuple[tuple[int, float], ...]
    matmul: Mapping[str, float]

    @property
    def bandwidth(self) -> float:
        """Of the largest copy, in bytes a second."""
        return self.copies[-1][0] / self.copies[-1][1]

    def copy_seconds(self, moved: int) -> float:
        """Time of a copy of the same size, interpolated: small ones are bound by launch, or run in a cache."""
        sizes = [size for size, _ in self.copies]
        at = bisect_left(sizes, moved)
        if at == 0:
            return self.copies[0][1]
        if at == len(sizes):
            return moved / self.bandwidth
        (low, fast), (high, slow) = self.copies[at - 1], self.copies[at]
        return fast * (slow / fast) ** (math.log(moved / low) / math.log(high / low))

    def seconds(self, moved: int, flops: int, dtype: torch.dtype) -> float:
        """The shortest time that copy and matmul rates allow."""
        rate = self.matmul.get(str(dtype).removeprefix("torch."))
        return max(self.copy_seconds(moved), flops / rate if rate else 0.0)


def measure_roofline(
    device: torch.device, timer: Any, moved_at_most: int, dtypes: Sequence[torch.dtype], seconds: float
) -> Roofline:
    """Copies up to the first size that moves more than any case, and a square matmul of each dtype."""
    largest, size = min(max(4 * moved_at_most, 1 << 20), 1 << 33), 4096 if device.type == "cuda" else 1024
    largest = min(largest, (available_memory(device) or 4 * largest) // 4)
    copies: list[tuple[int, float]] = []
    moved = 1 << 12
    while moved <= largest:
        source, target = (torch.zeros(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
        samples = timer.measure({"copy": lambda s=source, t=target: t.copy_(s)}, seconds)["copy"]["samples"]
        best = min(samples)  # a bound is what was reached at best, and to move less takes no longer
        copies = [(smaller, min(took, best)) for smaller, took in copies] + [(moved, best)]
        moved *= 4
        del source, target
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        samples = timer.measure({"matmul": lambda a=a, b=b: a @ b}, seconds)["matmul"]["samples"]
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / min(samples)
    return Roofline(tuple(copies), rates)
