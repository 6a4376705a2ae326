"""The Triton provider of bias_act_dropout: what it takes, and the launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._activations import ACTIVATIONS
from ..._dtypes import compute_dtype
from ..._options import ActivationInputs, ActivationOptions
from ..strides import contiguous, row_major
from . import activation_config as table
from . import host
from .config import Config
from .strides import Rows, sizes

if TYPE_CHECKING:
    from .launch import Variant

_MOST_GROUPS = 65535  # of a grid's second axis; programs go on to further groups of rows


def refusal(op: str, inputs: ActivationInputs, options: ActivationOptions) -> str | None:
    return host.refusal(inputs.x, inputs.x.shape[-1])


@functools.lru_cache(4096)
def _plan(
    backward: bool, n: int, layout: tuple[int, int, bool], dtype: torch.dtype, activation: str, dropped: bool
) -> tuple[Callable[[], Variant], Config, int]:
    """The kernel for rows of n columns, its configuration, and how many tiles a row takes."""
    from . import activation_kernels as kernels
    from .launch import TYPES

    acc = compute_dtype(dtype)
    small = layout[0] != 0 or acc == torch.float64
    config = (table.backward if backward else table.forward)(n, small, dtype.itemsize, layout[2])
    kernel = kernels._bias_act_dropout_bwd_kernel if backward else kernels._bias_act_dropout_fwd_kernel
    even = n % config.block_n == 0
    form = ACTIVATIONS[activation].sigmoid or (0.0, 0.0)
    constants = (TYPES[acc], activation, *form, dropped, *layout, config.block_m, config.block_n, even)
    variant = functools.partial(host.variant, kernel, constants, config, layout[0] == 0)
    return variant, config, host.ceil(n, config.block_n)


@host.prepared
def bias_act_dropout_fwd(inputs: ActivationInputs, options: ActivationOptions) -> Callable[..., Tensor]:
    x, (activation, dropout_p) = inputs.x, options
    like, (m, n), dtype = (*row_major(x.shape), x.dtype), sizes(x, 1), x.dtype
    rows = Rows((x,), 1, n)

    @functools.cache
    def way(aligned: bool) -> tuple[Variant, tuple[int, int], tuple[int | float, ...]]:
        layout = rows.layout(aligned)
        variant, config, slabs = _plan(False, n, layout.constants, dtype, activation, dropout_p > 0.0)
        numbers = (m, layout.n_units, layout.rows_inner, *layout.strides, *host.dropout_scalars(dropout_p))
        return variant(), (slabs, min(host.ceil(m, config.block_m), _MOST_GROUPS)), numbers

    def run(inputs: ActivationInputs, *_: object) -> Tensor:
        x, bias, seed = inputs
        y = host.allocator(x)(*like)
        if m == 0 or n == 0:
            return y
        bias = contiguous(bias)
        if rows.copied:
            (x,) = rows.read((x,))
        variant, grid, numbers = way(host.aligned(x, bias, y))
        variant.launch(grid, (x, bias, seed, y), numbers)
        return y

    return run


@host.prepared
def bias_act_dropout_bwd(
    dy: Tensor, inputs: ActivationInputs, options: ActivationOptions, output_mask: list[bool]
) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    """Gradients of (x, bias): one launch, and one that sums the partials."""
    (x, bias, _), (activation, dropout_p) = inputs, options
    index, (m, n), dtype = x.get_device(), sizes(x, 1), x.dtype
    dx_like = (*row_major(x.shape), dtype) if output_mask[0] else None
    dbias_like = (*row_major(bias.shape), bias.dtype) if bias is not None and output_mask[1] else None
    rows = Rows((dy, x), 1, n)

    @functools.cache
    def way(aligned: bool) -> tuple[Variant, tuple[int, int], tuple[int | float, ...], Callable[..., None]]:
        layout = rows.layout(aligned)
        variant, config, slabs = _plan(True, n, layout.constants, dtype, activation, dropout_p > 0.0)
        programs = host.programs(index, config, m, slabs)
        numbers = (m, layout.n_units, layout.rows_inner, *layout.strides, *host.dropout_scalars(dropout_p))
        return variant(), (slabs, programs), numbers, host.sum_partials((False,), 1, programs, n)

    def run(
        dy: Tensor, inputs: ActivationInputs, options: ActivationOptions, output_mask: list[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        x, bias, seed = inputs
        empty = host.allocator(x)
        dx = None if dx_like is None else empty(*dx_like)
        dbias = None if dbias_like is None else empty(*dbias_like)
        if m == 0 or n == 0:
            return dx, None if dbias is None else dbias.zero_()
        bias = contiguous(bias)
        if rows.copied:
            dy, x = rows.read((dy, x))
        variant, grid, numbers, finish = way(host.aligned(dy, x, bias, dx))
        partials = None if dbias is None else empty(*row_major((1, grid[1], n)), compute_dtype(dtype))
        variant.launch(grid, (dy, x, bias, seed, dx, partials), numbers)
        if partials is not None:
            finish(partials, (dbias, None, None, None))
        return dx, dbias

    return run
