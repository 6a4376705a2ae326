"""Splits of keys in the Triton forward of attention: which calls have them, and what is written between the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..._options import AttentionInputs, AttentionOptions
from ..strides import row_major
from . import attention_config as table
from . import attention_memory as memory
from . import host

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides


class Call(NamedTuple):
    """What a launch addresses. Only sizes and strides are read."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    attn_mask: Tensor | None
    options: AttentionOptions


def may(inputs: AttentionInputs) -> bool:
    """Not with dropout, whose mask is counted by heads and queries, nor for sequences with lengths of their own."""
    return inputs.cu_seqlens_q is None and inputs.seed is None


def chosen(call: Call, need_of: Callable[[Call], table.Need]) -> tuple[Call, int]:
    """The call as it is split, and among how many programs; as it came with 1 where it is not."""
    own = grouped(call)
    tile, n_queries = table.forward_split(need_of(own)), own.options.max_seqlen_q
    programs, processors = own.q.shape[1] * host.ceil(n_queries, tile.block_m), host.processors(own.q.get_device())
    n_splits = table.key_splits(programs, n_queries, own.options.max_seqlen_k, tile, processors)
    return (own, n_splits) if n_splits > 1 else (call, 1)


def _unbounded(options: AttentionOptions) -> AttentionOptions | None:
    """The options of one query without its bounds, or None where these hide keys."""
    left, right = options.window_left, 0 if options.causal else options.window_right
    last = options.max_seqlen_k - 1
    place = last if options.lower_right else 0
    if 0 <= left < place or 0 <= right < last - place:
        return None
    return options._replace(causal=False, lower_right=False, window_left=-1, window_right=-1)


def grouped(call: Call) -> Call:
    """One query for each head: the heads that share keys as queries of one, so that a program reads their keys once.

    Otherwise the call itself. With several queries rows of a tile would be of two kinds.
    """
    q, k, v, out, lse, mask, options = call
    n_heads = k.shape[1]
    group = q.shape[1] // n_heads
    plain = _unbounded(options)
    if group == 1 or q.shape[2] != 1 or plain is None:
        return call
    mask = None if mask is None else mask[(None,) * (4 - mask.ndim)]
    own_mask = mask is not None and mask.shape[1] > 1
    if any(t is not None and t.stride(1) >= memory.MAX_STRIDE for t in (q, out, mask if own_mask else None)):
        return call
    q, out, lse = (t.unflatten(1, (n_heads, group)).squeeze(3) for t in (q, out, lse))
    if mask is not None and own_mask:
        mask = mask.unflatten(1, (n_heads, group)).squeeze(3)
    return Call(q, k, v, out, lse, mask, plain._replace(max_seqlen_q=group))


class Workspace(NamedTuple):
    """What the splits write in float32: out as (B, H, splits, Sq, DV) and lse as (B, H, splits, Sq)."""

    parts: Layout
    lses: Layout
    strides: tuple[int, int, int]  # of parts by batch, head and position in vectors, as of any result
    lse_strides: tuple[int, int]


def workspace(call: Call, n_splits: int) -> Workspace:
    batch, n_heads, n_queries, dv = *call.q.shape[:3], call.v.shape[-1]
    sizes = (batch, n_heads, n_splits)
    vec = 16 // call.v.element_size()
    rows = n_splits * n_queries
    return Workspace(
        row_major((*sizes, n_queries, dv)),
        row_major((*sizes, n_queries)),
        (n_heads * rows * dv // vec, rows * dv // vec, dv // vec),
        (n_heads * rows, rows),
    )
