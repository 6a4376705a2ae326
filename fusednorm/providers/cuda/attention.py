"""The CUDA C++ provider of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._options import AttentionInputs, AttentionOptions
from ..native import attention_arguments, attention_gradients, attention_results
from ..strides import gradient_of_shifts
from . import library

_LONGEST = 2**29  # kLongest of csrc/cuda/attention/attention_ops.cpp
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(op: str, inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    q = inputs.q
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}: its kernels take float32, bfloat16 and float16"
    if options.max_seqlen_q > _LONGEST or options.max_seqlen_k > _LONGEST:
        return f"a sequence has more than {_LONGEST} positions"
    return library.refusal(q, q.shape[-1])


def _resolved(*tensors: Tensor) -> list[Tensor]:
    """Memory of `.conj().imag` holds the negated values."""
    return [t.resolve_neg() for t in tensors]


def _nothing_to_do(inputs: AttentionInputs, lse: Tensor) -> bool:
    return not lse.numel() or inputs.k.numel() == 0 == inputs.v.numel()


def attention_fwd(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """(out, lse) in one launch."""
    q, k, v = _resolved(*inputs[:3])
    out, lse = attention_results(q, v, inputs.cu_seqlens_q is not None)
    if _nothing_to_do(inputs, lse):
        return out.zero_(), lse.fill_(-math.inf)
    library.ops.attention_fwd.default(
        *(q, k, v, *attention_arguments(inputs, options), options.max_seqlen_q, options.max_seqlen_k, out, lse)
    )
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, v, attn_mask): a launch over queries, one or two over keys, one over tiles of a mask."""
    mask = inputs.attn_mask
    wants_mask = bool(output_mask[3]) and mask is not None and mask.is_floating_point()
    nothing = _nothing_to_do(inputs, lse)
    gradients = attention_gradients(inputs, (*output_mask[:3], wants_mask), not nothing)
    if nothing:
        return gradients
    dmask = gradients[3]
    shifts = dmask is not None and dmask.shape[-1] == 1 != options.max_seqlen_k
    dlse = None if dlse is None else dlse.contiguous()
    library.ops.attention_bwd.default(
        *(*_resolved(dout), dlse, *_resolved(*inputs[:3]), out, lse.contiguous()),
        *(*attention_arguments(inputs, options), options.max_seqlen_q, options.max_seqlen_k),
        *(*gradients[:3], None if shifts else dmask),
    )
    if dmask is not None and shifts:
        gradient_of_shifts(dmask, dlse, lse)
    return gradients
