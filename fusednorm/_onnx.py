"""Attention for the ONNX exporter over torch.jit.trace, which knows torch's operator and none of ours."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ._options import AttentionInputs, AttentionOptions
from .providers.torch import attention as torch_attention


def exporting() -> bool:
    exporter = sys.modules.get("torch.onnx")
    return exporter is not None and exporter.is_in_onnx_export()


def attention(inputs: AttentionInputs, options: AttentionOptions, return_lse: bool, dims: int) -> Tensor:
    """Torch's operator, with all masks in one. NaN and Inf of what is masked are not kept out."""
    attn_mask = inputs.attn_mask
    for name, used in (
        ("cu_seqlens_q", inputs.cu_seqlens_q is not None),
        ("dropout_p", options.dropout_p),
        ("softcap", options.softcap),
        ("return_lse", return_lse),
    ):
        if used:
            raise ValueError(f"{name}: has no form in ONNX; export without it, a module in eval mode")
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        inputs = inputs._replace(attn_mask=attn_mask.to(inputs.q.dtype))  # ONNX adds numbers of one type
    return torch_attention.attention(inputs, options, dims)
