"""The plans of the attention functions, and the autograd Function over our kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _onnx
from .._options import AttentionInputs, AttentionOptions
from .._transforms import traced, wants_gradients
from ..dispatch import eager, rules_attention, settings
from ..dispatch.resolve import Request, resolve
from ..dispatch.settings import Decision
from ..providers.reference import attention as reference
from . import attention_torch, plans

Plan = Callable[[AttentionInputs], tuple[Tensor, Tensor | None]]


def plan(call: str, inputs: AttentionInputs, options: AttentionOptions, return_lse: bool, dims: int = 4) -> Plan:
    """The callable that maps the inputs of this call to (out, lse). The operands were given in `dims` dimensions."""
    request = Request(call, "attention_fwd", inputs, options, None, return_lse, dims)
    return _plan(request, resolve(request))


def plan_by_values(
    call: str, inputs: AttentionInputs, options: AttentionOptions, return_lse: bool, dims: int = 4
) -> Plan:
    """The plan of all calls of a signature. Where the values of operands decide, it checks them in each call."""
    request = Request(call, "attention_fwd", inputs, options, None, return_lse, dims)
    if settings.requested() is not None or not rules_attention.values_decide(inputs, options):
        return _plan(request, resolve(request))
    decisions = {bounded: resolve(request._replace(bounded=bounded)) for bounded in (True, False)}
    if decisions[True].provider == decisions[False].provider:
        return _plan(request, decisions[True])
    ready = {bounded: _plan(request, decision) for bounded, decision in decisions.items()}
    return functools.partial(_by_values, bounded=rules_attention.bounded_check(), ready=ready)


def _plan(request: Request, decision: Decision) -> Plan:
    inputs, options = request.inputs, request.options
    assert isinstance(inputs, AttentionInputs) and isinstance(options, AttentionOptions)
    if decision.elementary:
        return plans.elementary(reference.attention, options)
    if traced() and _onnx.exporting():
        return lambda inputs: (_onnx.attention(inputs, options, request.return_lse, request.dims), None)
    if decision.provider == "torch":
        return attention_torch.plan(inputs, options, wants_gradients(inputs), request.dims)
    return plans.fused("attention_fwd", AttentionFunction, inputs, options, decision.provider)


def _by_values(
    inputs: AttentionInputs, bounded: Callable[[Tensor, Tensor, Tensor], bool], ready: dict[bool, Plan]
) -> tuple[Tensor, Tensor | None]:
    return ready[bounded(*inputs[:3])](inputs)


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
    provider: str,
    causal: bool,
    window_left: int,
    window_right: int,
    *wanted: bool,
) -> tuple[Tensor | None, ...]:
    """What the fast path's node leaves to Python: derivatives of its gradients, and tensors that are not plain."""
    if provider == "torch":
        return attention_torch.torch_gradients(dout, q, k, v, out, lse, None, causal, scale)
    options = AttentionOptions(q.shape[2], k.shape[2], scale, 0.0, causal, False, window_left, window_right)
    inputs = AttentionInputs(q, k, v, None, key_mask)
    return attention_backward(dout, None, inputs, out, lse, options, [*wanted, False], provider)[:3]
