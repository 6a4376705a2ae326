"""Attention's operands in the four dimensions that kernels take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _attention_checks as checks


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
