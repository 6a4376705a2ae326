"""The Triton provider of the norm family: what it takes, how operands are laid out, and the launches."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..._dtypes import compute_dtype
from ..._options import NormGradOptions, NormInputs, NormOptions, NormSaved
from ..strides import contiguous
from . import host
from . import norm_config as table
from .host import for_tests as for_tests
from .host import runs_on as runs_on
from .host import unavailable_reason as unavailable_reason
from .strides import layout, rows_per_sample, sizes

if TYPE_CHECKING:
    from .launch import Variant


def refusal(op: str, inputs: NormInputs, options: NormOptions) -> str | None:
    x, normalized_ndim = inputs.x, options.normalized_ndim
    reason = host.refusal(x, math.prod(x.shape[x.ndim - normalized_ndim :]))
    if reason is None and options.dropout_p and normalized_ndim > 1 and not x.is_meta:
        return "dropout_p > 0 with a normalized_shape of several dimensions; flatten them first"
    return reason


@functools.lru_cache(4096)
def _forward(
    n: int,
    layout: tuple[int, int, bool],
    z_dtype: torch.dtype,
    acc: torch.dtype,
    wide: bool,
    flags: tuple[bool, ...],
) -> tuple[Variant, int]:
    """The forward of rows of n columns, and how many rows a program takes.

    `wide`: some row operand or result has more than 16 bits an element, or three parameters have.
    """
    from . import norm_fwd as kernels
    from .launch import TYPES

    small = layout[0] != 0 or acc == torch.float64
    config = table.forward(n, dropout=flags[2], wide=wide, small=small)
    kernel = kernels._add_layer_norm_fwd_wide_kernel
    constants: tuple[Any, ...] = (TYPES[z_dtype], *flags, *layout, config.block_m, config.block_n)
    if config.chunks:
        kernel = kernels._add_layer_norm_fwd_kernel
        power_of_two = 1 << (config.chunks - 1).bit_length()
        constants += (config.chunks, power_of_two, config.chunks * config.block_n == n)
    return host.variant(kernel, constants, config, layout[0] == 0), config.block_m


class _Backward(NamedTuple):
    config: table.Config
    slabs: int  # programs beside one another in a row
    sums: Variant | None  # the row sums, where a row does not fit
    sums_block_m: int
    main: Variant


@functools.lru_cache(4096)
def _backward(
    n: int,
    layout: tuple[int, int, bool],
    acc: torch.dtype,
    wide_rows: bool,
    narrowed: bool,
    norm: tuple[bool, ...],
    masks: tuple[bool, bool],
    scaled: bool,
    wanted: tuple[bool, ...],
) -> _Backward:
    """`narrowed`: normed has fewer bits than x; `wanted`: gradients of the parameters.

    `norm`: rms, zero_centered_weight, saved_is_normed; `masks`: dropout, drop path.
    """
    from . import norm_bwd as kernels

    aligned = layout[0] == 0
    weight_class = table.load(sum(wanted), masks[0], scaled, wide_rows, narrowed, norm[2])
    config = table.backward(n, weight_class, not aligned or acc == torch.float64, two_strides=layout[2])
    chunks, sums, slabs = max(config.chunks, 1), None, 1
    sums_config = table.SUMS_FLOAT64 if acc == torch.float64 else table.SUMS
    if not config.chunks:
        slabs = host.ceil(n, config.block_n)
        constants = (*norm, *layout, sums_config.block_m, sums_config.block_n)
        sums = host.variant(kernels._add_layer_norm_bwd_sums_kernel, constants, sums_config, aligned)
    even = n % (config.block_n * chunks) == 0
    constants = (*norm, *masks, *wanted, *layout, config.block_m, config.block_n, chunks, even)
    main = host.variant(kernels._add_layer_norm_bwd_kernel, constants, config, aligned)
    return _Backward(config, slabs, sums, sums_config.block_m, main)


def forget_variants() -> None:
    """After the table was changed."""
    _forward.cache_clear()
    _backward.cache_clear()


def _parameter(parameter: Tensor | None, acc: torch.dtype) -> Tensor | None:
    """The parameter, contiguous. One finer than `acc` is rounded here: a tile of it would take twice the registers."""
    parameter = contiguous(parameter)
    if parameter is not None and parameter.dtype is torch.float64 and acc is not torch.float64:
        return parameter.to(acc)
    return parameter


def add_layer_norm_fwd(inputs: NormInputs, options: NormOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, residual_out, stats) in one launch."""
    x, residual, *given, seed = inputs
    normalized_ndim, eps, dropout_p, drop_path_p, normed_dtype, residual_dtype, *switches, store_residual = options
    m, n = sizes(x, normalized_ndim)
    normed = torch.empty_like(x, dtype=normed_dtype, memory_format=torch.contiguous_format)
    residual_out = host.empty_unless_wanted(x, store_residual, residual_dtype)
    n_statistics, stats_dtype = 1 if options.rms else 2, compute_dtype(x.dtype, residual_dtype)
    stats = torch.empty_strided((n_statistics, m), (m, 1), dtype=stats_dtype, device=x.device)
    if m == 0:
        return normed, residual_out, stats
    if n == 0:
        return normed, residual_out, stats.fill_(float("nan"))
    parameters = tuple([_parameter(p, stats_dtype) for p in given])
    outputs = (normed, residual_out if store_residual else None)
    rows = layout((x, residual), (*parameters, *outputs), normalized_ndim, n)
    flags = (*switches, dropout_p > 0.0, drop_path_p > 0.0)
    wide = x.dtype.itemsize > 2 or residual_dtype.itemsize > 2 or normed_dtype.itemsize > 2
    wide = wide or sum([p is not None and p.dtype.itemsize > 2 for p in parameters]) > 2
    variant, block_m = _forward(n, rows.constants, residual_dtype, stats_dtype, wide, flags)
    variant.launch(
        (host.ceil(m, block_m), 1),
        (*rows.tensors, *parameters, seed, *outputs, stats),
        (
            *(m, rows.n_units, rows.rows_inner, rows_per_sample(x, normalized_ndim), *rows.strides, eps),
            *host.dropout_scalars(dropout_p),
            *host.dropout_scalars(drop_path_p),
        ),
    )
    return normed, residual_out, stats


def add_layer_norm_bwd(
    dnormed: Tensor, dresidual_out: Tensor | None, saved: NormSaved, options: NormGradOptions, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of (x, residual, weight, bias, x_bias, layer_scale): one launch, and one that sums the partials."""
    kept, stats, weight, bias, x, x_bias, layer_scale, seed = saved
    normalized_ndim, dropout_p, drop_path_p, x_dtype, residual_dtype, *norm = options
    m, n = sizes(kept, normalized_ndim)
    parameters: tuple[Tensor | None, ...] = (weight, bias, x_bias, layer_scale)
    gradients = [
        kept.new_empty(0) if like is None or not wanted else host.empty_unless_wanted(like, True, dtype or like.dtype)
        for like, dtype, wanted in zip(
            (kept, kept, *parameters), (x_dtype, residual_dtype, *[None] * 4), output_mask, strict=True
        )
    ]
    if m == 0 or n == 0:
        return tuple([g.zero_() for g in gradients])

    present = (True, True, *[p is not None for p in parameters])
    output_mask = [wanted and there for wanted, there in zip(output_mask, present, strict=True)]
    written = [g if wanted else None for g, wanted in zip(gradients, output_mask, strict=True)]
    scaled = output_mask[5]  # d(layer_scale) alone looks at x and x_bias again
    used = (weight, bias if options.saved_is_normed else None, x_bias if scaled else None, layer_scale)
    parameters = tuple([_parameter(p, stats.dtype) for p in used])
    rows = layout(
        (dnormed, dresidual_out, kept, x if scaled else None), (*parameters, *written[:2]), normalized_ndim, n
    )
    plan = _backward(
        n,
        rows.constants,
        stats.dtype,
        max(kept.dtype.itemsize, dnormed.dtype.itemsize, x_dtype.itemsize, residual_dtype.itemsize) > 2,
        dnormed.dtype.itemsize < x_dtype.itemsize,
        tuple(norm),
        (dropout_p > 0.0, drop_path_p > 0.0),
        layer_scale is not None,
        tuple(output_mask[2:]),
    )
    sums = None
    if plan.sums is not None:
        sums = torch.empty_like(stats)
        plan.sums.launch(
            (host.ceil(m, plan.sums_block_m), 1),
            (rows.tensors[0], rows.tensors[2], stats, parameters[0], parameters[1], sums),
            (m, rows.n_units, rows.rows_inner, *rows.strides[:3], *rows.strides[6:9]),
        )
    # persistent programs: the multiprocessors filled, but no more than there are groups of rows
    programs = host.processors(kept.get_device()) * plan.config.per_sm // plan.slabs
    programs = max(1, min(host.ceil(m, plan.config.block_m), programs))
    accumulators = sum(output_mask[2:])
    partials = stats.new_empty((accumulators, programs, n)) if accumulators else None
    plan.main.launch(
        (plan.slabs, programs),
        (
            *(*rows.tensors[:3], stats, sums, parameters[0], parameters[1], rows.tensors[3], *parameters[2:], seed),
            *(*written[:2], partials),
        ),
        (
            *(m, rows.n_units, rows.rows_inner, rows_per_sample(kept, normalized_ndim), *rows.strides),
            *host.dropout_scalars(dropout_p),
            *host.dropout_scalars(drop_path_p),
        ),
    )
    if partials is not None:
        host.sum_partials(partials, tuple(written[2:]))
    return tuple(gradients)
