"""What every operation that is measured has: inputs, results, and who computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import fusednorm

Call = Callable[[], tuple[Tensor, ...]]
Leaves = Mapping[str, Tensor]


class Operation(ABC):
    """One operation of a family, in the variants that are compared, with its byte and FLOP models."""

    name: str
    family: str  # which of a sweep's shapes it is measured at
    dropout_p: float

    @property
    def draws_mask(self) -> bool:
        return self.dropout_p > 0.0

    @abstractmethod
    def inputs(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that receives a gradient."""

    def values(self, name: str, normal: Tensor) -> Tensor:
        """A leaf from normal numbers."""
        return 1.5 * normal + 0.25

    def outputs(self) -> tuple[str, ...]:
        return ("out",)

    def mask_of(self, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor | None:
        """The elements that `fused` keeps with this seed; None without dropout."""
        return fusednorm.dropout_mask(shape, self.dropout_p, seed, device) if self.draws_mask else None

    @abstractmethod
    def twin(self, t: Leaves, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Eager arithmetic in the dtype of `t`, float64 included, with a given dropout mask."""

    @abstractmethod
    def eager(self, t: Leaves) -> Call:
        """What a user of plain torch writes."""

    @abstractmethod
    def fused(self, t: Leaves, seed: int | None = None) -> Call:
        """The package's function. Without `seed` it draws one each call, as a user's call does."""

    @abstractmethod
    def traffic(self, shape: tuple[int, ...], itemsize: int) -> tuple[int, int, int]:
        """Bytes of a forward, of a backward, and of what a forward writes for a backward beside its results.

        The least: each input read once, each result written once.
        """

    def bytes_moved(self, shape: tuple[int, ...], itemsize: int, direction: str) -> int:
        forward, backward, kept = self.traffic(shape, itemsize)
        return {"forward": forward, "backward": backward, "both": forward + kept + backward}[direction]

    @abstractmethod
    def arithmetic(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Float operations of a forward and of a backward."""

    def flops(self, shape: tuple[int, ...], direction: str) -> int:
        forward, backward = self.arithmetic(shape)
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    def flop_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype whose matmul rate bounds the arithmetic."""
        return dtype

    @abstractmethod
    def memory_needed(self, shape: tuple[int, ...], itemsize: int) -> int:
        """An upper estimate of the bytes that checking and measuring take."""
