"""The way down from ``bias_act_dropout``: choice of provider, and the autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .. import _ops, dispatch, dropout
from .._activations import TABLE
from .._options import ActivationInputs, ActivationOptions
from .._transforms import batched, dealias_for_compile, recorded, transform_active, wants_gradients
from ..providers.reference import activation as reference
from ..providers.torch import activation as torch_activation


def run(inputs: ActivationInputs, options: ActivationOptions) -> Tensor:
    """Choose the way down once, and take it."""
    if transform_active():
        how = "elementary operators, because a torch.func transform or forward-mode AD is active"
        dispatch.record(dispatch.Decision("bias_act_dropout", "reference", how))
        return reference.bias_act_dropout_fwd(dropout.with_seed(inputs, options), options)
    provider, refusals = dispatch.choose("bias_act_dropout_fwd", inputs, options)
    if not dispatch.automatic:
        how = "torch's own operators" if provider == "torch" else "one fused op each way"
        dispatch.record(dispatch.Decision("bias_act_dropout", provider, how, refusals))
    if provider == "torch":  # whatever the grad mode: reentrant checkpointing runs a call once without and once with
        return torch_activation.bias_act_dropout(inputs, options)
    inputs = dropout.with_seed(inputs, options)
    if recorded():
        return _ops.recorded("bias_act_dropout_fwd", inputs, options)
    if not wants_gradients(inputs):
        return _ops.call("bias_act_dropout_fwd", inputs, options, provider=provider)
    if torch.compiler.is_compiling():
        return BiasActDropoutFunction.apply(*dealias_for_compile(inputs), *options, provider)
    if is_functorch_wrapped_tensor(inputs.x):  # escaped from a transform that has ended
        return BiasActDropoutFunction.apply(*inputs, *options, provider)
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
        return _ops.call("bias_act_dropout_fwd", inputs, options, provider=args[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, wanted = ActivationInputs(*ctx.saved_tensors), list(ctx.needs_input_grad[:2])
        return (*activation_backward(dy, inputs, ctx.options, wanted, ctx.provider), None, None, None, None)


# Function.apply itself, without the search of every argument for torch.func's wrappers: no transform is active here
apply = super(torch.autograd.Function, BiasActDropoutFunction).apply


def activation_backward(
    dy: Tensor, inputs: ActivationInputs, options: ActivationOptions, wanted: list[bool], provider: str
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, bias), None where not wanted."""
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or batched(dy)):
        gradients = reference.bias_act_dropout_bwd(dy, inputs, options, wanted)
    else:
        gradients = _ops.call("bias_act_dropout_bwd", dy, inputs, options, wanted, provider=provider)
    return tuple([g if want else None for g, want in zip(gradients, wanted, strict=True)])


def shortcut_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout_p: float,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    """What the shortcut's node leaves to Python: derivatives of its gradients, and tensors that are not plain."""
    options = ActivationOptions(TABLE[activation].name, dropout_p)
    return activation_backward(dy, ActivationInputs(x, bias, seed), options, wanted, "cpu")
