"""The native CPU provider of bias_act_dropout, and its dropout mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import providers
from . import cpu
from .cpu import refusal as refusal

_ACTIVATIONS = {"relu": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}


def reluctance(op: str, *args: Any) -> str | None:
    """Why automatic choice does not take a call that this provider could serve."""
    if args[4]:
        return None
    if args[1] is None:
        return "torch's own operators serve an activation with nothing to add"
    if torch.compiler.is_compiling():
        return "torch.compile fuses an addition and an activation into what stands around them"
    x, bias, _, activation, _ = args
    if providers.by_shape and x.dtype is bias.dtype:
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad)
        if torch_is_faster(x, activation, needs_grad):
            return "torch's own operators are faster on so few elements or columns"
    return None


def torch_is_faster(x: Tensor, activation: str, needs_grad: bool) -> bool:
    """Whether an addition and an activation of torch's beat this provider on x's shape.

    One thread of a shared machine: rows of 16 ran at 0.7 of eager's speed, and forward with backward at 0.8 on few
    elements (an autograd Function of Python's costs 20 microseconds), at 1.2 and more from 2**19 on. Torch's gelu is
    oneDNN's, which costs much to call (0.4 of this provider's speed on 256 elements) and is then the faster one (1.3 on
    2**16 to 2**19), until memory decides (0.5 on 2**24). In float64 libm computes an element at a time.
    """
    if x.size(-1) < 64 or (activation != "relu" and x.dtype is torch.float64):
        return True
    if activation == "gelu":
        n = x.numel()
        return n < 1 << 22 and (needs_grad or n > 1 << 14)
    return needs_grad and x.numel() < 1 << 19


def bias_act_dropout_fwd(
    x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, dropout_p: float
) -> Tensor:
    return cpu.activation_fwd(x, bias, seed, _ACTIVATIONS[activation], dropout_p)


def bias_act_bare(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """act(x + bias) of which nobody will ask for a gradient."""
    return cpu.activation_bare(x, bias, _ACTIVATIONS[activation])


def bias_act_dropout_bwd(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of (x, bias), undefined where not wanted."""
    options = _ACTIVATIONS[activation] | bool(output_mask[0]) << 2 | bool(output_mask[1]) << 3
    return cpu.activation_bwd(dy, x, bias, seed, options, dropout_p)
