"""The native CPU provider of attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._dtypes import compute_dtype
from ..strides import rows_like
from . import norm as cpu
from .norm import refusal as refusal


def _bounds(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.contiguous()


def _window(causal: bool, left: int, right: int) -> tuple[int, int]:
    """Causality is a window that ends at the query itself."""
    return left, 0 if causal else right


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    dropout_p: float,
    causal: bool,
    lower_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    same = v.shape[-1] == q.shape[-1]
    out = rows_like(q) if same else q.new_empty((*q.shape[:-1], v.shape[-1]))
    statistics = q.shape[:-1] if cu_seqlens_q is None else (q.shape[1], q.shape[0])
    lse = q.new_empty(statistics, dtype=compute_dtype(q.dtype))
    bounds = _bounds(cu_seqlens_q), _bounds(cu_seqlens_k)
    cpu.attention_forward(
        *(q, k, v, attn_mask, key_mask, seed, *bounds, scale, dropout_p, lower_right),
        *(*_window(causal, window_left, window_right), softcap, out, lse),
    )
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    dropout_p: float,
    causal: bool,
    lower_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, v, attn_mask); None where not wanted."""
    make = rows_like if lse.numel() else torch.zeros_like
    gradients = tuple(
        make(t) if wanted and t is not None else None
        for t, wanted in zip((q, k, v, attn_mask), output_mask, strict=True)
    )
    if not lse.numel():  # nothing asks
        return gradients
    bounds = _bounds(cu_seqlens_q), _bounds(cu_seqlens_k)
    cpu.attention_backward(
        # autograd and hooks on saved tensors may bring the statistics in another layout
        *(dout, None if dlse is None else dlse.contiguous(), q, k, v, out, lse.contiguous()),
        *(attn_mask, key_mask, seed, *bounds, scale, dropout_p, lower_right),
        *(*_window(causal, window_left, window_right), softcap, *gradients),
    )
    return gradients
