"""Norms without an epilogue that are served before anything is checked, by torch's operators or the native library.

What these refuse then goes through the checks, which say what is wrong, or is a mixture of dtypes that we take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch
from ._transforms import wants_gradients
from .dispatch.crossovers import torch_on_gpu

REFUSED = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)  # what torch's operators raise
_functorch_active = torch._C._are_functorch_transforms_active
_autocast_active = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling


def unwatched(x: Tensor) -> bool:
    """Whether a bare call on the CPU may be served at once.

    One expression of look-ups bound beforehand: all of it is paid on a call that itself takes 7 microseconds.
    """
    return (
        dispatch.short_cuts
        and x.is_cpu
        and not x.is_nested
        and not _functorch_active()
        and forward_ad._current_level < 0
        and not _is_compiling()
    )


def by_torch(
    x: Tensor,
    residual: Tensor | None,
    shape: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
) -> tuple[Tensor, Tensor] | None:
    """(normed, z) by torch's operators, or None where these take dtypes or shapes otherwise than we do."""
    if rms and weight is not None and weight.dtype is not x.dtype:
        return None  # torch would take the wider dtype
    if residual is None:
        z = x
    elif (
        residual.dtype is x.dtype
        and residual.shape == x.shape
        and residual.layout is torch.strided
        and not _autocast_active()
    ):
        z = x + residual
    else:
        return None
    return (torch.rms_norm(z, shape, weight, eps) if rms else torch.layer_norm(z, shape, weight, bias, eps)), z  # type: ignore[arg-type]


def torch_on_a_gpu(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_shape: int | Sequence[int],
    eps: float | None,
    rms: bool,
) -> tuple[Tensor, Tensor] | None:
    """(normed, z) by torch's operators where automatic choice names these for a call on a GPU, else None."""
    if (
        not (dispatch.automatic and dispatch.by_shape and getattr(x, "is_cuda", False))
        or not (eps is None or type(eps) is float)
        or _is_compiling()
        or _functorch_active()
        or forward_ad._current_level >= 0
    ):
        return None
    try:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        dtype, inputs = x.dtype, (x, residual, weight, bias)
        if x.shape[x.ndim - len(shape) :] != shape or any(t is not None and t.dtype is not dtype for t in inputs):
            return None
        needs_grad = wants_gradients(inputs)
        name = ("" if residual is None else "add_") + ("rms_norm" if rms else "layer_norm")
        if not torch_on_gpu(name, dtype, x.numel(), math.prod(shape), needs_grad, x.device.index or 0):
            return None
        return by_torch(x, residual, shape, weight, bias, eps, rms)
    except REFUSED:
        return None
