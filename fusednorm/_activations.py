"""The activations of ``bias_act_dropout``: the one table for the package, its benchmarks and its code-generation gates.

``csrc/common/activations.h`` is the same table in C++. ``tests/activation/test_table.py`` compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Activation(NamedTuple):
    name: str
    number: int  # among the options of the native operators
    torch_function: Callable[[Tensor], Tensor]  # a function of a module: layers that have it are pickled
    flops: tuple[int, int]  # of an element, forward and backward, as benchmarks/cases/activation.py counts them
    # (linear, cubic) of u sigmoid(w), w = u (linear + cubic u^2); None where it is no such product
    sigmoid: tuple[float, float] | None = None
    torch_module: type[nn.Module] | None = None  # torch's class that computes it and has no arguments that matter


def gelu_tanh(u: Tensor) -> Tensor:
    return F.gelu(u, approximate="tanh")


def quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(1.702 * u)


_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)  # tanh(v) is 2 sigmoid(2 v) - 1

TABLE = (
    Activation("relu", 0, torch.relu, (2, 4), torch_module=nn.ReLU),
    Activation("gelu", 1, F.gelu, (6, 13)),
    Activation("gelu_tanh", 2, gelu_tanh, (10, 20), (_LINEAR, 0.044715 * _LINEAR)),
    Activation("silu", 3, F.silu, (4, 10), (1.0, 0.0), nn.SiLU),
    Activation("quick_gelu", 4, quick_gelu, (5, 12), (1.702, 0.0)),
)

ACTIVATIONS = {activation.name: activation for activation in TABLE}
GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # by the argument `approximate` of torch's
FUNCTIONS = {activation.name: activation.torch_function for activation in TABLE}
# nn.GELU, whose `approximate` decides, is not among them: GELUS has its names.
MODULES = {activation.torch_module: activation.name for activation in TABLE if activation.torch_module}


def sigmoid_form(name: str) -> tuple[float, float]:
    """(linear, cubic) of an activation for which a kernel has no form of its own."""
    form = ACTIVATIONS[name].sigmoid
    if form is None:
        raise NotImplementedError(f"activation: {name!r} is not u sigmoid(w), and has no kernel of its own here")
    return form
