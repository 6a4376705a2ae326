"""The Triton provider of the norm family: what it takes, how operands are laid out, and the launches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..._dtypes import compute_dtype
from ..._options import NormGradOptions, NormInputs, NormOptions, NormSaved
from ..forms import Place
from ..strides import row_major
from . import host
from . import norm_config as table
from .config import Form
from .host import for_tests as for_tests
from .host import runs_on as runs_on
from .host import unavailable_reason as unavailable_reason
from .strides import Parameters, Rows, rows_per_sample, several_samples, sizes

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
    index: int,
    n: int,
    layout: tuple[int, int, bool],
    z_dtype: torch.dtype,
    acc: torch.dtype,
    wide_rows: bool,
    wide_parameters: bool,
    flags: tuple[bool, ...],
) -> tuple[Callable[[], Variant], int]:
    """The forward of rows of n columns, and how many rows a program takes.

    `flags`: rms, zero_centered_weight, dropout, drop path, whether a parameter has a vector for each sample.
    `wide_rows`: some row operand or result has more than 16 bits an element. `wide_parameters`: three of them have.
    """
    from . import norm_fwd as kernels
    from .launch import TYPES

    small = layout[0] != 0 or acc == torch.float64
    own = table.forward(n, flags[2], wide_rows, wide_parameters, small, per_sample=flags[4])
    load = table.forward_load(flags[2], wide_rows, wide_parameters)
    place = Place("forward", n, table.itemsize(wide_rows, acc == torch.float64), load)
    config = table.chosen(place, index, layout, own)
    kernel = kernels._add_layer_norm_fwd_wide_kernel
    constants: tuple[Any, ...] = (TYPES[z_dtype], *flags, *layout, config.block_m, config.block_n)
    if config.chunks:
        kernel = kernels._add_layer_norm_fwd_kernel
        power_of_two = 1 << (config.chunks - 1).bit_length()
        constants += (config.chunks, power_of_two, config.chunks * config.block_n == n)
    return functools.partial(host.variant, kernel, constants, config, layout[0] == 0), config.block_m


class _Backward(NamedTuple):
    config: Form
    slabs: int  # programs beside one another in a row
    sums: Callable[[], Variant] | None  # the row sums, where a row does not fit
    sums_block_m: int
    main: Callable[[], Variant]


class _Way(NamedTuple):
    """The launches of a backward whose tensors are all aligned, or not all."""

    sums: Variant | None
    sums_grid: tuple[int, int]
    sums_numbers: tuple[int, ...]
    main: Variant
    grid: tuple[int, int]
    numbers: tuple[int | float, ...]
    whole: tuple[bool, ...] | None  # which of the gradients of weight, bias, x_bias, layer_scale main writes whole
    partials: tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None  # sizes, strides, dtype
    finish: Callable[..., None] | None


@functools.lru_cache(4096)
def _backward(
    index: int,
    n: int,
    layout: tuple[int, int, bool],
    acc: torch.dtype,
    wide_rows: bool,
    narrowed: bool,
    norm: tuple[bool, ...],
    masks: tuple[bool, bool],
    scaled: bool,
    wanted: tuple[bool, ...],
    per_sample: bool,
) -> _Backward:
    """`narrowed`: normed has fewer bits than x; `wanted`: gradients of the parameters.

    `norm`: rms, zero_centered_weight, saved_is_normed; `masks`: dropout, drop path.
    """
    from . import norm_bwd as kernels

    aligned = layout[0] == 0
    weight_class = table.load(sum(wanted), masks[0], scaled, wide_rows, narrowed, norm[2])
    small, crowded = not aligned or acc == torch.float64, layout[2] or (per_sample and masks[0])
    own = table.backward(n, weight_class, small, two_strides=crowded, per_sample=per_sample)
    place = Place("backward", n, table.itemsize(wide_rows, acc == torch.float64), weight_class)
    config = table.chosen(place, index, layout, own)
    chunks, sums, slabs = max(config.chunks, 1), None, 1
    sums_config = table.SUMS_FLOAT64 if acc == torch.float64 else table.SUMS
    if not config.chunks:
        slabs = host.ceil(n, config.block_n)
        constants = (*norm, per_sample, *layout, sums_config.block_m, sums_config.block_n)
        sums = functools.partial(host.variant, kernels._add_layer_norm_bwd_sums_kernel, constants, sums_config, aligned)
    even = n % (config.block_n * chunks) == 0
    constants = (*norm, *masks, *wanted, per_sample, *layout, config.block_m, config.block_n, chunks, even)
    main = functools.partial(host.variant, kernels._add_layer_norm_bwd_kernel, constants, config, aligned)
    return _Backward(config, slabs, sums, sums_config.block_m, main)


def try_forms(forms: Mapping[Place, Form]) -> None:
    """Launch these in place of the table's, and of those that are kept, until other ones are given.

    Raises:
        ValueError: one does not hold its rows.
    """
    for place, form in forms.items():
        table.check(place, form)
    table.tried = forms
    forget_variants()


def forget_variants() -> None:
    """After the table, or what takes its place, was changed."""
    _forward.cache_clear()
    _backward.cache_clear()
    host.forget_prepared()


@host.prepared
def add_layer_norm_fwd(inputs: NormInputs, options: NormOptions) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """(normed, residual_out, stats) in one launch."""
    x, residual, *given, _ = inputs
    normalized_ndim, eps, dropout_p, drop_path_p, normed_dtype, residual_dtype, *switches, store_residual = options
    index, (m, n), acc = x.get_device(), sizes(x, normalized_ndim), compute_dtype(x.dtype, residual_dtype)
    (shape, strides), (stats_shape, stats_strides) = row_major(x.shape), row_major((2 - options.rms, m))
    rows, of_sample = Rows((x, residual), normalized_ndim, n), rows_per_sample(x, normalized_ndim)
    parameters = Parameters(given, normalized_ndim, n, acc)
    wide = (
        max(x.dtype.itemsize, residual_dtype.itemsize, normed_dtype.itemsize) > 2,
        sum([p is not None and p.dtype.itemsize > 2 for p in given]) > 2,
    )

    @functools.cache
    def way(aligned: bool) -> tuple[Variant, tuple[int, int], tuple[int | float, ...]]:
        layout = rows.layout(aligned, parameters)
        flags = (*switches, dropout_p > 0.0, drop_path_p > 0.0, parameters.per_sample)
        variant, block_m = _forward(index, n, layout.constants, residual_dtype, acc, *wide, flags)
        numbers = (
            *(m, layout.n_units, layout.rows_inner, of_sample, *layout.strides, *parameters.in_units(layout), eps),
            *(*host.dropout_scalars(dropout_p), *host.dropout_scalars(drop_path_p)),
        )
        return variant(), (host.ceil(m, block_m), 1), numbers

    def run(inputs: NormInputs, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        x, residual, weight, bias, x_bias, layer_scale, seed = inputs
        empty = host.allocator(x)
        normed, stats = empty(shape, strides, normed_dtype), empty(stats_shape, stats_strides, acc)
        residual_out = empty(shape, strides, residual_dtype) if store_residual else empty((0,), (1,), residual_dtype)
        if m == 0 or n == 0:
            return normed, residual_out, stats.fill_(math.nan)
        if rows.copied:
            x, residual = rows.read((x, residual))
        if parameters.copied:
            weight, bias, x_bias, layer_scale = parameters.read((weight, bias, x_bias, layer_scale))
        written = residual_out if store_residual else None
        variant, grid, numbers = way(host.aligned(x, residual, weight, bias, x_bias, layer_scale, normed, written))
        pointers = (x, residual, weight, bias, x_bias, layer_scale, seed, normed, written, stats)
        variant.launch(grid, pointers, numbers)
        return normed, residual_out, stats

    return run


@host.prepared
def add_layer_norm_bwd(
    dnormed: Tensor, dresidual_out: Tensor | None, saved: NormSaved, options: NormGradOptions, output_mask: list[bool]
) -> Callable[..., tuple[Tensor | None, ...]]:
    """Gradients of (x, residual, weight, bias, x_bias, layer_scale): one launch, and one that sums the partials."""
    kept, stats, weight, bias, x, x_bias, layer_scale, _ = saved
    normalized_ndim, dropout_p, drop_path_p, x_dtype, residual_dtype, *norm = options
    index, (m, n), acc = kept.get_device(), sizes(kept, normalized_ndim), stats.dtype
    like = (kept, kept, weight, bias, x_bias, layer_scale)
    wanted = [want and t is not None for want, t in zip(output_mask, like, strict=True)]
    results = [
        (*row_major(t.shape), dtype or t.dtype) if t is not None and want else None
        for t, dtype, want in zip(like, (x_dtype, residual_dtype, *[None] * 4), wanted, strict=True)
    ]
    stats_like = row_major(stats.shape)
    scaled = wanted[5]  # d(layer_scale) alone looks at x and x_bias again
    rows = Rows((dnormed, dresidual_out, kept, x if scaled else None), normalized_ndim, n)
    of_sample = rows_per_sample(kept, normalized_ndim)
    from_bias = options.saved_is_normed
    given = weight, bias if from_bias else None, x_bias if scaled else None, layer_scale
    parameters = Parameters(given, normalized_ndim, n, acc)
    own = [want and several_samples(p, normalized_ndim) for p, want in zip(like[2:], wanted[2:])]
    per_sample = parameters.per_sample or any(own)
    wide = max(kept.dtype.itemsize, dnormed.dtype.itemsize, x_dtype.itemsize, residual_dtype.itemsize) > 2
    narrowed, has_scale = dnormed.dtype.itemsize < x_dtype.itemsize, layer_scale is not None

    @functools.cache
    def way(aligned: bool) -> _Way:
        layout, masks = rows.layout(aligned, parameters), (dropout_p > 0.0, drop_path_p > 0.0)
        wanted_sums, kinds = tuple(wanted[2:]), (acc, wide, narrowed, tuple(norm), masks, has_scale)
        plan = _backward(index, n, layout.constants, *kinds, wanted_sums, per_sample)
        samples = m // of_sample if per_sample else 1
        programs = host.programs(index, plan.config, m // samples, plan.slabs, samples)
        whole = tuple([each and programs == 1 for each in own])
        summed = [each for each, want, done in zip(own, wanted_sums, whole) if want and not done]
        strides, units = layout.strides, parameters.in_units(layout)
        lead = m, layout.n_units, layout.rows_inner, of_sample
        scalars = *host.dropout_scalars(dropout_p), *host.dropout_scalars(drop_path_p)
        return _Way(
            None if plan.sums is None else plan.sums(),
            (host.ceil(m, plan.sums_block_m), 1),
            (*lead, *strides[:3], *strides[6:9], *units[:2]),
            plan.main(),
            (plan.slabs * samples, programs),
            (*lead, *strides, *units, *scalars),
            whole if any(whole) else None,
            (*row_major((len(summed), samples * programs, n)), acc) if summed else None,
            host.sum_partials(summed, samples, programs, n) if summed else None,
        )

    def run(
        dnormed: Tensor, dresidual_out: Tensor | None, saved: NormSaved, options: NormGradOptions, _: list[bool]
    ) -> tuple[Tensor | None, ...]:
        kept, stats, weight, bias, x, x_bias, layer_scale, seed = saved
        empty = host.allocator(kept)
        gradients = [None if result is None else empty(*result) for result in results]
        if m == 0 or n == 0:
            return tuple([g if g is None else g.zero_() for g in gradients])
        bias, x, x_bias = bias if from_bias else None, x if scaled else None, x_bias if scaled else None
        if parameters.copied:
            weight, bias, x_bias, layer_scale = parameters.read((weight, bias, x_bias, layer_scale))
        if rows.copied:
            dnormed, dresidual_out, kept, x = rows.read((dnormed, dresidual_out, kept, x))
        dx, dresidual, *others = gradients
        tensors = dnormed, dresidual_out, kept, x, weight, bias, x_bias, layer_scale, dx, dresidual
        taken = way(host.aligned(*tensors))
        sums = None
        if taken.sums is not None:
            sums = empty(*stats_like, acc)
            pointers = (dnormed, kept, stats, weight, bias, sums)
            taken.sums.launch(taken.sums_grid, pointers, taken.sums_numbers)
        partials = None if taken.partials is None else empty(*taken.partials)
        dweight = dbias = dlayer_scale = None
        if taken.whole is not None:
            whole = [g if w else None for g, w in zip(others, taken.whole)]
            dweight, dbias, dlayer_scale = whole[0], whole[1], whole[3]
            others = [None if w else g for g, w in zip(others, taken.whole)]
        every = (
            *(dnormed, dresidual_out, kept, stats, sums, weight, bias, x, x_bias, layer_scale, seed),
            *(dx, dresidual, partials, dweight, dbias, dlayer_scale),
        )
        taken.main.launch(taken.grid, every, taken.numbers)
        if taken.finish is not None:
            taken.finish(partials, tuple(others))
        return tuple(gradients)

    return run
