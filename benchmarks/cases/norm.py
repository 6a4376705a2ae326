"""Norms, plain or after the residual add, or after the whole epilogue."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm
from benchmarks.cases.base import Call, Leaves, Operation

DROPOUT_P = 0.1
EPS = 1e-5


@dataclass(frozen=True)
class Norm(Operation):
    """One of the four norms, plain or after the residual add, or after the whole epilogue.

    The epilogue is `residual + dropout(x + x_bias)`; results are (normed,) or (normed, the residual stream).
    """

    name: str
    rms: bool = False
    add: bool = False
    epilogue: bool = False
    family = "norm"

    @property
    def dropout_p(self) -> float:
        return DROPOUT_P if self.epilogue else 0.0

    def inputs(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        sizes = {"x": shape}
        if self.add:
            sizes["residual"] = shape
        sizes["weight"] = shape[-1:]
        if not self.rms:
            sizes["bias"] = shape[-1:]
        if self.epilogue:
            sizes["x_bias"] = shape[-1:]
        return sizes

    def values(self, name: str, normal: Tensor) -> Tensor:
        """A leaf from normal numbers: weights around 1."""
        return 1 + 0.2 * normal if name == "weight" else 1.5 * normal + 0.25

    def outputs(self) -> tuple[str, ...]:
        return ("normed", "residual_out") if self.add else ("normed",)

    def _norm(self) -> Callable[..., Tensor]:
        return F.rms_norm if self.rms else F.layer_norm

    def _settings(self, t: Leaves) -> tuple[Any, ...]:
        """What follows the tensors in a call. Every variant is called with it, so that none pays more for its form."""
        shape, weight = tuple(t["weight"].shape), t["weight"]
        return (shape, weight, EPS) if self.rms else (shape, weight, t["bias"], EPS)

    def twin(self, t: Leaves, mask: Tensor | None) -> tuple[Tensor, ...]:
        z, norm, settings = t["x"], self._norm(), self._settings(t)
        if self.epilogue:
            z = torch.where(mask, (z + t["x_bias"]) * (1.0 / (1.0 - DROPOUT_P)), 0.0)
        if self.add:
            z = t["residual"] + z
        normed = norm(z, *settings)
        return (normed, z) if self.add else (normed,)

    def eager(self, t: Leaves, dropout_p: float = DROPOUT_P) -> Call:
        x, residual, x_bias = t["x"], t.get("residual"), t.get("x_bias")
        norm, settings = self._norm(), self._settings(t)

        def epilogue() -> tuple[Tensor, ...]:
            z = residual + F.dropout(x + x_bias, dropout_p)
            return norm(z, *settings), z

        def add() -> tuple[Tensor, ...]:
            z = residual + x
            return norm(z, *settings), z

        def plain() -> tuple[Tensor, ...]:
            return (norm(x, *settings),)

        return epilogue if self.epilogue else add if self.add else plain

    def fused(self, t: Leaves, seed: int | None = None) -> Call:
        function = getattr(fusednorm, ("add_" if self.add else "") + ("rms_norm" if self.rms else "layer_norm"))
        x, residual, x_bias, settings = t["x"], t.get("residual"), t.get("x_bias"), self._settings(t)
        if self.epilogue:
            return lambda: function(x, residual, *settings, x_bias=x_bias, dropout_p=DROPOUT_P, seed=seed)
        if self.add:
            return lambda: function(x, residual, *settings)
        return lambda: (function(x, *settings),)

    def traffic(self, shape: tuple[int, ...], itemsize: int) -> tuple[int, int, int]:
        """The statistics are float32.

        A forward without gradients stores no statistics. The backward reads the cotangents and the kept stream. The
        gradient of a bare add is one tensor for both operands. No mask is stored.
        """
        rows, width = math.prod(shape[:-1]), shape[-1]
        tensor, parameter = rows * width * itemsize, width * itemsize
        n_parameters = 1 if self.rms else 2
        statistics = rows * 4 * (1 if self.rms else 2)
        forward = (4 if self.add else 2) * tensor + (n_parameters + self.epilogue) * parameter
        read = (3 if self.add else 2) * tensor + statistics + parameter
        written = (2 if self.epilogue else 1) * tensor + (n_parameters + self.epilogue) * parameter
        return forward, read + written, statistics

    def arithmetic(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Float additions and multiplications, per element (what is done once a row, and integer work, is left out).

        Forward LayerNorm 7: mean 1, centre 1, square and sum 2, scale 1, weight 1, bias 1; RMSNorm 4. Backward
        LayerNorm 13: x̂ 2, g = w dy 1, the two row sums 3, dz 4, dweight 2, dbias 1; RMSNorm 9. A residual adds 1 each
        way; bias and dropout's scale 2 each way.
        """
        extra = self.add + 2 * self.epilogue
        forward, backward = (4 if self.rms else 7) + extra, (9 if self.rms else 13) + extra
        return forward * math.prod(shape), backward * math.prod(shape)

    def flop_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype whose matmul rate bounds the arithmetic: norms compute in float32 whatever they read."""
        return torch.float32

    def memory_needed(self, shape: tuple[int, ...], itemsize: int) -> int:
        """An upper estimate of what checking and measuring take: float64 twins, and int64 words under a mask."""
        return math.prod(shape) * (12 * itemsize + 14 * 8 + (160 if self.epilogue else 0))
