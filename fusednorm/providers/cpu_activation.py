"""The native CPU provider of bias_act_dropout, and its dropout mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .cpu import refusal as refusal
from .native import FORWARD_OPTIONS, activation_options


def reluctance(op: str, *args: Any) -> str | None:
    """Why automatic choice does not take a call that this provider could serve."""
    if args[4]:
        return None
    if args[1] is None:
        return "torch's own operators serve an activation with nothing to add"
    if torch.compiler.is_compiling():
        return "torch.compile fuses an addition and an activation into what stands around them"
    if args[3] != "relu" and args[0].dtype is torch.float64:
        return "in float64 it computes an element at a time"
    return None


def bias_act_dropout_fwd(
    x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, dropout_p: float
) -> Tensor:
    return cpu.activation_fwd(x, bias, seed, FORWARD_OPTIONS[activation], dropout_p)


def bias_act_bare(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """act(x + bias) of which nobody will ask for a gradient."""
    return cpu.activation_bare(x, bias, FORWARD_OPTIONS[activation])


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
    return cpu.activation_bwd(dy, x, bias, seed, activation_options(activation, output_mask), dropout_p)
