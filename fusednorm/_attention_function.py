"""The way down from the attention functions: choice of provider, torch's own operators, the autograd Function."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from . import _onnx, _ops, dropout, providers
from ._transforms import batched, distinct, readable, recorded, traced, transform_active
from .providers import choice_gpu, cpu, torch_attention
from .providers import reference_attention as reference
from .providers.choice_attention import ours_is_faster

Args = tuple[Any, ...]  # the arguments of fusednorm::attention_fwd without the provider, in order

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_is_compiling = torch.compiler.is_compiling
_run_backward = torch.autograd.Variable._execution_engine.run_backward


def run(call: str, args: Args, return_lse: bool, dims: int = 4) -> tuple[Tensor, Tensor | None]:
    """Choose the way down once, and take it: (out, lse). The operands had `dims` dimensions as they were given."""
    if transform_active():
        how = "elementary operators, because a torch.func transform or forward-mode AD is active"
        providers.record(providers.Route(call, "reference", how))
        return reference.attention(*dropout.with_seed(args, 5, args[11]))
    provider, refusals = providers.choose("attention_fwd", args)
    asked = providers.requested()
    if asked == "torch" and return_lse:
        raise ValueError(
            "provider 'torch' cannot run attention_fwd: torch's attention returns no log-sum-exp; leave `return_lse` "
            "out, or the request, for automatic choice"
        )
    differs = _torch_differs(args, return_lse, provider, dims) if asked is None else ""
    torchs = asked == "torch" or (asked is None and not differs)
    if provider == "torch" and not torchs:
        provider = "reference"
    if not providers.automatic:
        how = "one fused op each way"
        if differs:
            refusals = (*[r for r in refusals if r[0] != "torch"], ("torch's own operator", differs))
        elif torchs:
            refusals += ((provider, "torch's own operator means the same here"),) if provider != "torch" else ()
            provider, how = "torch", _how_torch_serves(args, asked)
        providers.record(providers.Route(call, provider, how, refusals))
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4])
    if traced() and _onnx.exporting():
        return _onnx.attention(args, return_lse, dims), None
    if torchs:
        return _run_torch(args, needs_grad, dims), None
    args = dropout.with_seed(args, 5, args[11])
    if recorded():
        return _ops.recorded("attention_fwd", args)
    if needs_grad:
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


def _torch_differs(args: Args, return_lse: bool, provider: str, dims: int) -> str:
    """Why torch's operator would not be the function that is documented, or not the faster one, or nothing.

    Where no kernel of ours serves a call, speed is no reason, and what torch has no argument for becomes its mask.
    """
    q, k, v, _, _, seed, _, _, _, _, scale, dropout_p, *_ = args
    ours = provider not in ("torch", "reference")
    reason = torch_attention.refusal("attention_fwd", *args)
    if reason:
        return reason
    if return_lse:
        return "it returns no log-sum-exp"
    if dropout_p and (ours or seed is not None):
        return "its dropout mask is not `dropout_mask`"
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4])
    if ours:
        reason = _why_ours(args, provider, needs_grad, dims)
        if reason:
            return reason
    elif not (_is_compiling() or traced() or (q.numel() and k.numel() and v.numel())):
        return "an operand is empty"
    elif _masked(args) and not (q.is_cpu or _scales(scale)):
        return "it scales the -inf that it adds to what is masked"
    if q.is_cpu and _masked(args):
        if not readable(q, k, v):
            return _NOT_LOOKED_FOR if ours else ""
        if not (_scales(scale) and bounded(q, k, v)):
            return "NaN, Inf or huge numbers of masked keys and values would reach its results"
    return ""


def _masked(args: Args) -> bool:
    return bool(args[3] is not None or args[4] is not None or args[12] or args[14] >= 0 or args[15] >= 0)


_NOT_LOOKED_FOR = "NaN and Inf of masked keys and values reach its results, and they are not looked for here"


def _why_ours(args: Args, provider: str, needs_grad: bool, dims: int) -> str:
    """Why a kernel of ours, which could serve the call, is to be preferred to torch's, or nothing."""
    q, k, v, attn_mask, key_mask, _, _, _, _, _, scale, _, causal, lower_right, left, right, _ = args
    if key_mask is not None or left >= 0 or right >= 0:
        return f"{'key_mask' if key_mask is not None else 'window'} is none of its arguments"
    if causal and lower_right and q.shape[-2] != k.shape[-2]:
        return "its causal mask is aligned upper-left"
    if causal and attn_mask is not None:
        return "it refuses attn_mask beside is_causal, unless its flash attention serves the call"
    if causal and not _scales(scale):
        return "it scales the -inf that it adds to what causality masks"
    if needs_grad and attn_mask is not None and attn_mask.requires_grad:
        return "it holds the gradient of attn_mask, which is never summed, in full"
    if q.is_cpu and needs_grad and dims == 4 and not flash_takes(q, k, v):
        return "of such operands it keeps every probability"
    if provider == "cpu" and torch_is_slower(q, k, needs_grad):
        return "it was measured to be slower than ours for these lengths on such a processor"
    if provider == "triton":
        fused = not (needs_grad or causal) or (dims == 4 and fused_takes(q, k, v))
        deterministic = torch.are_deterministic_algorithms_enabled()
        return choice_gpu.why_not_torchs(
            choice_gpu.Attention(attn_mask is not None, fused, needs_grad, deterministic, providers.by_shape)
        )
    return ""


def _how_torch_serves(args: Args, asked: str | None) -> str:
    if asked is not None:
        return "torch's own operator"
    how = "torch's own operator: it means the same here"
    if _masked(args) and not args[0].is_cpu:  # a look would wait for the device
        how += ", but for NaN and Inf of what is masked, which may reach its results"
    return how


def _scales(scale: float) -> bool:
    """Whether the scale turns no product of bounded numbers, and no -inf, into something else."""
    return 0.0 < scale <= 128.0


def bounded(*tensors: Tensor) -> bool:
    """Whether up to three tensors have no NaN, and nothing so large that a sum of 256 products of two overflows."""
    if providers.unavailable_reason("cpu") is None:
        return cpu.all_bounded(*tensors, *[None] * (3 - len(tensors)))
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
        and k.is_cpu
        and v.is_cpu
        and q.ndim == 4
        and q.dtype == k.dtype == v.dtype
        and fused_takes(q, k, v)
        and q.numel() > 0
        and k.numel() > 0
    )


def fused_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's fused kernels take 4-D operands of one dtype: heads and head dims alike, rows contiguous."""
    return (
        q.shape[:2] == k.shape[:2]
        and q.shape[3] == k.shape[3]
        and k.shape == v.shape
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
    )


def _run_torch(args: Args, needs_grad: bool, dims: int) -> Tensor:
    q, k, v, attn_mask, key_mask, _, _, _, _, _, scale, dropout_p, *_ = args
    if key_mask is not None and not (q.is_cpu and readable(q, k, v)):  # nobody sees these keys, and 0 * NaN is NaN
        k, v = (t.masked_fill(key_mask.logical_not()[:, None, :, None], 0.0) for t in (k, v))
        args = (q, k, v, *args[3:])
    flash = dims == 4 and flash_takes(q, k, v) and not (attn_mask is not None and attn_mask.requires_grad)
    # what the CPU has besides is made of operators that are differentiable themselves
    complete = q.is_cpu and not flash and not _masked(args) and q.shape[1] == k.shape[1]
    if complete or not needs_grad or dropout_p or _is_compiling() or traced():
        return torch_attention.attention(*args, dims=dims)
    if flash:
        mask, causal = torch_attention.as_mask(q, k, attn_mask, key_mask, *args[12:16])
        return torch_apply(q, k, v, mask, causal, scale)
    return operator_apply(*args, dims)


def torch_on_a_gpu(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, needs_grad: bool
) -> Tensor | None:
    """Torch's own operator for a causal call or one with gradients, where automatic choice names it; else None."""
    factor = 1.0 / q.shape[-1] ** 0.5 if scale is None else scale
    if (
        traced()
        or q.ndim != 4
        or not q.dtype == k.dtype == v.dtype
        or not (fused_takes(q, k, v) and k.is_cuda and v.is_cuda)
        or (causal and not _scales(factor))
        or (needs_grad and (torch.are_deterministic_algorithms_enabled() or torch._C._is_any_autocast_enabled()))
        or torch._C._len_torch_dispatch_stack()
        or is_functorch_wrapped_tensor(q)
    ):
        return None
    if not needs_grad:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=factor)
    return operator_apply(
        *(q, k, v, None, None, None, None, None, q.shape[2], k.shape[2], factor, 0.0, causal, False, -1, -1, 0.0, 4)
    )


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
    if torch.is_grad_enabled() or batched(dout) or (masked and not bounded(dout)):
        options = (q.shape[2], k.shape[2], scale, 0.0, causal, False, -1, -1, 0.0)
        found = reference.attention_gradients(
            *(dout, None, q, k, v, mask, None, None, None, None, *options, [True, True, True, False])
        )
        return tuple(gradient for gradient in found[:3] if gradient is not None)
    return tuple(_flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale))


class TorchOperatorFunction(torch.autograd.Function):
    """Torch's operator, whichever of its kernels serves, with what these lack: derivatives of second order.

    Its own graph is kept inside. With ``create_graph=True``, and beside cotangents on the CPU that are not finite
    where something is masked, the backward is the reference's.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        given, dims = args[:-1], args[-1]
        with torch.enable_grad():
            leaves: list[Any] = [None if t is None else t.detach() for t in given[:4]]
            for leaf, needed in zip(leaves, ctx.needs_input_grad[:4], strict=True):
                if leaf is not None:
                    leaf.requires_grad_(needed)
            out = torch_attention.attention(*leaves, *given[4:], dims=dims)
        ctx.save_for_backward(*given[:5])
        ctx.inner, ctx.leaves, ctx.options = out, leaves, given[8:]
        return out.detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, attn_mask, key_mask = ctx.saved_tensors
        need = ctx.needs_input_grad[:4]
        masked = _masked((q, k, v, attn_mask, key_mask, *[None] * 3, *ctx.options))
        if torch.is_grad_enabled() or batched(dout) or (masked and dout.is_cpu and not bounded(dout)):
            operands = (dout, None, q, k, v, attn_mask, key_mask, None, None, None)
            found = reference.attention_gradients(*operands, *ctx.options, list(need))
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
