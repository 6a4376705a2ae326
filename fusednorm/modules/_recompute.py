"""A linear layer whose input is computed again in the backward instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._transforms import transform_active

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
    if not torch.is_grad_enabled() or transform_active():
        return F.linear(function(*tensors), weight)
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
        return F.linear(function(*tensors), weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        create_graph, need = torch.is_grad_enabled(), ctx.needs_input_grad[2:]
        kind, dtype, enabled = ctx.autocast
        # aliases: one of the tensors may have been made of another, whose gradient is not to count what passes there
        inputs = [
            None if t is None else t.view_as(t) if create_graph else t.detach().requires_grad_(n)
            for t, n in zip(tensors, need, strict=True)
        ]
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled):
            y = ctx.function(*inputs)
        dweight = None
        if ctx.needs_input_grad[1]:
            rows, columns = (t.reshape(-1, t.shape[-1]) for t in (dout, y))
            dweight = (rows.mT @ columns.to(dout.dtype)).to(weight.dtype)
        wanted = [t for t, n in zip(inputs, need, strict=True) if n and t is not None]
        gradients: tuple[Tensor, ...] = ()
        if wanted:
            dy = (dout @ weight.to(dout.dtype)).to(y.dtype)
            gradients = torch.autograd.grad(y, wanted, dy, create_graph=create_graph, allow_unused=True)
        found = iter(gradients)
        return None, dweight, *[next(found) if n and t is not None else None for t, n in zip(inputs, need, strict=True)]
