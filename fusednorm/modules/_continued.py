"""A call with a ``KVCache``: layers of one kind continue after the positions that it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._layer import FusedLayer, Stream
from ._masks import Masks, Names, prepare
from .cache import KVCache

SRC = Names("src_mask", "src_key_padding_mask", "is_causal", "src")
TGT = Names("tgt_mask", "tgt_key_padding_mask", "tgt_is_causal", "tgt")
MEMORY = Names("memory_mask", "memory_key_padding_mask", "memory_is_causal", "tgt")


def continued(
    layers: Any,
    x: Tensor,
    finish: Callable[[Stream], Tensor],
    cache: KVCache,
    padding: Tensor | None,
    names: Names,
    given_masks: tuple[Tensor | None, ...],
    across: tuple[Tensor | None, Tensor | None] | None = None,
) -> Tensor:
    """The layers at new positions.

    Args:
        layers: the layers.
        x: the new positions alone.
        finish: what makes the result of what the last layer leaves.
        padding: what it hides of the new positions.
        names: what the caller calls x and its masks.
        given_masks: of self-attention and, for a decoder, of attention to its memory: there must be none.
        across: a decoder's memory, and what is padding there.
    """
    _check_arguments(layers, cache, padding, names, given_masks)
    attentions = [layer.self_attn for layer in layers]
    first = layers[0]
    sizes = attentions[0]._sizes(x, x, x, (names.query,) * 3)
    if not sizes.batched:
        raise ValueError(f"{names.query}: a cache is of a batch; pass {names.query} with a dimension for it")
    memory, cross = None, Masks()
    if across is not None:
        memory, memory_padding = across
        if cache.across(first.multihead_attn, memory) is None:
            sizes_across = first.multihead_attn._sizes(x, memory, memory, ("tgt", "memory", "memory"))
            cross = prepare(None, memory_padding, False, x, sizes_across, MEMORY)
    own = cache.masks(attentions, names.query, sizes.batch, sizes.queries, padding)
    stream = Stream(x)
    for layer in layers:
        stream = layer._fused(stream, own, cache) if across is None else layer._fused(stream, memory, own, cross, cache)
    return finish(stream)


def _check_arguments(
    layers: Any, cache: Any, padding: Any, names: Names, given_masks: tuple[Tensor | None, ...]
) -> None:
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a fusednorm.KVCache or None, got {type(cache).__name__}")
    for name, mask in zip((names.attn_mask, "memory_mask"), given_masks):
        if mask is not None:
            raise ValueError(f"{name}: with a cache, self-attention is causal and memory is seen whole; leave it out")
    if padding is not None and (not isinstance(padding, Tensor) or padding.dtype != torch.bool):
        got = padding.dtype if isinstance(padding, Tensor) else type(padding).__name__
        raise TypeError(f"{names.key_padding_mask}: with a cache, expected bool (True: hidden) or None, got {got}")
    if not len(layers):
        raise ValueError("cache: there are no layers, so there is nothing to hold")
    for i, layer in enumerate(layers):
        reason = layer._obstacle() if isinstance(layer, FusedLayer) else f"it is {type(layer).__name__}"
        if reason:
            raise ValueError(f"cache: layer {i} cannot use one, because {reason}; leave `cache` out")
