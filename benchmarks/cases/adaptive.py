"""Norms with a gate, a scale and a shift for each sample: what a block of a diffusion transformer does twice."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm
from benchmarks.cases.base import Call, Leaves, Operation

EPS = 1e-6


@dataclass(frozen=True)
class AdaptiveNorm(Operation):
    """z = residual + gate * x, and its norm times 1 + scale, plus shift, on (samples, tokens, width).

    Without `add` it is the norm of x alone, scaled and shifted. The modulation is (samples, width).
    """

    name: str
    rms: bool = False
    add: bool = True
    family = "adaptive"
    dropout_p = 0.0

    def inputs(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        samples, _, width = shape
        rows = ("x", "residual") if self.add else ("x",)
        modulation = ("gate", "scale", "shift") if self.add else ("scale", "shift")
        return dict.fromkeys(rows, shape) | dict.fromkeys(modulation, (samples, width))

    def values(self, name: str, normal: Tensor) -> Tensor:
        """A leaf from normal numbers."""
        return 1.5 * normal + 0.25 if name in ("x", "residual") else 0.5 * normal

    def outputs(self) -> tuple[str, ...]:
        return ("normed", "residual_out") if self.add else ("normed",)

    def twin(self, t: Leaves, mask: Tensor | None) -> tuple[Tensor, ...]:
        return self.eager(t)()

    def eager(self, t: Leaves) -> Call:
        """The statements of diffusers' blocks."""
        x, residual, gate, scale, shift = (t.get(name) for name in ("x", "residual", "gate", "scale", "shift"))
        norm, shape = F.rms_norm if self.rms else F.layer_norm, x.shape[-1:]

        def add() -> tuple[Tensor, ...]:
            z = residual + gate.unsqueeze(1) * x
            return norm(z, shape, eps=EPS) * (1 + scale[:, None]) + shift[:, None], z

        def plain() -> tuple[Tensor, ...]:
            return (norm(x, shape, eps=EPS) * (1 + scale[:, None]) + shift[:, None],)

        return add if self.add else plain

    def fused(self, t: Leaves, seed: int | None = None) -> Call:
        function = fusednorm.add_rms_norm if self.rms else fusednorm.add_layer_norm
        x, residual, gate, scale, shift = (t.get(name) for name in ("x", "residual", "gate", "scale", "shift"))
        width = x.shape[-1]
        if self.add:
            return lambda: function(x, residual, width, eps=EPS, gate=gate, scale=scale, shift=shift)
        return lambda: function(x, None, width, eps=EPS, scale=scale, shift=shift)[:1]

    def traffic(self, shape: tuple[int, ...], itemsize: int) -> tuple[int, int, int]:
        """As a norm's (`norm.py`). The backward reads x again for the gate's gradient, and writes two gradients."""
        samples, tokens, width = shape
        tensor, vector = math.prod(shape) * itemsize, samples * width * itemsize
        vectors = 3 if self.add else 2
        statistics = samples * tokens * 4 * (1 if self.rms else 2)
        forward = (4 if self.add else 2) * tensor + vectors * vector
        read = (4 if self.add else 2) * tensor + statistics + (2 if self.add else 1) * vector
        written = (2 if self.add else 1) * tensor + vectors * vector
        return forward, read + written, statistics

    def arithmetic(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """As a norm's (`norm.py`). Gate and addition cost 2 forward, and 4 backward."""
        forward, backward = (5 if self.rms else 7, 10 if self.rms else 13)
        return (forward + 2 * self.add) * math.prod(shape), (backward + 4 * self.add) * math.prod(shape)

    def flop_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype whose matmul rate bounds the arithmetic: norms compute in float32 whatever they read."""
        return torch.float32

    def memory_needed(self, shape: tuple[int, ...], itemsize: int) -> int:
        """An upper estimate of what checking and measuring take."""
        return math.prod(shape) * (16 * itemsize + 18 * 8)
