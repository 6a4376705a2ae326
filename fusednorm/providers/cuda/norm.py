"""The CUDA C++ provider of the norm family."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._dtypes import compute_dtype
from ..native import options
from . import library as host
from .library import parameter, rows
from .library import reluctance as reluctance
from .library import unavailable_reason as unavailable_reason

_WIDE_STREAM = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32))


def refusal(op: str, *args: Any) -> str | None:
    x, residual, normalized_ndim, dropout_p = args[0], args[1], args[7], args[9]
    normed_dtype, residual_dtype = args[11], args[12]
    reason = host.refusal(x, math.prod(x.shape[x.ndim - normalized_ndim :]))
    if reason is not None or x.is_meta:
        return reason
    if dropout_p and normalized_ndim > 1:
        return "dropout_p > 0 with a normalized_shape of several dimensions; flatten them first"
    given = residual_dtype if residual is None else residual.dtype
    wide = (x.dtype, residual_dtype) in _WIDE_STREAM
    if (
        normed_dtype != x.dtype
        or not (wide or residual_dtype == x.dtype)
        or not (given == residual_dtype or (wide and given == x.dtype))
    ):
        return (
            "dtypes: its kernels take one dtype for x, residual, normed and residual_out, or 16-bit x and normed "
            f"beside a float32 residual_out; these are {x.dtype}, {given}, {normed_dtype} and {residual_dtype}"
        )
    for name, tensor in (("x", x), ("residual", residual)):
        reason = None if tensor is None else host.strides_refusal(name, tensor, normalized_ndim)
        if reason is not None:
            return reason
    return None


def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    eps: float,
    dropout_p: float,
    drop_path_p: float,
    normed_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    rms: bool,
    zero_centered_weight: bool,
    store_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, residual_out, stats) in one launch."""
    if not x.numel():
        n_rows = x.shape[: x.ndim - normalized_ndim].numel()
        stats = x.new_full((1 if rms else 2, n_rows), math.nan, dtype=compute_dtype(x.dtype, residual_dtype))
        z_shape = x.shape if store_residual else (0,)
        return x.new_empty(x.shape, dtype=normed_dtype), x.new_empty(z_shape, dtype=residual_dtype), stats
    computed_in = compute_dtype(x.dtype)
    return host.ops.add_layer_norm_fwd.default(
        rows(x, x.dtype, normalized_ndim),
        rows(residual, residual_dtype, normalized_ndim),
        *[parameter(p, x.dtype, computed_in) for p in (weight, bias, x_bias, layer_scale)],
        seed,
        options(normalized_ndim, normed_dtype, residual_dtype, rms, zero_centered_weight, store_residual),
        *(eps, dropout_p, drop_path_p),
    )


def add_layer_norm_bwd(
    dnormed: Tensor,
    dresidual_out: Tensor | None,
    saved: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    dropout_p: float,
    drop_path_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    rms: bool,
    zero_centered_weight: bool,
    saved_is_normed: bool,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of (x, residual, weight, bias, x_bias, layer_scale): a launch, and one that sums the partials."""
    parameters = (weight, bias, x_bias, layer_scale)
    if not saved.numel():
        gradients = [saved.new_empty(saved.shape, dtype=dtype) for dtype in (x_dtype, residual_dtype)]
        gradients += [saved.new_empty(0) if p is None else torch.zeros_like(p) for p in parameters]
        return tuple(g if wanted else saved.new_empty(0) for g, wanted in zip(gradients, output_mask))
    computed_in = stats.dtype
    # that of residual_out, which without a residual, or with one of x's dtype, residual_dtype does not say
    stream = residual_dtype if saved_is_normed else saved.dtype
    if saved_is_normed and dresidual_out is not None and (x_dtype, dresidual_out.dtype) in _WIDE_STREAM:
        stream = dresidual_out.dtype
    results = host.ops.add_layer_norm_bwd.default(
        rows(dnormed, x_dtype, normalized_ndim),
        rows(dresidual_out, stream, normalized_ndim),
        rows(saved, saved.dtype, normalized_ndim),
        stats.contiguous(),
        *[parameter(p, x_dtype, computed_in) for p in parameters[:2]],
        rows(x if output_mask[5] else None, x_dtype, normalized_ndim),
        *[parameter(p, x_dtype, computed_in) for p in parameters[2:]],
        seed,
        options(
            *(normalized_ndim, x_dtype, residual_dtype, rms, zero_centered_weight, False, saved_is_normed),
            tuple(output_mask),
        ),
        *(dropout_p, drop_path_p),
    )
    dtypes = (x_dtype, residual_dtype, *[None if p is None else p.dtype for p in parameters])
    if any(wanted and g.dtype is not dtype for g, dtype, wanted in zip(results, dtypes, output_mask)):
        # of what was converted on its way in
        return tuple(g.to(dtype) if wanted else g for g, dtype, wanted in zip(results, dtypes, output_mask))
    return results
