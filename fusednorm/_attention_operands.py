"""Attention's arguments in the form that the ops take: operands of four dimensions, and numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _attention_checks as checks
from . import dropout
from ._checks import FLOAT_DTYPES
from ._transforms import traced

_UNBOUNDED = 2**62  # past any position, and a 64-bit number


def broadcast(
    query: Tensor, key: Tensor, value: Tensor, grouped: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Operands whose leading dimensions are alike but for the heads of groups, and query's leading dimensions."""
    leads = [tuple(t.shape[:-2]) for t in (query, key, value)]
    if grouped:
        if min(map(len, leads)) == 0:
            raise ValueError(
                "enable_gqa: expected a dimension of heads, (..., heads, sequence, head_dim); unsqueeze(0)"
            )
        n_heads = query.shape[-3]
        checks.check_heads("key", key.shape[-3], n_heads)
        checks.check_heads("value", value.shape[-3], n_heads)
        if key.shape[-3] != value.shape[-3]:  # no kernel takes that
            key, value = (t.repeat_interleave(n_heads // t.shape[-3], -3) for t in (key, value))
        leads = [(*lead[:-1], n_heads) for lead in leads]
    if leads[0] == leads[1] == leads[2]:
        return query, key, value, leads[0]
    try:
        lead = tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        name, other = ("key", leads[1]) if leads[1] != leads[0] else ("value", leads[2])
        raise ValueError(
            f"{name}: leading dimensions {other} do not broadcast with query's {leads[0]}; for fewer heads than "
            "query's pass enable_gqa=True"
        ) from None
    operands = []
    for tensor in (query, key, value):
        wanted = (*lead[:-1], tensor.shape[-3]) if grouped else lead
        operands.append(tensor.expand(*wanted, *tensor.shape[-2:]))
    return operands[0], operands[1], operands[2], lead


def four_dimensional(tensor: Tensor, batch: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
    if len(batch) == len(heads) == 1:
        return tensor
    n_heads = tensor.shape[-3] if heads else 1
    return tensor.reshape(math.prod(batch), n_heads, *tensor.shape[-2:])


def four_dimensional_mask(mask: Tensor, batch: tuple[int, ...], heads: tuple[int, ...]) -> Tensor:
    """Dimensions along which it is broadcast stay of size 1, but where only some of a batch's several do."""
    missing = len(batch) + len(heads) + 2 - mask.ndim
    shape = (1,) * missing + tuple(mask.shape)
    own, rest = shape[: len(batch)], shape[len(batch) :]
    mask = mask.reshape(shape)
    if own != batch and math.prod(own) != 1:
        mask, own = mask.expand(*batch, *rest), batch
    return mask.reshape(math.prod(own), *((1,) if not heads else ()), *rest)


def is_plain(query: Any, key: Any, value: Any, grouped: bool) -> bool:
    """Whether these are what the checks and the broadcasting below would let through as they are: the usual call."""
    if not type(query) is type(key) is type(value) is Tensor or query.ndim != 4 or query.dtype not in FLOAT_DTYPES:
        return False
    if query.is_nested or key.is_nested or value.is_nested:  # they have no shape
        return False
    shape, keys, values = query.shape, key.shape, value.shape
    return bool(
        len(keys) == len(values) == 4
        and shape[0] == keys[0]
        and (shape[1] == keys[1] or (grouped and keys[1] and shape[1] % keys[1] == 0))
        and shape[3] == keys[3] <= checks.MOST_HEAD_DIM >= values[3]
        and keys[:3] == values[:3]
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and query.layout == key.layout == value.layout == torch.strided
    )


def scale_of(scale: float | None, q: Tensor) -> float:
    if scale is None:
        width = int(q.shape[-1]) if traced() else q.shape[-1]  # of a traced size the root would be one in float32
        return 1.0 / width**0.5 if width else 1.0  # as torch computes it, to the last bit
    return scale


def seed_of(seed: int | Tensor | None, dropout_p: float, q: Tensor) -> Tensor | None:
    """None where the provider is to draw one: torch's operator draws its own mask."""
    return dropout.seed_tensor(seed, q.device) if dropout_p and seed is not None else None


def window_of(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    left, right = (None, None) if window is None else window
    return -1 if left is None else min(int(left), _UNBOUNDED), -1 if right is None else min(int(right), _UNBOUNDED)
