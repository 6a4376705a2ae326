"""Whether our kernels of attention or torch's operator serve a call: where both mean the same, the faster one.

On the CPU the faster one was measured.

Torch's are made of the matrix products of the library that it is built with, and MKL is at its best on Intel's
processors alone. Time of torch's over time of ours, two threads (benchmarks/NOTES.md has the tables):

- AMD EPYC, Zen 5: float32 forward 1.2 to 1.9 from 16 queries on, causal up to 3.7, below 16 queries down to 0.4; with
  gradients 1.1 to 2.4 from 32 queries and 64 x 128 pairs on, below that 0.4 to 1.1. float64 alike. 16 bits: 1.2 to 25
  at every shape.
- Intel Xeon, AVX-512: float32 with gradients 0.45 to 1.06, bfloat16 with gradients 1.8 to 2.9.

On a GPU torch's operator serves what it computes alike. Since torch 2.11 that is cuDNN on sm_90 and sm_100. Published
figures for an H200 at a head dim of 128: 691 TFLOP/s forward, 594 backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._options import AttentionInputs, AttentionOptions
from .._transforms import readable, traced
from ..providers.cpu import library as cpu
from ..providers.cuda import library as cuda
from ..providers.torch import attention as torch_attention
from . import registry, settings, tuned

_is_compiling = torch.compiler.is_compiling


def kind_of(masked: bool, causal: bool) -> str:
    """What an attention is called among the operations that are measured."""
    return "attention_masked" if masked else "attention_causal" if causal else "attention"


def ours_is_faster(itemsize: int, n_queries: int, n_keys: int, head_dim: int, operation: str, needs_grad: bool) -> bool:
    """Whether to prefer the CPU library for elements of `itemsize` bytes; False where it is not built.

    `operation` is "attention", "attention_causal" or "attention_masked".
    """
    if cpu.unavailable_reason() is not None:
        return False
    line, lengths = tuned.line(operation, itemsize, needs_grad), (n_queries, n_keys)
    own = tuned.find(torch.device("cpu"), line, n_queries * n_keys, head_dim, lengths)
    if own is not None:
        return own[0] == "cpu"
    if cpu.vendor() != "amd" or not torch.backends.mkl.is_available():
        return needs_grad and itemsize == 2
    if itemsize == 2:
        return True
    return n_queries >= 32 and n_queries * n_keys >= 64 * 128 if needs_grad else n_queries >= 16


def torch_is_slower(q: Tensor, k: Tensor, operation: str, needs_grad: bool) -> bool:
    """Whether a call goes to the native kernels though torch's mean the same. A graph is not to depend on lengths."""
    if _is_compiling() or traced():
        return False
    return ours_is_faster(q.element_size(), q.shape[-2], k.shape[-2], q.shape[-1], operation, needs_grad)


def cuda_serves(gpu: int) -> bool:
    """Whether by automatic choice the CUDA library serves what is ours to serve on a GPU: where Triton cannot."""
    if registry.unavailable_reason("triton") is None or registry.unavailable_reason("cuda") is not None:
        return False
    return cuda.unusable(gpu) is None  # a first launch, on a GPU where nothing else of ours serves


class Asked(NamedTuple):
    """What the choice depends on besides the arguments."""

    provider: str  # who serves the call if torch's operator does not
    return_lse: bool
    dims: int  # of the operands as they were given
    needs_grad: bool
    by_shape: bool  # False inside batch_invariant
    bounded: bool | None  # no operand holds NaN or huge numbers; None: check only if that decides


def why_not_torch(inputs: AttentionInputs, options: AttentionOptions, asked: Asked) -> str:
    """The reason not to use torch's operator, or "" where it means the same and is not slower.

    Where no kernel of ours serves a call, speed is no reason, and `key_mask` and `window` become torch's `attn_mask`.
    """
    q, k, v, _, _, seed, *_ = inputs
    ours = asked.provider not in ("torch", "reference")
    reason = torch_attention.refusal("attention_fwd", inputs, options)
    if reason:
        return reason
    if asked.return_lse:
        return "it returns no log-sum-exp"
    if options.dropout_p and (seed is not None or (ours and not _learns_small_mask(inputs, asked))):
        return "its dropout mask is not `dropout_mask`"
    if ours:
        reason = _why_ours(inputs, options, asked)
        if reason:
            return reason
    elif not (_is_compiling() or traced() or (q.numel() and k.numel() and v.numel())):
        return "an operand is empty"
    elif masked(inputs, options) and not (q.is_cpu or scales(options.scale)):
        return "it scales the -inf that it adds to what is masked"
    if values_decide(inputs, options):
        if not readable(q, k, v):
            return _NOT_LOOKED_FOR if ours else ""
        if not (scales(options.scale) and (bounded(q, k, v) if asked.bounded is None else asked.bounded)):
            return "NaN, Inf or huge numbers of masked keys and values would reach its results"
    return ""


def values_decide(inputs: AttentionInputs, options: AttentionOptions) -> bool:
    """Whether what the operands hold may decide. Never on a GPU, where a look would wait for the device."""
    return inputs.q.is_cpu and masked(inputs, options)


def masked(inputs: AttentionInputs, options: AttentionOptions) -> bool:
    windowed = options.window_left >= 0 or options.window_right >= 0
    return bool(inputs.attn_mask is not None or inputs.key_mask is not None or options.causal or windowed)


_NOT_LOOKED_FOR = "NaN and Inf of masked keys and values reach its results, and they are not looked for here"


# On a CPU our gradient of the mask computes the logits once more, torch's keeps them. Forward and backward, torch's
# took 0.5 to 0.8 of our time up to this many attention weights. Above, what it keeps is over 64 MiB.
_MOST_KEPT_WEIGHTS = 1 << 24


def _learns_small_mask(inputs: AttentionInputs, asked: Asked) -> bool:
    """Whether the gradient of attn_mask is wanted on a CPU, and few enough attention weights are kept for it."""
    q, k, _, attn_mask, *_ = inputs
    if not asked.needs_grad or attn_mask is None or not attn_mask.requires_grad or not q.is_cpu:
        return False
    return q.shape[:-1].numel() * k.shape[-2] <= _MOST_KEPT_WEIGHTS


def _why_ours(inputs: AttentionInputs, options: AttentionOptions, asked: Asked) -> str:
    """Why a kernel of ours, which could serve the call, is to be preferred to torch's, or nothing."""
    q, k, v, attn_mask, key_mask, *_ = inputs
    causal, needs_grad = options.causal, asked.needs_grad
    if key_mask is not None or options.window_left >= 0 or options.window_right >= 0:
        return f"{'key_mask' if key_mask is not None else 'window'} is none of its arguments"
    if causal and options.lower_right and q.shape[-2] != k.shape[-2]:
        return "its causal mask is aligned upper-left"
    if causal and attn_mask is not None:
        return "it refuses attn_mask beside is_causal, unless its flash attention serves the call"
    if causal and not scales(options.scale):
        return "it scales the -inf that it adds to what causality masks"
    if _learns_small_mask(inputs, asked):
        return ""
    if needs_grad and attn_mask is not None and attn_mask.requires_grad:
        return "it holds the gradient of attn_mask, which is never summed, in full"
    if q.is_cpu and needs_grad and asked.dims == 4 and not flash_takes(q, k, v):
        return "of such operands it keeps every probability"
    kind = kind_of(attn_mask is not None, causal)
    if asked.provider == "cpu" and torch_is_slower(q, k, kind, needs_grad):
        own = measured_here(q, k, kind, needs_grad)
        return own[1] if own else "it was measured to be slower than ours for these lengths on such a processor"
    if asked.provider == "triton":
        fused = not (needs_grad or causal) or (asked.dims == 4 and fused_takes(q, k, v))
        deterministic = torch.are_deterministic_algorithms_enabled()
        reason = why_not_torch_on_a_gpu(Gpu(attn_mask is not None, fused, needs_grad, deterministic, asked.by_shape))
        own = None if reason or _is_compiling() else measured_here(q, k, kind, needs_grad)
        return own[1] if own is not None and own[0] == asked.provider else reason
    return ""


def torch_backend(inputs: AttentionInputs, options: AttentionOptions, needs_grad: bool) -> str | None:
    """The kernel of torch's operator that was measured to be fastest on this machine; None: torch's choice."""
    q, k, *_ = inputs
    if not q.is_cuda or _is_compiling() or traced() or not settings.current.by_shape:
        return None
    own = measured_here(q, k, kind_of(inputs.attn_mask is not None, options.causal), needs_grad)
    provider, _, backend = own[0].partition("/") if own is not None else ("", "", "")
    return backend if provider == "torch" and backend in torch_attention.BACKENDS else None


def measured_here(q: Tensor, k: Tensor, operation: str, needs_grad: bool) -> tuple[str, str] | None:
    """(the fastest provider, why) if attention of such lengths was measured on this machine."""
    line = tuned.line(operation, q.element_size(), needs_grad)
    return tuned.find(q.device, line, q.shape[-2] * k.shape[-2], q.shape[-1], (q.shape[-2], k.shape[-2]))


class Gpu(NamedTuple):
    """What the rule for a GPU looks at: a call that a Triton kernel could serve."""

    attn_mask: bool
    fused: bool  # whether torch's fused kernels take the operands
    needs_grad: bool
    deterministic: bool  # torch.use_deterministic_algorithms
    by_shape: bool  # False inside batch_invariant


def why_not_torch_on_a_gpu(call: Gpu) -> str:
    """Why our kernel serves a call though torch's operator means the same, or nothing."""
    if not call.by_shape:
        return "how it splits a sum depends on the batch, and this is a block of `batch_invariant`"
    if call.attn_mask:
        return "NaN and Inf of masked keys and values reach its results, and they are not looked for here"
    if not call.fused:
        return "its fused kernels do not take these operands"
    if call.needs_grad and call.deterministic:
        return "its gradients differ from run to run, and torch.use_deterministic_algorithms is on"
    return ""


def how_torch_serves(inputs: AttentionInputs, options: AttentionOptions) -> str:
    how = "torch's own operator: it means the same here"
    if masked(inputs, options) and not inputs.q.is_cpu:  # a look would wait for the device
        how += ", but for NaN and Inf of what is masked, which may reach its results"
    return how


def scales(scale: float) -> bool:
    """Whether the scale turns no product of bounded numbers, and no -inf, into something else."""
    return 0.0 < scale <= 128.0


def bounded_check() -> Callable[[Tensor, Tensor, Tensor], bool]:
    """What tells whether three tensors are `bounded`."""
    return cpu.all_bounded if registry.unavailable_reason("cpu") is None else bounded


def bounded(*tensors: Tensor) -> bool:
    """Whether up to three tensors have no NaN, and nothing so large that a sum of 256 products of two overflows."""
    if registry.unavailable_reason("cpu") is None:
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
