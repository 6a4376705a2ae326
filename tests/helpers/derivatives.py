"""Gradients of some leaves alone, and under activation checkpointing: one body for every operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from shapes import outputs_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def assert_gradients(
    run: Callable[[Mapping[str, Tensor]], Any],
    leaves: Mapping[str, Tensor],
    second: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """First and second derivatives are those of finite differences; `second` are options of the second alone."""
    given = tuple(leaf.requires_grad_() for leaf in leaves.values())

    def function(*tensors: Tensor) -> Any:
        return run(dict(zip(leaves, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, given, **options)
    assert torch.autograd.gradgradcheck(function, given, **options, **(second or {}))


def gradients_of(
    wanted: Sequence[str],
    run: Callable[[Mapping[str, Tensor]], Any],
    leaves: Mapping[str, Tensor],
    cotangents: Sequence[Tensor],
) -> dict[str, Tensor | None]:
    """By name, where no other leaf requires a gradient; an output that hangs on none of them is left out."""
    fresh = {name: leaf.detach().clone().requires_grad_(name in wanted) for name, leaf in leaves.items()}
    outputs = outputs_of(run(fresh))
    outputs, given = zip(*[(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad])
    found = torch.autograd.grad(outputs, [fresh[name] for name in wanted], given, allow_unused=True)
    assert all(leaf.grad is None for leaf in fresh.values())
    return dict(zip(wanted, found, strict=True))


def kept_and_recomputed(
    function: Callable[..., Any],
    args: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    use_reentrant: bool,
    parameters: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and every gradient from one state of the generator, without checkpointing and with it.

    Gradients by `backward`, and by `torch.autograd.grad` too, which reentrant checkpointing does not take.
    """
    leaves, runs = (*args, *parameters), []
    for run in (function, lambda *args: checkpoint(function, *args, use_reentrant=use_reentrant)):
        runs.append([])
        for by_grad in (False,) if use_reentrant else (False, True):
            torch.manual_seed(3)
            outputs = outputs_of(run(*args))
            torch.rand(5, device=args[0].device)  # the generator moves on between forward and backward
            for leaf in leaves:
                leaf.grad = None
            if by_grad:
                found = torch.autograd.grad(outputs, leaves, cotangents)
            else:
                torch.autograd.backward(outputs, cotangents)
                found = [leaf.grad for leaf in leaves]
            runs[-1] += [*(output.detach() for output in outputs), *found]
    return runs[0], runs[1]


def of_every_kind(
    run: Callable[[Mapping[str, Tensor]], Any],
    leaves: Mapping[str, Tensor],
    names: tuple[str, str],
    weights: Tensor,
    tangent: Tensor,
) -> tuple[Any, ...]:
    """grad, jvp by the first leaf named, the Hessian of the second by forward over reverse, gradients of each sample.

    Of a non-linear function of the result, so that second derivatives by the cotangent's path count too.
    """
    first, second = names
    batch = torch.stack([leaves[first] + i for i in range(3)])

    def value(leaves: Mapping[str, Tensor]) -> Tensor:
        return (torch.sin(outputs_of(run(leaves))[0]) * weights).sum()

    return (
        torch.func.grad(value)(leaves),
        torch.func.jvp(lambda t: outputs_of(run(leaves | {first: t}))[0], (leaves[first],), (tangent,)),
        torch.func.hessian(lambda t: value(leaves | {second: t}))(leaves[second]),
        torch.vmap(lambda t: torch.func.grad(value)(leaves | {first: t}))(batch),
    )
