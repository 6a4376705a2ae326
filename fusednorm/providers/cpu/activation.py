"""The native CPU provider of bias_act_dropout, and its dropout mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._options import ActivationInputs, ActivationOptions
from ..native import FORWARD_OPTIONS, activation_options
from . import norm as cpu
from .norm import refusal as refusal


def reluctance(op: str, inputs: ActivationInputs, options: ActivationOptions) -> str | None:
    """Why automatic choice does not take a call that this provider could serve."""
    if options.dropout_p:
        return None
    if inputs.bias is None:
        return "torch's own operators serve an activation with nothing to add"
    if torch.compiler.is_compiling():
        return "torch.compile fuses an addition and an activation into what stands around them"
    if options.activation != "relu" and inputs.x.dtype is torch.float64:
        return "in float64 it computes an element at a time"
    return None


def bias_act_dropout_fwd(inputs: ActivationInputs, options: ActivationOptions) -> Tensor:
    return cpu.activation_fwd(*inputs, FORWARD_OPTIONS[options.activation], options.dropout_p)


def bias_act_bare(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """act(x + bias) of which nobody will ask for a gradient."""
    return cpu.activation_bare(x, bias, FORWARD_OPTIONS[activation])


def bias_act_dropout_bwd(
    dy: Tensor, inputs: ActivationInputs, options: ActivationOptions, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of (x, bias), undefined where not wanted."""
    return cpu.activation_bwd(dy, *inputs, activation_options(options.activation, output_mask), options.dropout_p)
