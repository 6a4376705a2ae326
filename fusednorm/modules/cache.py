"""``KVCache``: keys and values of the positions that a decoder has seen, so that a new token costs one token."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ._arguments import check_count
from ._masks import Masks

_FIRST = 64  # positions that there is memory for at first


class Past:
    """The keys and values that one attention module has projected, (batch, heads, positions, head_dim)."""

    def __init__(self, module: nn.Module, most: int | None = None) -> None:
        self.module, self.most = weakref.ref(module), most
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All of them, the new ones at the end. Memory for them doubles when it is full."""
        self.keys = _appended(self.keys, keys, self.length, self.most)
        self.values = _appended(self.values, values, self.length, self.most)
        self.length += keys.shape[2]
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reorder(self, indices: Tensor) -> None:
        self.keys, self.values = (_taken(held, indices, self.length) for held in (self.keys, self.values))


class Memory(Past):
    """Those of an encoder's output, which are projected once."""

    def __init__(self, module: nn.Module, source: Tensor, masks: Masks) -> None:
        super().__init__(module)
        self.source = weakref.ref(source)
        self.masks = masks

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.length = keys.contiguous(), values.contiguous(), keys.shape[2]
        return self.keys, self.values

    def reorder(self, indices: Tensor) -> None:
        super().reorder(indices)
        attn_mask, key_mask, *rest = self.masks
        if attn_mask is not None and attn_mask.shape[0] > 1:
            attn_mask = attn_mask.index_select(0, indices)
        self.masks = Masks(attn_mask, None if key_mask is None else key_mask.index_select(0, indices), *rest)


def _appended(held: Tensor | None, new: Tensor, length: int, most: int | None) -> Tensor:
    batch, heads, count, width = new.shape
    end = length + count
    if held is None or end > held.shape[2]:
        larger = new.new_empty((batch, heads, most or max(_FIRST, 1 << (end - 1).bit_length()), width))
        if held is not None:
            larger[:, :, :length] = held[:, :, :length]
        held = larger
    held[:, :, length:end] = new
    return held


def _taken(held: Tensor | None, indices: Tensor, length: int) -> Tensor | None:
    if held is None:
        return None
    taken = held.new_empty((len(indices), *held.shape[1:]))
    taken[:, :, :length] = held[:, :, :length].index_select(0, indices)
    return taken


class KVCache:
    r"""The past of a decoder, for generation a token at a time: pass one to ``forward(..., cache=cache)``.

    :class:`TransformerDecoder`, :class:`TransformerEncoder` and their layers take it. Their input is then the new
    positions alone. These attend to all positions before them and to themselves: self-attention is causal. The keys and
    values of an encoder's output are projected once. Results are those of the whole sequence at its last positions,
    within rounding.

    Args:
        max_length: the most positions; there is memory for all of them at once. None: memory doubles when it is full.

    Raises:
        TypeError: max_length is no int.
        ValueError: max_length is below 1.

    Example:
        >>> layer = fusednorm.TransformerEncoderLayer(8, 2, 32, batch_first=True, norm_first=True).eval()
        >>> cache, x = fusednorm.KVCache(), torch.randn(2, 5, 8)
        >>> with torch.no_grad():
        ...     first, last = layer(x[:, :4], cache=cache), layer(x[:, 4:], cache=cache)
        >>> last.shape, cache.length
        (torch.Size([2, 1, 8]), 5)
    """

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None:
            check_count("max_length", max_length, 1)
        self.max_length = max_length
        self.reset()

    def reset(self) -> None:
        """Forget all positions, and the model."""
        self._own: dict[int, Past] = {}  # by id of an attention module
        self._across: dict[int, Memory] = {}
        self._hidden: Tensor | None = None  # (batch, positions): True where a position is padding
        self._next_hidden: Tensor | None = None

    def __repr__(self) -> str:
        return f"KVCache(length={self.length}, batch={self.batch}, max_length={self.max_length})"

    def __len__(self) -> int:
        return self.length

    @property
    def length(self) -> int:
        """Positions that every layer holds."""
        return min((past.length for past in self._own.values()), default=0)

    @property
    def batch(self) -> int | None:
        """Sequences; None before the first call."""
        return next((past.keys.shape[0] for past in self._own.values() if past.keys is not None), None)

    def hide(self, padding: Tensor) -> None:
        """Say which of the next positions are padding: no query attends to them.

        Args:
            padding: bool (batch, new positions), True hides.

        Raises:
            TypeError: padding is no bool tensor.
            ValueError: it is not two-dimensional.
        """
        _checks.check_is_tensor("padding", padding)
        if padding.dtype != torch.bool:
            raise TypeError(f"padding: expected bool (True: hidden), got {padding.dtype}; pass tokens == pad")
        if padding.ndim != 2:
            raise ValueError(f"padding: expected (batch, new positions), got shape {tuple(padding.shape)}")
        self._next_hidden = padding

    def positions(self, tokens: Tensor) -> Tensor:
        """Positions of the next tokens, int64, for an embedding: padding is not counted.

        Args:
            tokens: (batch, new positions).

        Returns:
            Of tokens' shape; at padding itself, that of the token before, or 0.
        """
        length = self.length
        shown = torch.ones_like(tokens, dtype=torch.int64) if self._next_hidden is None else ~self._next_hidden
        before = torch.full_like(tokens[:, :1], length, dtype=torch.int64)
        if self._hidden is not None:
            before = before - self._hidden[:, :length].sum(1, keepdim=True)
        return (before + shown.cumsum(1) - 1).clamp(min=0)

    def crop(self, length: int) -> None:
        """Forget all positions but the first `length`.

        Raises:
            TypeError: length is no int.
            ValueError: there are not so many.
        """
        check_count("length", length)
        if length > self.length:
            raise ValueError(f"length: expected at most {self.length}, the positions held, got {length}")
        for past in self._own.values():
            past.length = length
        if self._hidden is not None:
            self._hidden = self._hidden[:, :length]

    def reorder(self, indices: Tensor) -> None:
        """Take these sequences of the batch in this order, as beam search does; some may be left out or repeated.

        Args:
            indices: int64 (new batch,).

        Raises:
            TypeError: indices is no int64 tensor of one dimension.
            ValueError: an index is not of the batch, or there is no batch yet.
        """
        _checks.check_is_tensor("indices", indices)
        if indices.dtype != torch.int64 or indices.ndim != 1:
            raise TypeError(
                f"indices: expected int64 (new batch,), got {indices.dtype} of shape {tuple(indices.shape)}"
            )
        if self.batch is None:
            raise ValueError("indices: the cache holds no sequence yet; call the model first")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.batch:
            raise ValueError(f"indices: expected 0 to {self.batch - 1}, got {indices.tolist()}")
        for past in (*self._own.values(), *self._across.values()):
            past.reorder(indices)
        if self._hidden is not None:
            self._hidden = self._hidden.index_select(0, indices)

    # --- what the layers call ---

    def masks(self, modules: list[nn.Module], name: str, batch: int, count: int, padding: Tensor | None) -> Masks:
        """Those of `count` new positions of `batch` sequences, which these self-attentions are to append.

        `name` is the caller's for the new positions, `padding` the positions among them that it hides.
        """
        pasts = [self._own.get(id(module)) for module in modules]
        unknown = any(past is None or past.module() is not module for past, module in zip(pasts, modules))
        # one layer may be the next of a model that is called for the first time
        later = len(modules) > 1 or any(past.length > count for past in self._own.values())
        if self._own and unknown and later:
            raise ValueError(f"cache: holds {self.length} positions of another model; make a KVCache, or call reset()")
        start = pasts[0].length if pasts[0] is not None else 0
        end = start + count
        if self.batch not in (None, batch):
            raise ValueError(
                f"{name}: a batch of {batch}, and the cache holds {self.batch} sequences; call cache.reorder(indices), "
                "or make a new KVCache"
            )
        if self.max_length is not None and end > self.max_length:
            raise ValueError(
                f"{name}: {count} new positions after {start} are over the cache's max_length {self.max_length}; make "
                "a KVCache with a larger one"
            )
        hidden = self._hide(batch, start, end, padding)
        return Masks(None, None if hidden is None else ~hidden, count > 1, lower_right=start > 0)

    def _hide(self, batch: int, start: int, end: int, padding: Tensor | None) -> Tensor | None:
        """What is hidden of the first `end` positions. The first layer of a step says it for all."""
        told = 0 if self._hidden is None else self._hidden.shape[1]
        if told >= end and padding is None:
            return self._hidden if self._hidden is None else self._hidden[:, :end]
        padding = self._next_hidden if padding is None else padding
        self._next_hidden = None
        if padding is None and self._hidden is None:
            return None
        if padding is not None and padding.shape != (batch, end - start):
            raise ValueError(
                f"padding: expected {(batch, end - start)}, (batch, new positions), got {tuple(padding.shape)}"
            )
        held = self._hidden
        device = padding.device if padding is not None else held.device  # type: ignore[union-attr]
        before = torch.zeros(batch, start, dtype=torch.bool, device=device)
        if held is not None:
            before[:, : min(told, start)] = held[:, :start]
        new = torch.zeros(batch, end - start, dtype=torch.bool, device=device) if padding is None else padding
        self._hidden = torch.cat((before, new), 1)
        return self._hidden

    def own(self, module: nn.Module) -> Past:
        """The past of a self-attention."""
        past = self._own.get(id(module))
        if past is None or past.module() is not module:
            past = self._own[id(module)] = Past(module, self.max_length)
        return past

    def across(self, module: nn.Module, source: Tensor | None) -> Memory | None:
        """What is held of an attention to an encoder's output; None before its first call."""
        past = self._across.get(id(module))
        if past is None or past.module() is not module:
            return None
        if source is not None and past.source() is not source:
            raise ValueError(
                "memory: is another tensor than the one whose keys and values the cache holds; pass that one, with "
                "cache.reorder(indices) for a part of its batch, or make a new KVCache"
            )
        return past

    def remember(self, module: nn.Module, source: Tensor, masks: Masks) -> Memory:
        """For the first call of an attention to an encoder's output."""
        memory = self._across[id(module)] = Memory(module, source, masks)
        return memory


def check_no_graph(*tensors: Any) -> None:
    """Raise ValueError where a graph would be recorded of what a cache overwrites."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        raise ValueError("cache: is for generation, and keeps no graph; call the model under torch.no_grad()")
