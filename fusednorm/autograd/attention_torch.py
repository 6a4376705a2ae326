"""Torch's own attention, with the derivatives of second order that its kernels lack."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from .._options import AttentionInputs, AttentionOptions, from_flat
from .._transforms import batched, readable, traced
from ..dispatch import rules_attention as rules
from ..providers.reference import attention as reference
from ..providers.torch import attention as torch_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_is_compiling = torch.compiler.is_compiling
_run_backward = torch.autograd.Variable._execution_engine.run_backward


def run_torch(inputs: AttentionInputs, options: AttentionOptions, needs_grad: bool, dims: int) -> Tensor:
    q, k, v, attn_mask, key_mask, *_ = inputs
    if key_mask is not None and not (q.is_cpu and readable(q, k, v)):  # nobody sees these keys, and 0 * NaN is NaN
        k, v = (t.masked_fill(key_mask.logical_not()[:, None, :, None], 0.0) for t in (k, v))
        inputs = inputs._replace(k=k, v=v)
    flash = dims == 4 and rules.flash_takes(q, k, v) and not (attn_mask is not None and attn_mask.requires_grad)
    # what the CPU has besides is made of operators that are differentiable themselves
    complete = q.is_cpu and not flash and not rules.masked(inputs, options) and q.shape[1] == k.shape[1]
    if complete or not needs_grad or options.dropout_p or _is_compiling() or traced():
        return torch_attention.attention(inputs, options, dims)
    if flash:
        mask, causal = torch_attention.as_mask(inputs, options)
        return torch_apply(q, k, v, mask, causal, options.scale)
    return operator_apply(*inputs, *options, dims)


def torch_on_a_gpu(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, needs_grad: bool
) -> Tensor | None:
    """Torch's own operator for a causal call or one with gradients, where automatic choice names it; else None."""
    factor = 1.0 / q.shape[-1] ** 0.5 if scale is None else scale
    if (
        traced()
        or q.ndim != 4
        or not q.dtype == k.dtype == v.dtype
        or not (rules.fused_takes(q, k, v) and k.is_cuda and v.is_cuda)
        or (causal and not rules.scales(factor))
        or (needs_grad and (torch.are_deterministic_algorithms_enabled() or torch._C._is_any_autocast_enabled()))
        or torch._C._len_torch_dispatch_stack()
        or is_functorch_wrapped_tensor(q)
    ):
        return None
    if not needs_grad:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=factor)
    options = AttentionOptions(q.shape[2], k.shape[2], factor, causal=causal)
    return operator_apply(*AttentionInputs(q, k, v), *options, 4)


class TorchAttentionFunction(torch.autograd.Function):
    """Torch's flash attention for the CPU, with what its own backward lacks: derivatives of second order, and the
    zeros of what is masked beside cotangents that are not finite."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        mask = attn_mask
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), -math.inf)
        out, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, mask = ctx.saved_tensors
        gradients = torch_gradients(dout, q, k, v, out, lse, mask, ctx.causal, ctx.scale)
        need = ctx.needs_input_grad[:3]
        return (*[g if wanted else None for g, wanted in zip(gradients, need, strict=True)], None, None, None)


torch_apply = super(torch.autograd.Function, TorchAttentionFunction).apply


def torch_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of (q, k, v)."""
    # hooks on saved tensors may bring them back in another layout, which the kernel does not look at
    q, k, v, out = [t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, out)]
    masked = mask is not None or causal
    if torch.is_grad_enabled() or batched(dout) or (masked and not rules.bounded(dout)):
        options = AttentionOptions(q.shape[2], k.shape[2], scale, causal=causal)
        inputs = AttentionInputs(q, k, v, mask)
        found = reference.attention_gradients(dout, None, inputs, options, [True, True, True, False])
        return tuple(gradient for gradient in found[:3] if gradient is not None)
    return tuple(_flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale))


class TorchOperatorFunction(torch.autograd.Function):
    """Torch's operator, whichever of its kernels serves, with what these lack: derivatives of second order.

    Its own graph is kept inside. With ``create_graph=True``, and beside cotangents on the CPU that are not finite
    where something is masked, the backward is the reference's.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs, options = from_flat("attention_fwd", args[:-1])
        with torch.enable_grad():
            leaves: list[Any] = [None if t is None else t.detach() for t in inputs[:4]]
            for leaf, needed in zip(leaves, ctx.needs_input_grad[:4], strict=True):
                if leaf is not None:
                    leaf.requires_grad_(needed)
            out = torch_attention.attention(AttentionInputs(*leaves, *inputs[4:]), options, args[-1])
        ctx.save_for_backward(*inputs[:5])
        ctx.inner, ctx.leaves, ctx.options = out, leaves, options
        return out.detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        inputs, need = AttentionInputs(*ctx.saved_tensors), list(ctx.needs_input_grad[:4])
        masked = rules.masked(inputs, ctx.options)
        if torch.is_grad_enabled() or batched(dout) or (masked and dout.is_cpu and not rules.bounded(dout)):
            found = reference.attention_gradients(dout, None, inputs, ctx.options, need)
            gradients = [g if wanted else None for g, wanted in zip(found, need, strict=True)]
        else:
            wanted_leaves = [leaf for leaf, wanted in zip(ctx.leaves, need, strict=True) if wanted]
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
            # torch.autograd.grad without its checks, which cost as much as a small call
            inner = iter(_run_backward((ctx.inner,), (dout,), keep, False, tuple(wanted_leaves), False, False))
            if not keep:  # the node lives as long as the loss; what it saved need not
                del ctx.inner, ctx.leaves
            gradients = [next(inner) if wanted else None for wanted in need]
        return (*gradients, *[None] * 14)


operator_apply = super(torch.autograd.Function, TorchOperatorFunction).apply
