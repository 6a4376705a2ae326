"""The way down from the attention functions: choice of provider, torch's own operators, the autograd Function."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from . import _onnx, _ops, providers
from ._transforms import batched, distinct, recorded, traced, transform_active
from .providers import cpu
from .providers import reference_attention as reference
from .providers.choice_attention import ours_is_faster

Args = tuple[Any, ...]  # the arguments of fusednorm::attention_fwd without the provider, in order

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_is_compiling = torch.compiler.is_compiling


def run(call: str, args: Args, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Choose the way down once, and take it: (out, lse)."""
    if transform_active():
        how = "elementary operators, because a torch.func transform or forward-mode AD is active"
        providers.record(providers.Route(call, "reference", how))
        return reference.attention(*args)
    provider, refusals = providers.choose("attention_fwd", args)
    torchs = providers.requested() is None
    differs = _torch_differs(args, return_lse, provider) if torchs else ""
    torchs = torchs and not differs
    if not providers.automatic:
        how = "one fused op each way"
        if differs:
            refusals += (("torch's own operator", differs),)
        elif torchs:
            refusals += ((provider, "torch's own operator means the same here"),) if provider != "reference" else ()
            provider, how = "reference", "torch's own operator: it means the same here"
        providers.record(providers.Route(call, provider, how, refusals))
    if torchs:
        return _run_torch(args), None
    if recorded():
        if traced() and _onnx.exporting():
            return _onnx.attention(args, return_lse), None
        return _ops.recorded("attention_fwd", args)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4]):
        if _is_compiling():
            return AttentionFunction.apply(*distinct(args[:8]), *args[8:], provider)
        if is_functorch_wrapped_tensor(args[0]):  # escaped from a transform that has ended
            return AttentionFunction.apply(*args, provider)
        return _apply(*args, provider)
    return _ops.attention_fwd(*args, provider=provider)


class AttentionFunction(torch.autograd.Function):
    """One op forward, one op backward. What is kept: the inputs, the output, and one number a query (lse).

    Under ``create_graph=True`` the backward is the reference's differentiable one.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, attn_mask, key_mask, seed, cu_seqlens_q, cu_seqlens_k = args[:8]
        out, lse = _ops.attention_fwd(*args[:-1], provider=args[-1])
        ctx.save_for_backward(q, k, v, out, lse, attn_mask, key_mask, seed, cu_seqlens_q, cu_seqlens_k)
        ctx.options, ctx.provider = args[8:-1], args[-1]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 18
        q, k, v, out, lse, *masks = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        need = list(ctx.needs_input_grad[:4])
        rest = (*masks, *ctx.options, need)
        gradients: tuple[Tensor | None, ...]
        if not _is_compiling() and (torch.is_grad_enabled() or batched(dout, dlse)):
            gradients = reference.attention_gradients(dout, dlse, q, k, v, *rest)
        else:
            gradients = _ops.attention_bwd(dout, dlse, q, k, v, out, lse, *rest, provider=ctx.provider)
        return (*[g if wanted else None for g, wanted in zip(gradients, need, strict=True)], *[None] * 14)


# Function.apply itself, without the search of every argument for torch.func's wrappers: no transform is active here
_apply = super(torch.autograd.Function, AttentionFunction).apply


# --- torch's own operator ---


def torch_is_slower(q: Tensor, k: Tensor, needs_grad: bool) -> bool:
    """Whether a call goes to the native kernels though torch's mean the same. A graph is not to depend on lengths."""
    return not (_is_compiling() or traced()) and ours_is_faster(q.element_size(), q.shape[-2], k.shape[-2], needs_grad)


def _torch_differs(args: Args, return_lse: bool, provider: str) -> str:
    """Why torch's operator would not be the function that is documented, or not the faster one, or nothing."""
    q, k, v, attn_mask, key_mask, _, cu_seqlens_q, _, _, _, scale, dropout_p, causal, lower_right, *rest = args
    left, right, cap = rest
    if cu_seqlens_q is not None or key_mask is not None or left >= 0 or right >= 0 or cap or return_lse:
        return "packed sequences, key_mask, window, softcap and the log-sum-exp are none of its arguments"
    if dropout_p:
        return "its dropout mask is not `dropout_mask`"
    if causal and lower_right and q.shape[-2] != k.shape[-2]:
        return "its causal mask is aligned upper-left"
    if causal and attn_mask is not None:
        return "it refuses attn_mask beside is_causal, unless its flash attention serves the call"
    if causal and not _scales(scale):
        return "it scales the -inf that it adds to what causality masks"
    tracing = traced()
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4])
    if needs_grad and not tracing:
        if attn_mask is not None and attn_mask.requires_grad:
            return "it holds the gradient of attn_mask, which is never summed, in full"
        if not (q.is_cpu and flash_takes(q, k, v)):
            return "it has no derivatives of second order, keeps every probability, or differs from run to run"
    if provider == "cpu" and torch_is_slower(q, k, needs_grad):
        return "it was measured to be slower than ours for these lengths on such a processor"
    if provider == "triton" and not providers.by_shape:
        return "how it splits a sum depends on the batch, and this is a block of `batch_invariant`"
    if causal or attn_mask is not None:
        values_are_here = q.is_cpu and _ops.PLAIN.issuperset((type(q), type(k), type(v)))
        if _is_compiling() or tracing or not values_are_here or torch._C._len_torch_dispatch_stack():
            return "NaN and Inf of masked keys and values reach its results, and they are not looked for here"
        if not (_scales(scale) and moderate(q, k, v)):
            return "NaN, Inf or huge numbers of masked keys and values would reach its results"
    return ""


def _scales(scale: float) -> bool:
    """Whether the scale turns no product of moderate numbers, and no -inf, into something else."""
    return 0.0 < scale <= 128.0


def moderate(*tensors: Tensor) -> bool:
    """Whether up to three tensors have no NaN, and nothing so large that a sum of 256 products of two overflows."""
    if providers.unavailable_reason("cpu") is None:
        return cpu.all_moderate(*tensors, *[None] * (3 - len(tensors)))
    for tensor in filter(Tensor.numel, tensors):
        bound = {torch.float64: 2.0**500, torch.float16: math.inf}.get(tensor.dtype, 2.0**56)
        smallest, largest = tensor.detach().aminmax()  # both are NaN if an element is
        if not (-bound < smallest.item() and largest.item() < bound):
            return False
    return True


def flash_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's flash attention for the CPU takes these tensors: as many heads each, nothing empty.

    It is asked in full: values shorter than the keys are read out of bounds.
    """
    return (
        not (_is_compiling() or traced())
        and q.ndim == 4
        and q.shape[:2] == k.shape[:2]
        and q.shape[3] == k.shape[3]
        and k.shape == v.shape
        and q.dtype == k.dtype == v.dtype
        and k.is_cpu
        and v.is_cpu
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and q.numel() > 0
        and k.numel() > 0
    )


def _run_torch(args: Args) -> Tensor:
    q, k, v, attn_mask, _, _, _, _, _, _, scale, _, causal = args[:13]
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if needs_grad and not traced():
        return torch_apply(q, k, v, attn_mask, causal, scale)
    grouped = False
    if q.shape[1] != k.shape[1]:  # a branch, since torch takes no symbolic truth value
        grouped = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=causal, scale=scale, enable_gqa=grouped)


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
    if torch.is_grad_enabled() or batched(dout) or (masked and not moderate(dout)):
        options = (q.shape[2], k.shape[2], scale, 0.0, causal, False, -1, -1, 0.0)
        found = reference.attention_gradients(
            *(dout, None, q, k, v, mask, None, None, None, None, *options, [True, True, True, False])
        )
        return tuple(gradient for gradient in found[:3] if gradient is not None)
    return tuple(_flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale))


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
        return torch_gradients(dout, q, k, v, out, lse, None, causal, scale)
    options = (q.shape[2], k.shape[2], scale, 0.0, causal, False, window_left, window_right, 0.0, [*wanted, False])
    if torch.is_grad_enabled() or batched(dout):
        return reference.attention_gradients(dout, None, q, k, v, None, key_mask, None, None, None, *options)[:3]
    masks = (None, key_mask, None, None, None)
    return _ops.attention_bwd(dout, None, q, k, v, out, lse, *masks, *options, provider="cpu")[:3]
