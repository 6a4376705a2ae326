"""What multi-head attention needs where the weights are asked for, or keys are appended."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dropout
from ._masks import Masks


def append_keys(tensor: Tensor, bias: Tensor | None, zeros: bool, batch_first: bool) -> Tensor:
    """Keys or values with the learned one and the one of zeros at the end."""
    positions = 1 if batch_first else 0
    parts = [tensor]
    shape = list(tensor.shape)
    shape[positions] = 1
    if bias is not None:
        parts.append(bias.to(tensor.dtype).view(1, 1, *shape[2:]).expand(shape))
    if zeros:
        parts.append(tensor.new_zeros(shape))
    return torch.cat(parts, positions) if len(parts) > 1 else tensor


def _causal(q: Tensor, k: Tensor, extra: int, lower_right: bool = False) -> Tensor:
    queries, keys = q.shape[-2], k.shape[-2] - extra
    keep = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries if lower_right else 0)
    return F.pad(keep, (0, extra), value=True)


def causal_mask(q: Tensor, k: Tensor, attn_mask: Tensor | None, extra: int) -> Tensor:
    keep = _causal(q, k, extra)
    if attn_mask is None:
        return keep
    return attn_mask & keep if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~keep, -torch.inf)


def dense_weights(q: Tensor, k: Tensor, masks: Masks, dropout_p: float, seed: Tensor | None, extra: int = 0) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D) + mask)), as torch's need_weights has it; zero for a query that sees no key."""
    attn_mask, key_mask, is_causal, lower_right = masks
    logits = (q * (q.shape[-1] ** -0.5 if q.shape[-1] else 1.0)) @ k.transpose(-2, -1)
    keep = None if key_mask is None else key_mask[:, None, None]
    if is_causal:
        causal = _causal(q, k, extra, lower_right)
        keep = causal if keep is None else keep & causal
    if attn_mask is not None:
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -torch.inf
        keep = seen if keep is None else keep & seen
        if attn_mask.dtype != torch.bool:
            logits = logits + attn_mask.to(logits.dtype)
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
        blind = ~keep.any(-1, keepdim=True)
        weights = torch.softmax(logits.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)
    else:
        weights = torch.softmax(logits, -1)
    if dropout_p >= 1.0:
        return weights * 0.0
    if dropout_p:
        assert seed is not None
        kept = dropout.element_mask(weights.shape, dropout_p, seed)
        weights = torch.where(kept, weights * dropout.keep_scale(dropout_p), 0.0)
    return weights


def format_weights(weights: Tensor, average: bool, batched: bool) -> Tensor:
    """As the module returns them."""
    weights = weights.mean(1) if average else weights
    return weights if batched else weights.squeeze(0)
