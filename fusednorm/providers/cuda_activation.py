"""The CUDA C++ provider of bias_act_dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dtypes import compute_dtype
from . import cuda_host as host
from .cuda_host import reluctance as reluctance
from .native import FORWARD_OPTIONS, activation_options


def refusal(op: str, *args: Any) -> str | None:
    x = args[0]
    reason = host.refusal(x, x.shape[-1])
    return reason if reason is not None or x.is_meta else host.strides_refusal("x", x, 1)


def bias_act_dropout_fwd(
    x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, dropout_p: float
) -> Tensor:
    if not x.numel():
        return x.new_empty(x.shape)
    bias = host.parameter(bias, x.dtype, compute_dtype(x.dtype))
    return host.ops.bias_act_dropout_fwd.default(
        host.rows(x, x.dtype, 1), bias, seed, FORWARD_OPTIONS[activation], dropout_p
    )


def bias_act_dropout_bwd(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of (x, bias): a launch, and one that sums the partials."""
    wants_dx, wants_dbias = output_mask
    if not x.numel():
        dbias = torch.zeros_like(bias) if bias is not None and wants_dbias else x.new_empty(0)
        return x.new_empty(x.shape if wants_dx else (0,)), dbias
    dx, dbias = host.ops.bias_act_dropout_bwd.default(
        host.rows(dy, x.dtype, 1),
        host.rows(x, x.dtype, 1),
        host.parameter(bias, x.dtype, compute_dtype(x.dtype)),
        seed,
        activation_options(activation, output_mask),
        dropout_p,
    )
    # of a bias that was converted on its way in
    return dx, dbias if bias is None or not wants_dbias else dbias.to(bias.dtype)
