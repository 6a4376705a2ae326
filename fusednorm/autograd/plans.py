"""Plans: callables that map the input tensors of a call, and of every call of its signature, to the outputs.

The plans here run kernels of ours, or the reference's differentiable operators. Each operator's own file has those that
run torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

from .. import dropout
from .._options import Options
from .._transforms import dealias_for_compile, recorded, wants_gradients
from ..dispatch import eager


def elementary(forward: Callable[[Any, Any], Any], options: Options) -> Callable[[Any], Any]:
    """The reference's forward, made of ATen operators that every transform supports."""
    return lambda inputs: forward(dropout.with_seed(inputs, options), options)


def fused(
    op: str,
    function: type[torch.autograd.Function],
    inputs: Any,
    options: Options,
    provider: str,
    *rest: Any,
) -> Callable[[Any], Any]:
    """One op of a provider, inside its autograd Function where a gradient is wanted.

    `rest` is what the Function takes after the provider.
    """
    if recorded():  # a program that may run elsewhere: it names a provider only where one is requested
        return lambda inputs: eager.recorded(op, dropout.with_seed(inputs, options), options)
    draw = dropout.with_seed if options.dropped else None
    if not wants_gradients(inputs):
        run = eager.runner(op, provider, inputs, options)
        return run if draw is None else functools.partial(eager.forward, options=options, draw=draw, run=run)
    rest = provider, *rest
    if torch.compiler.is_compiling():  # such a plan is never kept, so it may hold its tensors
        inputs = dealias_for_compile(inputs)
        return lambda _: eager.differentiable(inputs, options, draw, function.apply, rest)
    # Function.apply itself, without the search of every argument for torch.func's wrappers: no transform is active
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    if is_functorch_wrapped_tensor(inputs[0]):  # escaped from a transform that has ended
        apply = function.apply
    return functools.partial(eager.differentiable, options=options, draw=draw, apply=apply, rest=rest)
