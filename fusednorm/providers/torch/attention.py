"""Torch's own attention, ``F.scaled_dot_product_attention``, with what it can express as a mask.

Its results are torch's: NaN and Inf of what is masked may reach them, and without a seed the dropout is torch's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from ... import dropout
from ..._dtypes import compute_dtype
from ..._options import AttentionInputs, AttentionOptions
from ..._transforms import traced

BACKENDS = {  # of torch's operator, by their names in measurements
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def refusal(op: str, inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    if inputs.cu_seqlens_q is not None:
        return "torch's attention takes no packed sequences (cu_seqlens)"
    if options.softcap:
        return "torch's attention has no softcap"
    return None


def attention(inputs: AttentionInputs, options: AttentionOptions, dims: int = 4) -> Tensor:
    """Out of 4-D operands; of `dims` dimensions they were given, which decides over torch's kernel."""
    q, k, v, seed = *inputs[:3], inputs.seed
    scale, dropout_p = options.scale, options.dropout_p
    mask, causal = as_mask(inputs, options)
    if dropout_p and seed is not None:
        return _with_the_documented_mask(q, k, v, mask, seed, scale, dropout_p, causal)
    grouped = False
    if q.shape[1] != k.shape[1]:  # a branch, since torch takes no symbolic truth value
        grouped = not traced()
        if not grouped:  # the ONNX exporter knows no enable_gqa
            k, v = _repeated(q, k, v)
    keywords: dict[str, Any] = {"is_causal": causal, "scale": scale, "enable_gqa": grouped}
    if dims == 4:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, **keywords)
    # torch's fused kernels take four dimensions alone: one more leads to the operators that another number leads to
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask, dropout_p, **keywords).squeeze(0)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as queries."""
    group = int(q.shape[1]) // max(int(k.shape[1]), 1)
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def needs_no_mask(inputs: AttentionInputs, options: AttentionOptions) -> bool:
    """Whether nothing is masked, or all of it by torch's own `is_causal`, which is aligned upper-left."""
    if inputs.attn_mask is not None or inputs.key_mask is not None:
        return False
    if options.window_left >= 0 or options.window_right >= 0:
        return False
    return not options.causal or not options.lower_right or inputs.q.shape[-2] == inputs.k.shape[-2]


def as_mask(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor | None, bool]:
    """(the one mask that torch takes, whether it is causal besides)."""
    q, k, _, attn_mask, key_mask, *_ = inputs
    causal, window_left, window_right = options.causal, options.window_left, options.window_right
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    offset = n_keys - n_queries if options.lower_right else 0
    if needs_no_mask(inputs, options):
        return None, causal
    if attn_mask is not None and attn_mask.dtype != torch.bool and q.dtype == torch.float64:
        attn_mask = attn_mask.double()  # torch's flash attention would take float32 memory for float64
    seen = None if key_mask is None else key_mask[:, None, None, :]
    if causal or window_left >= 0 or window_right >= 0:
        right = 0 if causal else window_right
        distance = torch.arange(n_keys, device=q.device) - torch.arange(n_queries, device=q.device)[:, None] - offset
        near = distance <= right if right >= 0 else distance >= -window_left
        if right >= 0 and window_left >= 0:
            near = near & (distance >= -window_left)
        seen = near if seen is None else seen & near
    if attn_mask is None:
        return seen, False
    if attn_mask.dtype == torch.bool:
        return attn_mask if seen is None else attn_mask & seen, False
    return attn_mask if seen is None else torch.where(seen, attn_mask, -math.inf), False


def _with_the_documented_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    scale: float,
    dropout_p: float,
    causal: bool,
) -> Tensor:
    """By matrix products and softmax: torch's operator draws its own mask."""
    acc = compute_dtype(q.dtype)
    keys, values = _repeated(q, k.to(acc), v.to(acc))
    logits = (q.to(acc) * scale) @ keys.mT
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(mask.logical_not(), -math.inf)
    elif mask is not None:
        logits = logits + mask
    alive = (logits > -math.inf).any(-1, keepdim=True)
    weights = torch.where(alive, torch.softmax(torch.where(alive, logits, 0.0), -1), 0.0)
    kept = dropout.element_mask(weights.shape, dropout_p, seed)
    return (torch.where(kept, weights * dropout.keep_scale(dropout_p), 0.0) @ values).to(q.dtype)
