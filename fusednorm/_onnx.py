"""Attention for the ONNX exporter over torch.jit.trace, which knows torch's operator and none of ours."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .providers.torch import attention as torch_attention


def exporting() -> bool:
    exporter = sys.modules.get("torch.onnx")
    return exporter is not None and exporter.is_in_onnx_export()


def attention(args: tuple[Any, ...], return_lse: bool, dims: int) -> Tensor:
    """Torch's operator, with all masks in one. NaN and Inf of what is masked are not kept out."""
    q, k, v, attn_mask, key_mask, seed, cu_seqlens_q, *rest = args
    for name, used in (
        ("cu_seqlens_q", cu_seqlens_q is not None),
        ("dropout_p", args[11]),
        ("softcap", args[16]),
        ("return_lse", return_lse),
    ):
        if used:
            raise ValueError(f"{name}: has no form in ONNX; export without it, a module in eval mode")
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(q.dtype)  # ONNX adds numbers of one type
    return torch_attention.attention(q, k, v, attn_mask, key_mask, seed, cu_seqlens_q, *rest, dims=dims)
