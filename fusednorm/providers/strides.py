"""How tensors lie in memory, as every provider's kernels are told; and a gradient that follows from a layout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def rows_like(tensor: Tensor, device: str | None = None) -> Tensor:
    """Memory for a result of `tensor`'s shape that lies as it does, or contiguously where its last stride is not 1.

    Torch's attention gives the same layouts, so that ``view`` works where it works there.
    """
    if tensor.stride(-1) == 1:
        return torch.empty_like(tensor, device=device)
    return tensor.new_empty(tensor.shape, device=device)


def row_major(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes and strides of a contiguous tensor."""
    strides = itertools.accumulate(reversed(shape[1:]), lambda stride, n: stride * max(n, 1), initial=1)
    return tuple(shape), tuple(strides)[::-1]


def is_plain(parameter: Tensor) -> bool:
    """Whether memory holds its elements one after another."""
    return parameter.is_contiguous() and not parameter.is_neg()


def contiguous(parameter: Tensor | None) -> Tensor | None:
    """A parameter as kernels read it: one after another."""
    if parameter is None or is_plain(parameter):
        return parameter
    return parameter.resolve_neg().contiguous()


def folded(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of the fewest dimensions that address the same elements in the same order."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    return groups


def gradient_of_shifts(dmask: Tensor, dlse: Tensor | None, lse: Tensor) -> None:
    """Of a mask that is broadcast along the keys: it moves all logits of a query, which the lse alone is told by."""
    if dlse is None:
        dmask.zero_()
    else:
        seen = torch.where(lse > -math.inf, dlse, 0.0)
        dmask.copy_(seen[..., None].sum_to_size(*[1] * (4 - dmask.ndim), *dmask.shape).view(dmask.shape))
