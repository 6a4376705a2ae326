"""The way down from the attention functions: the autograd Function over our kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .. import _onnx, dropout
from .._options import AttentionInputs, AttentionOptions
from .._transforms import dealias_for_compile, recorded, traced, wants_gradients
from ..dispatch import eager, rules_attention, settings
from ..dispatch.resolve import ELEMENTARY, Request, resolve
from ..dispatch.settings import Decision
from ..providers.reference import attention as reference
from . import attention_torch

Way = Callable[[AttentionInputs], tuple[Tensor, Tensor | None]]


def way(call: str, inputs: AttentionInputs, options: AttentionOptions, return_lse: bool, dims: int = 4) -> Way:
    """The way down of a call: what makes (out, lse) of its tensors. The operands were given in `dims` dimensions."""
    request = Request(call, "attention_fwd", inputs, options, None, return_lse, dims)
    return _way(request, resolve(request))


def way_of_all(call: str, inputs: AttentionInputs, options: AttentionOptions, return_lse: bool, dims: int = 4) -> Way:
    """The way down of all calls of a signature. Where the operands' values decide, each call's are checked."""
    request = Request(call, "attention_fwd", inputs, options, None, return_lse, dims)
    if settings.requested() is not None or not rules_attention.values_decide(inputs, options):
        return _way(request, resolve(request))
    decisions = {bounded: resolve(request._replace(bounded=bounded)) for bounded in (True, False)}
    if decisions[True].provider == decisions[False].provider:
        return _way(request, decisions[True])
    ways = {bounded: _way(request, decision) for bounded, decision in decisions.items()}
    return functools.partial(_by_values, bounded=rules_attention.bounded_check(), ways=ways)


def _way(request: Request, decision: Decision) -> Way:
    inputs, options = request.inputs, request.options
    assert isinstance(inputs, AttentionInputs) and isinstance(options, AttentionOptions)
    if decision.how == ELEMENTARY:
        return lambda inputs: reference.attention(dropout.with_seed(inputs, options), options)
    if traced() and _onnx.exporting():
        return lambda inputs: (_onnx.attention(inputs, options, request.return_lse, request.dims), None)
    needs_grad = wants_gradients(inputs)
    if decision.provider == "torch":
        return attention_torch.way(inputs, options, needs_grad, request.dims)
    if recorded():
        return lambda inputs: eager.recorded("attention_fwd", dropout.with_seed(inputs, options), options)
    if not needs_grad:
        run = eager.runner("attention_fwd", decision.provider, inputs)
        return functools.partial(_forward, options=options, run=run)
    apply = _apply
    if torch.compiler.is_compiling():  # such a way is never kept, so it may hold its tensors
        inputs, apply = dealias_for_compile(inputs), AttentionFunction.apply
        return lambda _: _differentiable(inputs, options, decision.provider, apply)
    if is_functorch_wrapped_tensor(inputs.q):  # escaped from a transform that has ended
        apply = AttentionFunction.apply
    return functools.partial(_differentiable, options=options, provider=decision.provider, apply=apply)


def _by_values(
    inputs: AttentionInputs, bounded: Callable[[Tensor, Tensor, Tensor], bool], ways: dict[bool, Way]
) -> tuple[Tensor, Tensor | None]:
    return ways[bounded(*inputs[:3])](inputs)


def _forward(inputs: AttentionInputs, options: AttentionOptions, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    return run(dropout.with_seed(inputs, options) if options.dropout_p else inputs, options)


def _differentiable(
    inputs: AttentionInputs, options: AttentionOptions, provider: str, apply: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    inputs = dropout.with_seed(inputs, options) if options.dropout_p else inputs
    return apply(*inputs, *options, provider)


class AttentionFunction(torch.autograd.Function):
    """One op forward, one op backward. What is kept: the inputs, the output, and one number a query (lse).

    Under ``create_graph=True`` the backward is the reference's differentiable one.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        inputs, options = AttentionInputs(*args[:8]), AttentionOptions(*args[8:17])
        out, lse = eager.call("attention_fwd", inputs, options, provider=args[-1])
        save(ctx, inputs, options, out, lse, args[-1])
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 18
        out, lse, *tensors = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        inputs, wanted = AttentionInputs(*tensors), list(ctx.needs_input_grad[:4])
        gradients = attention_backward(dout, dlse, inputs, out, lse, ctx.options, wanted, ctx.provider)
        return (*gradients, *[None] * 14)


# Function.apply itself, without the search of every argument for torch.func's wrappers: no transform is active here
_apply = super(torch.autograd.Function, AttentionFunction).apply


def save(ctx: Any, inputs: AttentionInputs, options: AttentionOptions, out: Tensor, lse: Tensor, provider: str) -> None:
    """Keep in `ctx` what the backward of `AttentionFunction` takes."""
    ctx.save_for_backward(out, lse, *inputs)
    ctx.options, ctx.provider = options, provider
    ctx.set_materialize_grads(False)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    wanted: list[bool],
    provider: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, v, attn_mask), None where not wanted."""
    gradients: tuple[Tensor | None, ...]
    if eager.differentiated(dout, dlse):
        gradients = reference.attention_gradients(dout, dlse, inputs, options, wanted)
    else:
        gradients = eager.call("attention_bwd", dout, dlse, inputs, out, lse, options, wanted, provider=provider)
    return tuple([g if want else None for g, want in zip(gradients, wanted, strict=True)])


def fastpath_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    scale: float,
    native: bool,
    causal: bool,
    window_left: int,
    window_right: int,
    *wanted: bool,
) -> tuple[Tensor | None, ...]:
    """What the fast path's node leaves to Python: derivatives of its gradients, and tensors that are not plain."""
    if not native:
        return attention_torch.torch_gradients(dout, q, k, v, out, lse, None, causal, scale)
    options = AttentionOptions(q.shape[2], k.shape[2], scale, 0.0, causal, False, window_left, window_right)
    inputs = AttentionInputs(q, k, v, None, key_mask)
    return attention_backward(dout, None, inputs, out, lse, options, [*wanted, False], "cpu")[:3]
