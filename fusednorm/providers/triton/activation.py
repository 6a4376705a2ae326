"""The Triton provider of bias_act_dropout: what it takes, and the launches."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._activations import ACTIVATIONS
from ..._dtypes import compute_dtype
from ..._options import ActivationInputs, ActivationOptions
from ..strides import contiguous
from . import activation_config as table
from . import host
from .config import Config
from .strides import layout, sizes

if TYPE_CHECKING:
    from .launch import Variant

_MOST_GROUPS = 65535  # of a grid's second axis; programs go on to further groups of rows


def refusal(op: str, inputs: ActivationInputs, options: ActivationOptions) -> str | None:
    return host.refusal(inputs.x, inputs.x.shape[-1])


@functools.lru_cache(4096)
def _plan(
    backward: bool, n: int, layout: tuple[int, int, bool], dtype: torch.dtype, activation: str, dropped: bool
) -> tuple[Variant, Config, int]:
    """The kernel for rows of n columns, its configuration, and how many tiles a row takes."""
    from . import activation_kernels as kernels
    from .launch import TYPES

    acc = compute_dtype(dtype)
    float64 = acc == torch.float64
    config = (table.backward if backward else table.forward)(n, layout[0] != 0 or float64, float64, layout[2])
    kernel = kernels._bias_act_dropout_bwd_kernel if backward else kernels._bias_act_dropout_fwd_kernel
    even = n % config.block_n == 0
    form = ACTIVATIONS[activation].sigmoid or (0.0, 0.0)
    constants = (TYPES[acc], activation, *form, dropped, *layout, config.block_m, config.block_n, even)
    return host.variant(kernel, constants, config, layout[0] == 0), config, host.ceil(n, config.block_n)


def bias_act_dropout_fwd(inputs: ActivationInputs, options: ActivationOptions) -> Tensor:
    (x, bias, seed), (activation, dropout_p) = inputs, options
    m, n = sizes(x, 1)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if m == 0 or n == 0:
        return y
    bias = contiguous(bias)
    rows = layout((x,), (bias, y), 1, n)
    variant, config, slabs = _plan(False, n, rows.constants, x.dtype, activation, dropout_p > 0.0)
    variant.launch(
        (slabs, min(host.ceil(m, config.block_m), _MOST_GROUPS)),
        (*rows.tensors, bias, seed, y),
        (m, rows.n_units, rows.rows_inner, *rows.strides, *host.dropout_scalars(dropout_p)),
    )
    return y


def bias_act_dropout_bwd(
    dy: Tensor, inputs: ActivationInputs, options: ActivationOptions, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of (x, bias): one launch, and one that sums the partials."""
    (x, bias, seed), (activation, dropout_p) = inputs, options
    m, n = sizes(x, 1)
    dx = host.empty_unless_wanted(x, output_mask[0], x.dtype)
    dbias = x.new_empty(0) if bias is None else host.empty_unless_wanted(bias, output_mask[1], bias.dtype)
    if m == 0 or n == 0:
        return dx, dbias.zero_()
    bias = contiguous(bias)
    written = dx if output_mask[0] else None
    rows = layout((dy, x), (bias, written), 1, n)
    variant, config, slabs = _plan(True, n, rows.constants, x.dtype, activation, dropout_p > 0.0)
    # persistent programs: the multiprocessors filled, but no more than there are groups of rows
    programs = host.processors(x.get_device()) * config.per_sm // slabs
    programs = max(1, min(host.ceil(m, config.block_m), programs))
    partials = None
    if bias is not None and output_mask[1]:
        partials = x.new_empty((1, programs, n), dtype=compute_dtype(x.dtype))
    variant.launch(
        (slabs, programs),
        (*rows.tensors, bias, seed, written, partials),
        (m, rows.n_units, rows.rows_inner, *rows.strides, *host.dropout_scalars(dropout_p)),
    )
    if partials is not None:
        host.sum_partials(partials, (dbias, None, None, None))
    return dx, dbias
