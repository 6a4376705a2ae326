"""The CUDA C++ provider of the norm family."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._dtypes import compute_dtype
from ..._options import NormGradOptions, NormInputs, NormOptions, NormSaved
from ..native import packed_norm, packed_norm_grad
from ..samples import is_per_sample
from . import library

for_tests, runs_on, unavailable_reason = library.for_tests, library.runs_on, library.unavailable_reason

_WIDE_RESIDUAL = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32))


def refusal(op: str, inputs: NormInputs, options: NormOptions) -> str | None:
    x, residual, normalized_ndim = inputs.x, inputs.residual, options.normalized_ndim
    normed_dtype, residual_dtype = options.normed_dtype, options.residual_dtype
    reason = library.refusal(x, math.prod(x.shape[x.ndim - normalized_ndim :]))
    if reason is not None or x.is_meta:
        return reason
    if options.dropout_p and normalized_ndim > 1:
        return "dropout_p > 0 with a normalized_shape of several dimensions; flatten them first"
    given = residual_dtype if residual is None else residual.dtype
    wide = (x.dtype, residual_dtype) in _WIDE_RESIDUAL
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
        reason = None if tensor is None else library.strides_refusal(name, tensor, normalized_ndim)
        if reason is not None:
            return reason
    return None


def _parameter(
    given: Tensor | None, dtype: torch.dtype, computed_in: torch.dtype, normalized_ndim: int
) -> Tensor | None:
    if given is not None and is_per_sample(given, normalized_ndim):
        return library.sample_parameter(given, dtype, computed_in)
    return library.parameter(given, dtype, computed_in)


def add_layer_norm_fwd(inputs: NormInputs, options: NormOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, residual_out, stats) in one launch."""
    x, residual, *parameters, seed = inputs
    normalized_ndim, residual_dtype = options.normalized_ndim, options.residual_dtype
    if not x.numel():
        n_rows = x.shape[: x.ndim - normalized_ndim].numel()
        stats = x.new_full((1 if options.rms else 2, n_rows), math.nan, dtype=compute_dtype(x.dtype, residual_dtype))
        z_shape = x.shape if options.store_residual else (0,)
        return x.new_empty(x.shape, dtype=options.normed_dtype), x.new_empty(z_shape, dtype=residual_dtype), stats
    computed_in = compute_dtype(x.dtype)
    return library.ops.add_layer_norm_fwd.default(
        library.rows(x, x.dtype, normalized_ndim),
        library.rows(residual, residual.dtype if residual is not None else residual_dtype, normalized_ndim),
        *[_parameter(p, x.dtype, computed_in, normalized_ndim) for p in parameters],
        seed,
        packed_norm(options),
        *(options.eps, options.dropout_p, options.drop_path_p),
    )


def add_layer_norm_bwd(
    dnormed: Tensor, dresidual_out: Tensor | None, saved: NormSaved, options: NormGradOptions, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of (x, residual, weight, bias, x_bias, layer_scale): a launch, and one that sums the partials."""
    kept, stats, weight, bias, x, x_bias, layer_scale, seed = saved
    normalized_ndim, x_dtype, residual_dtype = options.normalized_ndim, options.x_dtype, options.residual_dtype
    parameters = (weight, bias, x_bias, layer_scale)
    if not kept.numel():
        gradients = [kept.new_empty(kept.shape, dtype=dtype) for dtype in (x_dtype, residual_dtype)]
        gradients += [kept.new_empty(0) if p is None else torch.zeros_like(p) for p in parameters]
        return tuple(g if wanted else kept.new_empty(0) for g, wanted in zip(gradients, output_mask))
    computed_in = stats.dtype
    # that of residual_out, which without a residual, or with one of x's dtype, residual_dtype does not say
    residual_out_dtype = residual_dtype if options.saved_is_normed else kept.dtype
    if options.saved_is_normed and dresidual_out is not None and (x_dtype, dresidual_out.dtype) in _WIDE_RESIDUAL:
        residual_out_dtype = dresidual_out.dtype
    results = library.ops.add_layer_norm_bwd.default(
        library.rows(dnormed, x_dtype, normalized_ndim),
        library.rows(dresidual_out, residual_out_dtype, normalized_ndim),
        library.rows(kept, kept.dtype, normalized_ndim),
        stats.contiguous(),
        *[_parameter(p, x_dtype, computed_in, normalized_ndim) for p in parameters[:2]],
        library.rows(x if output_mask[5] else None, x_dtype, normalized_ndim),
        *[_parameter(p, x_dtype, computed_in, normalized_ndim) for p in parameters[2:]],
        seed,
        packed_norm_grad(options, tuple(output_mask)),
        *(options.dropout_p, options.drop_path_p),
    )
    dtypes = (x_dtype, residual_dtype, *[None if p is None else p.dtype for p in parameters])
    if any(wanted and g.dtype is not dtype for g, dtype, wanted in zip(results, dtypes, output_mask)):
        # of what was converted on its way in
        return tuple(g.to(dtype) if wanted else g for g, dtype, wanted in zip(results, dtypes, output_mask))
    return results
