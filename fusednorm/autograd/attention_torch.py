"""Torch's own attention, with the derivatives of second order that its kernels lack."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from .._options import AttentionInputs, AttentionOptions, from_flat
from .._transforms import readable, traced
from ..dispatch import eager, rules_attention
from ..providers.reference import attention as reference
from ..providers.torch import attention as torch_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_is_compiling = torch.compiler.is_compiling
_run_backward = torch.autograd.Variable._execution_engine.run_backward


Plan = Callable[[AttentionInputs], tuple[Tensor, None]]


def plan(inputs: AttentionInputs, options: AttentionOptions, needs_grad: bool, dims: int) -> Plan:
    """What computes out for calls like this one, None being the log-sum-exp."""
    found = _plan(inputs, options, needs_grad, dims)
    backend = rules_attention.torch_backend(inputs, options, needs_grad)
    return found if backend is None else functools.partial(_by_backend, found, backend)


def _by_backend(run: Plan, backend: str, inputs: AttentionInputs) -> tuple[Tensor, None]:
    """One of torch's kernels first; where it does not take the call, the others in their order."""
    first = torch_attention.BACKENDS[backend]
    others = [other for other in torch_attention.BACKENDS.values() if other is not first]
    with sdpa_kernel([first, *others], set_priority=True):
        return run(inputs)


def _plan(inputs: AttentionInputs, options: AttentionOptions, needs_grad: bool, dims: int) -> Plan:
    q, k, v, attn_mask, key_mask, *_ = inputs
    fill = key_mask is not None and not (q.is_cpu and readable(q, k, v))
    flash = (
        dims == 4 and rules_attention.flash_takes(q, k, v) and not (attn_mask is not None and attn_mask.requires_grad)
    )
    # what the CPU has besides is made of operators that are differentiable themselves
    complete = q.is_cpu and not flash and not rules_attention.masked(inputs, options) and q.shape[1] == k.shape[1]
    in_program = _is_compiling() or traced()
    run = _operator
    if complete or not needs_grad or options.dropout_p or in_program:
        run = _operators
        if dims == 4 and not (options.dropout_p or in_program) and torch_attention.needs_no_mask(inputs, options):
            grouped = q.shape[1] != k.shape[1]
            return functools.partial(_unmasked, is_causal=options.causal, scale=options.scale, enable_gqa=grouped)
    elif flash:
        run = _flash_attention
    return functools.partial(run, options=options, dims=dims, fill=fill)


def _unmasked(inputs: AttentionInputs, is_causal: bool, scale: float, enable_gqa: bool) -> tuple[Tensor, None]:
    q, k, v, *_ = inputs
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa), None


def _operators(inputs: AttentionInputs, options: AttentionOptions, dims: int, fill: bool) -> tuple[Tensor, None]:
    return torch_attention.attention(_filled(inputs) if fill else inputs, options, dims), None


def _operator(inputs: AttentionInputs, options: AttentionOptions, dims: int, fill: bool) -> tuple[Tensor, None]:
    return operator_apply(*(_filled(inputs) if fill else inputs), *options, dims), None


def _flash_attention(inputs: AttentionInputs, options: AttentionOptions, dims: int, fill: bool) -> tuple[Tensor, None]:
    mask, causal = torch_attention.as_mask(inputs, options)
    return torch_apply(*inputs[:3], mask, causal, options.scale), None


def _filled(inputs: AttentionInputs) -> AttentionInputs:
    """Zeros in place of keys and values that nobody sees: 0 * NaN is NaN."""
    assert inputs.key_mask is not None
    hidden = inputs.key_mask.logical_not()[:, None, :, None]
    return inputs._replace(k=inputs.k.masked_fill(hidden, 0.0), v=inputs.v.masked_fill(hidden, 0.0))


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
    if eager.differentiated(dout) or (masked and not rules_attention.bounded(dout)):
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
        masked = rules_attention.masked(inputs, ctx.options)
        if eager.differentiated(dout) or (masked and dout.is_cpu and not rules_attention.bounded(dout)):
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
