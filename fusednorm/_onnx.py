"""Attention for the ONNX exporter over torch.jit.trace, which knows torch's operator and none of ours."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def exporting() -> bool:
    exporter = sys.modules.get("torch.onnx")
    return exporter is not None and exporter.is_in_onnx_export()


def attention(args: tuple[Any, ...], return_lse: bool) -> Tensor:
    """Torch's operator, with all masks in one. NaN and Inf of what is masked are not kept out."""
    q, k, v, attn_mask, key_mask, _, cu_seqlens_q, _, n_queries, n_keys, scale, dropout_p, causal, *rest = args
    lower_right, left, right, softcap = rest
    for name, used in (
        ("cu_seqlens_q", cu_seqlens_q is not None),
        ("dropout_p", dropout_p),
        ("softcap", softcap),
        ("return_lse", return_lse),
    ):
        if used:
            raise ValueError(f"{name}: has no form in ONNX; export without it, a module in eval mode")
    if causal and attn_mask is None is key_mask and left < 0 and not lower_right:
        mask = None
    else:
        mask, causal = (
            _one_mask(q, attn_mask, key_mask, n_queries, n_keys, left, 0 if causal else right, lower_right),
            False,
        )
    if q.shape[1] != k.shape[1]:
        group = int(q.shape[1]) // int(k.shape[1])
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


def _one_mask(
    q: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    n_queries: int,
    n_keys: int,
    left: int,
    right: int,
    lower_right: bool,
) -> Tensor | None:
    keep = None if key_mask is None else key_mask[:, None, None]
    if left >= 0 or right >= 0:
        i = torch.arange(n_queries, device=q.device)[:, None] + (n_keys - n_queries if lower_right else 0)
        j = torch.arange(n_keys, device=q.device)
        for seen in (j >= i - left if left >= 0 else None, j <= i + right if right >= 0 else None):
            if seen is not None:
                keep = seen if keep is None else keep & seen
    if attn_mask is None or keep is None:
        return keep if attn_mask is None else attn_mask
    if attn_mask.dtype == torch.bool:
        return attn_mask & keep
    return torch.where(keep, attn_mask.to(q.dtype), -math.inf)
