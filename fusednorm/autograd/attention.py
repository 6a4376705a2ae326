"""The way down from the attention functions: choice of provider, and the autograd Function over our kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .. import _onnx, _ops, dispatch, dropout
from .._options import AttentionInputs, AttentionOptions
from .._transforms import batched, dealias_for_compile, recorded, traced, transform_active, wants_gradients
from ..dispatch import rules_attention as rules
from ..providers.reference import attention as reference
from . import attention_torch

_is_compiling = torch.compiler.is_compiling


def run(
    call: str, inputs: AttentionInputs, options: AttentionOptions, return_lse: bool, dims: int = 4
) -> tuple[Tensor, Tensor | None]:
    """Choose the way down once, and take it: (out, lse). The operands had `dims` dimensions as they were given."""
    if transform_active():
        how = "elementary operators, because a torch.func transform or forward-mode AD is active"
        dispatch.record(dispatch.Decision(call, "reference", how))
        return reference.attention(dropout.with_seed(inputs, options), options)
    provider, refusals = dispatch.choose("attention_fwd", inputs, options)
    asked = dispatch.requested()
    if asked == "torch" and return_lse:
        raise ValueError(
            "provider 'torch' cannot run attention_fwd: torch's attention returns no log-sum-exp; leave `return_lse` "
            "out, or the request, for automatic choice"
        )
    needs_grad = wants_gradients(inputs)
    differs = rules.why_not_torch(inputs, options, return_lse, provider, dims, needs_grad) if asked is None else ""
    torchs = asked == "torch" or (asked is None and not differs)
    if provider == "torch" and not torchs:
        provider = "reference"
    if not dispatch.automatic:
        how = "one fused op each way"
        if differs:
            refusals = (*[r for r in refusals if r[0] != "torch"], ("torch's own operator", differs))
        elif torchs:
            refusals += ((provider, "torch's own operator means the same here"),) if provider != "torch" else ()
            provider, how = "torch", rules.how_torch_serves(inputs, options, asked)
        dispatch.record(dispatch.Decision(call, provider, how, refusals))
    if traced() and _onnx.exporting():
        return _onnx.attention(inputs, options, return_lse, dims), None
    if torchs:
        return attention_torch.run_torch(inputs, options, needs_grad, dims), None
    inputs = dropout.with_seed(inputs, options)
    if recorded():
        return _ops.recorded("attention_fwd", inputs, options)
    if needs_grad:
        if _is_compiling():
            return AttentionFunction.apply(*dealias_for_compile(inputs), *options, provider)
        if is_functorch_wrapped_tensor(inputs.q):  # escaped from a transform that has ended
            return AttentionFunction.apply(*inputs, *options, provider)
        return _apply(*inputs, *options, provider)
    return _ops.call("attention_fwd", inputs, options, provider=provider)


class AttentionFunction(torch.autograd.Function):
    """One op forward, one op backward. What is kept: the inputs, the output, and one number a query (lse).

    Under ``create_graph=True`` the backward is the reference's differentiable one.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        inputs, options = AttentionInputs(*args[:8]), AttentionOptions(*args[8:17])
        out, lse = _ops.call("attention_fwd", inputs, options, provider=args[-1])
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
    if not _is_compiling() and (torch.is_grad_enabled() or batched(dout, dlse)):
        gradients = reference.attention_gradients(dout, dlse, inputs, options, wanted)
    else:
        gradients = _ops.call("attention_bwd", dout, dlse, inputs, out, lse, options, wanted, provider=provider)
    return tuple([g if want else None for g, want in zip(gradients, wanted, strict=True)])


def shortcut_backward(
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
    """What the shortcut's node leaves to Python: derivatives of its gradients, and tensors that are not plain."""
    if not native:
        return attention_torch.torch_gradients(dout, q, k, v, out, lse, None, causal, scale)
    options = AttentionOptions(q.shape[2], k.shape[2], scale, 0.0, causal, False, window_left, window_right)
    inputs = AttentionInputs(q, k, v, None, key_mask)
    return attention_backward(dout, None, inputs, out, lse, options, [*wanted, False], "cpu")[:3]
