"""The native CPU provider of ``bias_act_dropout``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..._options import ActivationInputs, ActivationOptions
from ..native import FORWARD_OPTIONS, activation_options
from . import library

refusal = library.refusal


def bias_act_dropout_fwd(inputs: ActivationInputs, options: ActivationOptions) -> Tensor:
    return library.bias_act_dropout_fwd(*inputs, FORWARD_OPTIONS[options.activation], options.dropout_p)


def _prepare(inputs: ActivationInputs, options: ActivationOptions) -> Callable[..., Tensor]:
    """What serves every call of these options. The arguments that they give are made once."""
    kernel, switches, p = library.bias_act_dropout_fwd, FORWARD_OPTIONS[options.activation], options.dropout_p
    return lambda inputs: kernel(inputs[0], inputs[1], inputs[2], switches, p)  # *inputs takes 0.15 microseconds more


bias_act_dropout_fwd.prepare = _prepare  # type: ignore[attr-defined]


def bias_act_dropout_bwd(
    dy: Tensor, inputs: ActivationInputs, options: ActivationOptions, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of (x, bias), undefined where not wanted."""
    switches = activation_options(options.activation, output_mask)
    return library.bias_act_dropout_bwd(dy, *inputs, switches, options.dropout_p)
