"""Attention masks of Hugging Face models: described by a key mask and a band, built in full where that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

hf: Any = import_module("transformers.masking_utils")
is_tracing: Callable[..., bool] = import_module("transformers.utils.import_utils").is_tracing

# Nested functions of one outer function share their code object, whatever they enclose.
_AND = hf.and_masks(hf.causal_mask_function).__code__
_LEFT_WINDOW = hf.sliding_window_overlay(1).__code__
_WINDOW = hf.sliding_window_bidirectional_overlay(1).__code__

_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "grad_fn", "is_meta")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.ndimension, Tensor.is_floating_point, Tensor.__len__}


class Pattern(NamedTuple):
    """What a mask lets through: query i sees key j where all of these hold."""

    key_mask: Tensor | None  # bool (B, Sk): it is True for j
    is_causal: bool  # j <= i + off
    window: tuple[int | None, int | None] | None  # i + off - left <= j <= i + off + right
    causal_align: str  # "lower_right": off = Sk - Sq, "upper_left": off = 0

    def full(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
        """bool, broadcasts to (B, 1, Sq, Sk)."""
        off = n_keys - n_queries if self.causal_align == "lower_right" else 0
        ahead = torch.arange(n_keys, device=device) - torch.arange(n_queries, device=device)[:, None] - off
        seen = torch.ones_like(ahead, dtype=torch.bool)
        left, right = self.window or (None, None)
        if self.is_causal:
            seen &= ahead <= 0
        if left is not None:
            seen &= ahead >= -left
        if right is not None:
            seen &= ahead <= right
        return seen[None, None] if self.key_mask is None else seen & self.key_mask[:, None, None, :]


class PatternMask(Tensor):
    """A bool mask (B, 1, Sq, Sk) that is a :class:`Pattern` until an operation reads it.

    Models index masks, add to them and join them. Each of these sees the full mask, which is built once and kept.
    """

    pattern: Pattern
    _full: Tensor | None

    @staticmethod
    def of(pattern: Pattern, size: tuple[int, int, int], device: torch.device) -> PatternMask:
        batch, n_queries, n_keys = size
        memory = torch.empty((), dtype=torch.bool, device=device).expand(batch, 1, n_queries, n_keys)
        mask: PatternMask = Tensor._make_subclass(PatternMask, memory)
        mask.pattern, mask._full = pattern, None
        return mask

    def full(self) -> Tensor:
        """The mask as a plain tensor, in memory of its own."""
        if self._full is None:
            batch, _, n_queries, n_keys = self.shape
            full = self.pattern.full(n_queries, n_keys, self.device)
            self._full = full.expand(batch, 1, n_queries, n_keys).contiguous()
        return self._full

    def described(self) -> Pattern | Tensor:
        """The pattern, or the full mask if an operation has had it and may have written to it."""
        return self.pattern if self._full is None else self._full

    def _moved(self, *args: Any, **kwargs: Any) -> Tensor:
        probe = torch.empty((), dtype=torch.bool, device=self.device).to(*args, **kwargs)
        if probe.dtype != torch.bool or self._full is not None:
            return self.full().to(*args, **kwargs)
        if probe.device == self.device:
            return self
        keys = self.pattern.key_mask
        pattern = self.pattern._replace(key_mask=keys if keys is None else keys.to(probe.device))
        batch, _, n_queries, n_keys = self.shape
        return PatternMask.of(pattern, (batch, n_queries, n_keys), probe.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **kwargs)
            if func is Tensor.to and not any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values())):
                return args[0]._moved(*args[1:], **kwargs)
            args, kwargs = torch.utils._pytree.tree_map_only(PatternMask, PatternMask.full, (args, kwargs))
        return func(*args, **kwargs)


def is_key_mask(mask: Tensor, query: Tensor) -> bool:
    """Of two dimensions and the batch's size; a floating-point one that may be (Sq, Sk) is that."""
    if mask.ndim != 2:
        return False
    if mask.is_floating_point() and mask.shape[0] == query.shape[-2]:
        return False
    return mask.shape[0] in (1, query.shape[0])


def of_one_length(key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys of a cache that is not full yet are those that the mask has; of a window's cache, the mask's last."""
    n_keys = min(key.shape[-2], mask.shape[-1])
    return key[..., :n_keys, :], value[..., :n_keys, :], mask[:, -n_keys:].to(torch.bool)


def with_bias(bias: Tensor, mask: Tensor | None, query: Tensor) -> Tensor:
    bias = bias if bias.dtype in (torch.float32, query.dtype) else bias.to(query.dtype)
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _enclosed(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _band(function: Any) -> tuple[bool, int | None, int | None] | None:
    """(is_causal, left, right) of a mask function that is a band around the diagonal; None if it is something else."""
    if function is hf.causal_mask_function:
        return True, None, None
    if function is hf.bidirectional_mask_function:
        return False, None, None
    code = getattr(function, "__code__", None)
    if code is _LEFT_WINDOW:
        return False, _enclosed(function, "sliding_window") - 1, None
    if code is _WINDOW:
        size = _enclosed(function, "sliding_window")
        return False, size, size
    if code is not _AND:
        return None
    bands = [_band(part) for part in _enclosed(function, "mask_functions")]
    causal, lefts, rights = False, [], []
    for band in bands:
        if band is None:
            return None
        causal |= band[0]
        lefts += [] if band[1] is None else [band[1]]
        rights += [] if band[2] is None else [band[2]]
    return causal, min(lefts, default=None), min(rights, default=None)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable = hf.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask that ``transformers`` asks for, as its ``sdpa_mask`` gives it, where need be.

    A causal, bidirectional or sliding-window mask, with any padding, becomes a :class:`PatternMask`. Everything else
    is built in full: packed sequences, chunks, prefixes, functions of the user's, static caches, traced programs.

    Args:
        batch_size, q_length, kv_length: B, Sq and Sk.
        q_offset, kv_offset: positions of the first query and of the first key.
        mask_function: (batch, head, query, key) -> bool, of positions.
        attention_mask: bool (B, at most kv_offset + Sk), True: not padding.

    Returns:
        bool, broadcasts to (B, 1, Sq, Sk), True: attend; or None, where the module's ``is_causal`` says all.

    Source: ``sdpa_mask`` of transformers 5.24.

    Example:
        >>> from fusednorm.integrations.transformers import attention_mask
        >>> attention_mask(1, 2, 3, attention_mask=torch.tensor([[False, True, True]]), q_offset=1)
        tensor([[[[False,  True, False],
                  [False,  True,  True]]]])
    """
    lengths = (batch_size, q_length, kv_length)
    band = None if use_vmap or is_tracing(attention_mask) else _band(mask_function)
    skip = False if band is None else allow_is_causal_skip if band[0] else allow_is_bidirectional_skip
    known = all(type(n) is int for n in (*lengths, q_offset, kv_offset))
    lower_right = known and bool(q_offset - kv_offset == kv_length - q_length)
    aligned = lower_right or (known and q_offset == kv_offset)
    if band is None or not skip or not aligned:
        # None is to mean what it means in the attention function: the last query sees every key
        all_seen = q_length == kv_length or (q_length == 1 and (lower_right or not known))
        allow_is_causal_skip = allow_is_causal_skip and all_seen
        return hf.sdpa_mask(
            *(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size),
            *(allow_is_causal_skip, allow_is_bidirectional_skip),
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
    key_mask = hf.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if key_mask is not None:
        key_mask = key_mask.to(torch.bool)[:, int(kv_offset) : int(kv_offset) + kv_length]
        key_mask = None if bool(key_mask.all()) else key_mask
    is_causal, left, right = band
    off = int(q_offset - kv_offset)
    left = None if left is None or off + q_length - 1 <= left else left  # it reaches the first key from everywhere
    right = None if right is None or kv_length - 1 - off <= right else right
    window = None if left is right is None else (left, right)
    if q_length == 1 and lower_right:
        is_causal = False  # the last query sees every key
    # where there is a window, only where sdpa_mask gives None too: attention code of the model's own may read it
    narrow = local_size is None or kv_length < local_size
    if key_mask is window is None and narrow and (not is_causal or q_length == kv_length):
        return None
    pattern = Pattern(key_mask, is_causal, window, "lower_right" if lower_right else "upper_left")
    return PatternMask.of(pattern, lengths, torch.device(device))
