"""The way down from ``bias_act_dropout``: the autograd Function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .. import dropout
from .._activations import TABLE
from .._options import ActivationInputs, ActivationOptions
from .._transforms import dealias_for_compile, recorded, wants_gradients
from ..dispatch import eager
from ..dispatch.resolve import ELEMENTARY, Request, resolve
from ..providers.reference import activation as reference
from ..providers.torch import activation as torch_activation

Way = Callable[[ActivationInputs], Tensor]


def way(inputs: ActivationInputs, options: ActivationOptions) -> Way:
    """The way down of a call and of all that are like it: what makes the result of its tensors."""
    decision = resolve(Request("bias_act_dropout", "bias_act_dropout_fwd", inputs, options))
    if decision.how == ELEMENTARY:
        return functools.partial(_elementary, options=options)
    if decision.provider == "torch":  # whatever the grad mode: reentrant checkpointing runs a call with and without
        return functools.partial(torch_activation.bias_act_dropout, options=options)
    if recorded():
        return functools.partial(_recorded, options=options)
    if not wants_gradients(inputs):
        run = eager.runner("bias_act_dropout_fwd", decision.provider, inputs)
        return functools.partial(_forward, options=options, run=run)
    apply = _apply
    if torch.compiler.is_compiling():
        inputs, apply = dealias_for_compile(inputs), BiasActDropoutFunction.apply
        return lambda _: _differentiable(inputs, options, decision.provider, apply)
    if is_functorch_wrapped_tensor(inputs.x):  # escaped from a transform that has ended
        apply = BiasActDropoutFunction.apply
    return functools.partial(_differentiable, options=options, provider=decision.provider, apply=apply)


def _elementary(inputs: ActivationInputs, options: ActivationOptions) -> Tensor:
    return reference.bias_act_dropout_fwd(dropout.with_seed(inputs, options), options)


def _recorded(inputs: ActivationInputs, options: ActivationOptions) -> Tensor:
    return eager.recorded("bias_act_dropout_fwd", dropout.with_seed(inputs, options), options)


def _forward(inputs: ActivationInputs, options: ActivationOptions, run: Callable[..., Any]) -> Tensor:
    return run(dropout.with_seed(inputs, options) if options.dropout_p else inputs, options)


def _differentiable(
    inputs: ActivationInputs, options: ActivationOptions, provider: str, apply: Callable[..., Any]
) -> Tensor:
    inputs = dropout.with_seed(inputs, options) if options.dropout_p else inputs
    return apply(*inputs, *options, provider)


class BiasActDropoutFunction(torch.autograd.Function):
    """One op forward, one op backward. Saved are x, the bias and the seed.

    Under ``create_graph=True`` the backward is the reference's differentiable one.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs, options = ActivationInputs(*args[:3]), ActivationOptions(*args[3:5])
        ctx.save_for_backward(*inputs)
        ctx.options, ctx.provider = options, args[-1]
        return eager.call("bias_act_dropout_fwd", inputs, options, provider=args[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, wanted = ActivationInputs(*ctx.saved_tensors), list(ctx.needs_input_grad[:2])
        return (*activation_backward(dy, inputs, ctx.options, wanted, ctx.provider), None, None, None, None)


# Function.apply itself, without the search of every argument for torch.func's wrappers: no transform is active here
_apply = super(torch.autograd.Function, BiasActDropoutFunction).apply


def activation_backward(
    dy: Tensor, inputs: ActivationInputs, options: ActivationOptions, wanted: list[bool], provider: str
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, bias), None where not wanted."""
    if eager.differentiated(dy):
        gradients = reference.bias_act_dropout_bwd(dy, inputs, options, wanted)
    else:
        gradients = eager.call("bias_act_dropout_bwd", dy, inputs, options, wanted, provider=provider)
    return tuple([g if want else None for g, want in zip(gradients, wanted, strict=True)])


def fastpath_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    """What the fast path's node leaves to Python: derivatives of its gradients, and tensors that are not plain."""
    options = ActivationOptions(TABLE[activation].name, dropout_p)
    return activation_backward(dy, ActivationInputs(x, bias, seed), options, wanted, "cpu")
