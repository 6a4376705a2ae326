"""The CPU provider of norms."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..._dtypes import compute_dtype
from ..._options import NormGradOptions, NormInputs, NormOptions, NormSaved
from ..native import packed_norm, packed_norm_grad
from . import library

build, refusal = library.build, library.refusal
runs_on, unavailable_reason = library.runs_on, library.unavailable_reason


def add_layer_norm_fwd(inputs: NormInputs, options: NormOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, residual_out, stats)."""
    if not inputs.x.numel():  # (huge, 0) must not allocate statistics for each row
        return _empty(inputs.x, options)
    return library.add_layer_norm_fwd(
        *inputs, packed_norm(options), options.eps, options.dropout_p, options.drop_path_p
    )


def _prepare(inputs: NormInputs, options: NormOptions) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """What serves every call of these sizes and options. The arguments that the options give are made once."""
    if not inputs.x.numel():
        return lambda inputs: _empty(inputs.x, options)
    kernel = library.add_layer_norm_fwd
    rest = packed_norm(options), options.eps, options.dropout_p, options.drop_path_p
    return lambda inputs: kernel(*inputs, *rest)


add_layer_norm_fwd.prepare = _prepare  # type: ignore[attr-defined]


def _empty(x: Tensor, options: NormOptions) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[: x.ndim - options.normalized_ndim].numel()
    stats = x.new_full((1 if options.rms else 2, 1), math.nan, dtype=compute_dtype(x.dtype, options.residual_dtype))
    residual_out = x.new_empty(x.shape if options.store_residual else (0,), dtype=options.residual_dtype)
    return x.new_empty(x.shape, dtype=options.normed_dtype), residual_out, stats.expand(-1, rows)


def add_layer_norm_bwd(
    dnormed: Tensor, dresidual_out: Tensor | None, saved: NormSaved, options: NormGradOptions, output_mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, residual, weight, bias, x_bias, layer_scale); None where not wanted."""
    # Hooks on saved tensors may bring the statistics back with other strides.
    saved = saved._replace(stats=saved.stats.contiguous())
    switches = packed_norm_grad(options, tuple(output_mask))
    return library.add_layer_norm_bwd(dnormed, dresidual_out, *saved, switches, options.dropout_p, options.drop_path_p)
