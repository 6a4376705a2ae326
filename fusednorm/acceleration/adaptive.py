"""What rewritten methods make of gates and modulations: one vector for each sample, or one for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PARAMETERS = (nn.Parameter, Tensor)  # not a sharded one


class Gate(NamedTuple):
    """A product with a gate as a step between a branch and the sum.

    Attributes:
        gate: what the method multiplies by, without a dimension that it adds for that.
        product: the method's own product.
        unsqueezed: whether the method adds a dimension after the first.
    """

    gate: Any
    product: Callable[[Any], Any]
    unsqueezed: bool = False

    def __call__(self, branch: Any) -> Any:
        return self.product(branch)


class Gated(NamedTuple):
    """``gate(branch)``, not computed yet: the sum that reads it does that."""

    branch: Any
    gate: Gate


class Normed(NamedTuple):
    """``norm(x)``, not computed yet: the modulation that reads it does that."""

    norm: Any
    x: Tensor


def vectors(given: Any, like: Tensor, unsqueezed: bool) -> Tensor | None:
    """`given` as the norm functions take it, or None: no vector for each sample of `like`, or of another dtype."""
    if type(given) not in PARAMETERS or given.dtype is not like.dtype or given.device != like.device:
        return None
    sizes = tuple(given.shape)
    if like.ndim < 3 or not like.numel() or not sizes or sizes[-1] != like.shape[-1]:
        return None
    if given.is_inference() and not torch.is_inference_mode_enabled():  # torch says what cannot be differentiated
        return None
    if len(sizes) == 1:
        return None if unsqueezed else given.unsqueeze(0)
    fits = len(sizes) + unsqueezed == like.ndim and sizes[0] in (1, like.shape[0])
    return given if fits and all(size == 1 for size in sizes[1:-1]) else None
