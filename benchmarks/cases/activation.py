"""What is measured of `bias_act_dropout`: an operation in the form that `cases.operations` asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm
from benchmarks.cases.base import Call, Leaves, Operation
from fusednorm._activations import ACTIVATIONS, FUNCTIONS


@dataclass(frozen=True)
class Activation(Operation):
    """`dropout(act(x + bias))`, between the two linear layers of a feed-forward block."""

    name: str
    activation: str
    dropout_p: float = 0.0
    family = "feed_forward"

    def inputs(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"x": shape, "bias": shape[-1:]}

    def outputs(self) -> tuple[str, ...]:
        return ("y",)

    def twin(self, t: Leaves, mask: Tensor | None) -> tuple[Tensor, ...]:
        y = FUNCTIONS[self.activation](t["x"] + t["bias"])
        return (y if mask is None else torch.where(mask, y * (1.0 / (1.0 - self.dropout_p)), 0.0),)

    def eager(self, t: Leaves) -> Call:
        x, bias, function, p = t["x"], t["bias"], FUNCTIONS[self.activation], self.dropout_p
        if p:
            return lambda: (F.dropout(function(x + bias), p),)
        return lambda: (function(x + bias),)

    def fused(self, t: Leaves, seed: int | None = None) -> Call:
        x, bias, activation, p = t["x"], t["bias"], self.activation, self.dropout_p
        if p:
            return lambda: (fusednorm.bias_act_dropout(x, bias, activation, p, seed=seed),)
        return lambda: (fusednorm.bias_act_dropout(x, bias, activation),)

    def traffic(self, shape: tuple[int, ...], itemsize: int) -> tuple[int, int, int]:
        """No mask and no sum x + bias is stored."""
        tensor, parameter = math.prod(shape) * itemsize, shape[-1] * itemsize
        return 2 * tensor + parameter, 3 * tensor + 2 * parameter, 0

    def arithmetic(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Float operations, an erf or exponential counted as one (integer work is left out).

        Forward: the bias 1, and relu 1, or gelu's scale, erf, sum and two products 5. Backward: the bias, the product
        with dy and dbias 3, and relu's comparison 1, or gelu's two halves 10. The tanh form and silu are counted alike,
        a tanh as one. Dropout's scale 1 each way.
        """
        forward, backward = (count + self.draws_mask for count in ACTIVATIONS[self.activation].flops)
        return forward * math.prod(shape), backward * math.prod(shape)

    def flop_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype whose matmul rate bounds the arithmetic: it is done in float32 whatever is read."""
        return torch.float32

    def memory_needed(self, shape: tuple[int, ...], itemsize: int) -> int:
        """An upper estimate of what checking and measuring take: float64 twins, and int64 words under a mask."""
        return math.prod(shape) * (8 * itemsize + 10 * 8 + (160 if self.draws_mask else 0))
