"""The native CPU provider of bias_act_dropout, and its dropout mask."""

from __future__ import annotations

from torch import Tensor

from ..._options import ActivationInputs, ActivationOptions
from ..native import FORWARD_OPTIONS, activation_options
from . import norm as cpu
from .norm import refusal as refusal


def bias_act_dropout_fwd(inputs: ActivationInputs, options: ActivationOptions) -> Tensor:
    return cpu.activation_fwd(*inputs, FORWARD_OPTIONS[options.activation], options.dropout_p)


def bias_act_dropout_bwd(
    dy: Tensor, inputs: ActivationInputs, options: ActivationOptions, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of (x, bias), undefined where not wanted."""
    return cpu.activation_bwd(dy, *inputs, activation_options(options.activation, output_mask), options.dropout_p)
