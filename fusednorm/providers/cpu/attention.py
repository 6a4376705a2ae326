"""The native CPU provider of attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._options import AttentionInputs, AttentionOptions
from ..strides import rows_like
from . import library

refusal = library.refusal


def _contiguous(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.contiguous()


def _window(options: AttentionOptions) -> tuple[int, int]:
    """Causality is a window that ends at the query itself."""
    return options.window_left, 0 if options.causal else options.window_right


def attention_fwd(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    q, k, v, *masks, cu_seqlens_q, cu_seqlens_k = inputs
    if v.shape[-1] != q.shape[-1]:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    else:
        out = torch.empty_like(q) if q.stride(-1) == 1 else rows_like(q)
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:-1] if cu_seqlens_q is None else (q.shape[1], q.shape[0]), dtype=dtype)
    bounds = _contiguous(cu_seqlens_q), _contiguous(cu_seqlens_k)
    library.attention_fwd(
        *(q, k, v, *masks, *bounds, options.scale, options.dropout_p, options.lower_right),
        *(*_window(options), options.softcap, out, lse),
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
    """Gradients of (q, k, v, attn_mask); None where not wanted."""
    q, k, v, *masks, cu_seqlens_q, cu_seqlens_k = inputs
    usual = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and not output_mask[3]
    make = torch.zeros_like if not lse.numel() else torch.empty_like if usual else rows_like
    gradients = tuple(
        make(t) if wanted and t is not None else None for t, wanted in zip(inputs[:4], output_mask, strict=True)
    )
    if not lse.numel():  # nothing asks
        return gradients
    bounds = _contiguous(cu_seqlens_q), _contiguous(cu_seqlens_k)
    library.attention_bwd(
        # autograd and hooks on saved tensors may bring the statistics in another layout
        *(dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse.contiguous()),
        *(*masks, *bounds, options.scale, options.dropout_p, options.lower_right),
        *(*_window(options), options.softcap, *gradients),
    )
    return gradients
