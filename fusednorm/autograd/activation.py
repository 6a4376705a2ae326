"""The plans of ``bias_act_dropout``, and its autograd Function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._activations import TABLE
from .._options import ActivationInputs, ActivationOptions
from ..dispatch import eager
from ..dispatch.resolve import Request, resolve
from ..providers.reference import activation as reference
from ..providers.torch import activation as torch_activation
from . import plans


def plan(inputs: ActivationInputs, options: ActivationOptions) -> Callable[[ActivationInputs], Tensor]:
    """The callable that maps the inputs of this call, and of all calls of its signature, to the result."""
    op = "bias_act_dropout_fwd"
    decision = resolve(Request("bias_act_dropout", op, inputs, options))
    if decision.elementary:
        return plans.elementary(reference.bias_act_dropout_fwd, options)
    if decision.provider == "torch":  # in any grad mode: reentrant checkpointing runs a call in both
        return functools.partial(torch_activation.bias_act_dropout, options=options)
    return plans.fused(op, BiasActDropoutFunction, inputs, options, decision.provider)


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
