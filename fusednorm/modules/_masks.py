"""The masks of the attention modules: what torch.nn takes, checked, and the form that the attention function takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _autocast
from .._checks import check_same_device
from .._transforms import readable

_LOW = (torch.float16, torch.bfloat16)


class Masks(NamedTuple):
    """In the functional form: True means attend."""

    attn_mask: Tensor | None = None  # broadcasts to (batch, heads, queries, keys); bool, or added to the logits
    key_mask: Tensor | None = None  # (batch, keys), bool
    is_causal: bool = False
    lower_right: bool = False  # the last query sees all keys, as where the keys have a past


class Names(NamedTuple):
    """What the caller calls its masks."""

    attn_mask: str = "attn_mask"
    key_padding_mask: str = "key_padding_mask"
    is_causal: str = "is_causal"
    query: str = "query"


_NAMES = Names()


class Sizes(NamedTuple):
    batch: int
    heads: int
    queries: int
    keys: int
    batched: bool = True


def _check_dtype(name: str, mask: Any, query: Tensor, query_name: str) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(mask).__name__}")
    if mask.is_nested or mask.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {mask.layout}")
    known = (torch.bool, torch.float32, query.dtype)
    if mask.dtype in known or (mask.dtype in _LOW and _autocast.enabled(query.device.type)):
        check_same_device(name, mask, query_name, query)
        return
    floats = "float32" if query.dtype == torch.float32 else f"float32 or {query_name}'s {query.dtype}"
    if mask.is_floating_point():
        remedy = f"convert it with .to({query.dtype})"
    else:
        remedy = f"pass {name} == 0 if 0 hides, as in a tokenizer's mask, or {name} != 0 if 0 keeps"
    raise TypeError(
        f"{name}: expected bool (True: hidden) or {floats} (added to the logits), got {mask.dtype}; {remedy}"
    )


def _attn_mask(mask: Tensor, name: str, sizes: Sizes) -> Tensor:
    """(L, S) as it is, (N * heads, L, S) in four dimensions."""
    _, heads, queries, keys, batched = sizes
    full = (sizes.batch * heads, queries, keys)
    if mask.shape not in (full, full[1:]):
        rows = "N * num_heads" if batched else "num_heads"
        raise ValueError(
            f"{name}: expected shape {full[1:]}, (query positions, key positions), or {full}, "
            f"({rows}, query positions, key positions), got {tuple(mask.shape)}"
        )
    return mask if mask.ndim == 2 else mask.reshape(sizes.batch, heads, queries, keys)


def _key_padding_mask(mask: Tensor, name: str, sizes: Sizes) -> Tensor:
    expected = (sizes.batch, sizes.keys) if sizes.batched else (sizes.keys,)
    if mask.shape != expected:
        form = "(N, key positions)" if sizes.batched else "(key positions,)"
        raise ValueError(f"{name}: expected shape {expected}, {form}, got {tuple(mask.shape)}")
    return mask.reshape(sizes.batch, sizes.keys)


def _hides_or_not(mask: Tensor) -> bool:
    """Whether an additive mask holds nothing but 0 and -inf, where a look at it costs nothing."""
    if mask.device.type != "cpu" or mask.requires_grad or not readable(mask):
        return False
    return bool(((mask == 0) | (mask == -torch.inf)).all())


def prepare(
    attn_mask: Any,
    key_padding_mask: Any,
    is_causal: bool,
    query: Tensor,
    sizes: Sizes,
    names: Names = _NAMES,
    *,
    verified: bool = False,
    need_weights: bool = False,
) -> Masks:
    """The three masks of a torch.nn module as one value.

    `is_causal` is torch's hint that `attn_mask` is the causal mask. Where torch goes by the hint alone, which is
    without a padding mask and without weights, so is done here: the mask is checked but not read. Elsewhere the mask
    alone counts, unless the hint is `verified`.

    A padding mask stays (batch, keys); an additive one is a bias of (batch, 1, 1, keys), which is never expanded unless
    there is an `attn_mask` to add it to.

    Raises:
        TypeError: a mask is neither bool nor of the input's dtype (or float32).
        ValueError: a mask's shape or device does not fit, or the hint comes without its mask.
    """
    if attn_mask is not None:
        _check_dtype(names.attn_mask, attn_mask, query, names.query)
        attn_mask = _attn_mask(attn_mask, names.attn_mask, sizes)
    elif is_causal and not verified:
        raise ValueError(
            f"{names.is_causal}: is a hint that {names.attn_mask} is the causal mask, and there is none; pass "
            "torch.nn.Transformer.generate_square_subsequent_mask(length) with it"
        )
    if key_padding_mask is not None:
        _check_dtype(names.key_padding_mask, key_padding_mask, query, names.query)
        key_padding_mask = _key_padding_mask(key_padding_mask, names.key_padding_mask, sizes)
    is_causal = is_causal and (verified or (key_padding_mask is None and not need_weights))
    if is_causal:
        attn_mask = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask
    if key_padding_mask is None:
        return Masks(attn_mask, None, is_causal)
    if key_padding_mask.dtype == torch.bool:
        return Masks(attn_mask, ~key_padding_mask, is_causal)
    if _hides_or_not(key_padding_mask):
        return Masks(attn_mask, key_padding_mask == 0, is_causal)
    bias = key_padding_mask[:, None, None]
    if attn_mask is None:
        return Masks(bias, None, is_causal)
    if attn_mask.dtype == torch.bool:
        return Masks(torch.where(attn_mask, bias, -torch.inf), None, is_causal)
    return Masks(attn_mask + bias, None, is_causal)


def pad_for_extra_keys(masks: Masks, extra: int) -> Masks:
    """For keys appended at the end, which every query sees."""
    attn_mask, key_mask, is_causal, lower_right = masks
    if attn_mask is not None:
        attn_mask = torch.nn.functional.pad(attn_mask, (0, extra), value=attn_mask.dtype == torch.bool)
    if key_mask is not None:
        key_mask = torch.nn.functional.pad(key_mask, (0, extra), value=True)
    return Masks(attn_mask, key_mask, is_causal, lower_right)
