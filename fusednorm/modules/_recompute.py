"""A linear layer whose input is computed again in the backward instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._transforms import recorded, transform_active
from ..autograd.linear import linear

PARTS = ("norms", "activation", "attention")


def check(recompute: Any) -> tuple[str, ...]:
    """The parts of a layer that are rebuilt, without repetition.

    Raises:
        TypeError: no sequence of names.
        ValueError: a name is unknown.
    """
    if isinstance(recompute, str) or not isinstance(recompute, Iterable):
        raise TypeError(f"recompute: expected a sequence of names out of {PARTS}, got {recompute!r}")
    names = tuple(recompute)
    for name in names:
        if name not in PARTS:
            raise ValueError(f"recompute: {name!r} is none of {', '.join(map(repr, PARTS))}")
    return tuple(name for name in PARTS if name in names)


def linear_of(function: Callable[..., Tensor], weight: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """``F.linear(function(*tensors), weight)`` that keeps `tensors` and not what `function` makes of them.

    `function` looks at no other tensor and draws no random number: seeds are among the tensors.
    """
    if not torch.is_grad_enabled() or transform_active() or recorded():
        return linear(function(*tensors), weight)
    if torch.compiler.is_compiling():  # which cannot trace a backward that differentiates
        product: Callable[..., Tensor] = lambda w, *given: F.linear(function(*given), w)  # noqa: E731
        return checkpoint(product, weight, *tensors, use_reentrant=False, preserve_rng_state=False)
    return RecomputedLinearFunction.apply(function, weight, *tensors)


class RecomputedLinearFunction(torch.autograd.Function):
    """dW needs the input, which `function` gives once more, under the autocast of the forward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], weight: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, *tensors)
        kind = weight.device.type
        enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind) if enabled else None, enabled)
        ctx.function = function
        return linear(function(*tensors), weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        create_graph, need = torch.is_grad_enabled(), ctx.needs_input_grad[2:]
        kind, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled):
            # Fresh nodes: where one input was made of another, a gradient must stop at the first that it meets.
            # Views, as no tensor may be made to require a gradient under a vmap of the backward.
            fresh = [
                t if t is None else t.view_as(t) if n or create_graph else t.detach()
                for t, n in zip(tensors, need, strict=True)
            ]
            y = ctx.function(*fresh)
        dweight = None
        if ctx.needs_input_grad[1]:
            rows = y.shape[:-1].numel()  # for reshape: is_grads_batched knows no flatten
            dout_rows, y_rows = dout.reshape(rows, dout.shape[-1]), y.reshape(rows, y.shape[-1])
            dweight = (dout_rows.mT @ y_rows.to(dout.dtype)).to(weight.dtype)
        wanted = [t for t, n in zip(fresh, need, strict=True) if n and t is not None]
        gradients: tuple[Tensor, ...] = ()
        if wanted:
            dy = (dout @ weight.to(dout.dtype)).to(y.dtype)
            gradients = torch.autograd.grad(y, wanted, dy, create_graph=create_graph, allow_unused=True)
        found = iter(gradients)
        return None, dweight, *[next(found) if n and t is not None else None for t, n in zip(fresh, need, strict=True)]
