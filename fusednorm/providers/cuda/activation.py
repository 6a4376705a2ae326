"""The CUDA C++ provider of bias_act_dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._dtypes import compute_dtype
from ..._options import ActivationInputs, ActivationOptions
from ..native import FORWARD_OPTIONS, activation_options
from . import library


def refusal(op: str, inputs: ActivationInputs, options: ActivationOptions) -> str | None:
    x = inputs.x
    reason = library.refusal(x, x.shape[-1])
    return reason if reason is not None or x.is_meta else library.strides_refusal("x", x, 1)


def bias_act_dropout_fwd(inputs: ActivationInputs, options: ActivationOptions) -> Tensor:
    x, bias, seed = inputs
    if not x.numel():
        return x.new_empty(x.shape)
    bias = library.parameter(bias, x.dtype, compute_dtype(x.dtype))
    return library.ops.bias_act_dropout_fwd.default(
        library.rows(x, x.dtype, 1), bias, seed, FORWARD_OPTIONS[options.activation], options.dropout_p
    )


def bias_act_dropout_bwd(
    dy: Tensor, inputs: ActivationInputs, options: ActivationOptions, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of (x, bias): a launch, and one that sums the partials."""
    x, bias, seed = inputs
    wants_dx, wants_dbias = output_mask
    if not x.numel():
        dbias = torch.zeros_like(bias) if bias is not None and wants_dbias else x.new_empty(0)
        return x.new_empty(x.shape if wants_dx else (0,)), dbias
    dx, dbias = library.ops.bias_act_dropout_bwd.default(
        library.rows(dy, x.dtype, 1),
        library.rows(x, x.dtype, 1),
        library.parameter(bias, x.dtype, compute_dtype(x.dtype)),
        seed,
        activation_options(options.activation, output_mask),
        options.dropout_p,
    )
    # of a bias that was converted on its way in
    return dx, dbias if bias is None or not wants_dbias else dbias.to(bias.dtype)
