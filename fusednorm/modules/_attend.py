"""Multi-head attention up to its output projection, as a function of tensors: projections, heads, attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dropout
from .._attention_checks import MOST_HEAD_DIM
from ..attention import scaled_dot_product_attention
from ._fusible import record
from ._masks import Masks, pad_for_extra_keys


class Projections(NamedTuple):
    """The parameters of :class:`torch.nn.MultiheadAttention` before the output projection."""

    in_proj_weight: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None


class Form(NamedTuple):
    """What is no tensor."""

    heads: int
    batch_first: bool
    sources: str  # "self": key and value are query; "cross": value is key; "apart"
    add_zero_attn: bool = False
    dropout_p: float = 0.0


def _project(inputs: tuple[Tensor, ...], parameters: Projections, form: Form) -> tuple[Tensor, ...]:
    """q, k, v in the inputs' layout, (.., .., heads, head_dim): slices of one product where they have one source."""
    heads, bias = form.heads, parameters.in_proj_bias
    weight = parameters.in_proj_weight
    query = inputs[0]
    if weight is None:
        weights = (parameters.q_proj_weight, parameters.k_proj_weight, parameters.v_proj_weight)
        biases: tuple[Tensor | None, ...] = (None,) * 3 if bias is None else bias.chunk(3)
        sources = {"self": (query,) * 3, "cross": (query, inputs[-1], inputs[-1]), "apart": inputs}[form.sources]
        products = [F.linear(x, w, b) for x, w, b in zip(sources, weights, biases, strict=True)]  # type: ignore[arg-type]
        return tuple(p.unflatten(-1, (heads, p.shape[-1] // heads)) for p in products)
    width = weight.shape[1]
    head = (heads, width // heads)
    if form.sources == "self":
        return F.linear(query, weight, bias).unflatten(-1, (3, *head)).unbind(-3)
    parts = [width, 2 * width] if form.sources == "cross" else [width] * 3
    weights = weight.split(parts)
    biases = (None,) * len(parts) if bias is None else bias.split(parts)
    products = [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    if form.sources == "apart":
        return tuple(p.unflatten(-1, head) for p in products)
    return (products[0].unflatten(-1, head), *products[1].unflatten(-1, (2, *head)).unbind(-3))


def _heads_first(tensor: Tensor, batch_first: bool) -> Tensor:
    """(batch, heads, positions, head_dim), a view."""
    return tensor.transpose(1, 2) if batch_first else tensor.permute(1, 2, 0, 3)


def _appended(tensor: Tensor, bias: Tensor | None, zeros: bool, form: Form) -> Tensor:
    """Keys or values with the learned one and the one of zeros at the end."""
    positions = 1 if form.batch_first else 0
    parts = [tensor]
    shape = list(tensor.shape)
    shape[positions] = 1
    if bias is not None:
        parts.append(bias.to(tensor.dtype).view(1, 1, *shape[2:]).expand(shape))
    if zeros:
        parts.append(tensor.new_zeros(shape))
    return torch.cat(parts, positions) if len(parts) > 1 else tensor


def attend(
    inputs: tuple[Tensor, ...],
    parameters: Projections,
    masks: Masks,
    seed: Tensor | None,
    form: Form,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(what the output projection takes, in the inputs' layout; the weights (batch, heads, queries, keys) or None).

    One seed gives one dropout mask whether the weights are asked for or not. Without one, a mask that both take is of a
    seed drawn here; else whoever serves the attention draws its own.
    """
    q, k, v = _project(inputs, parameters, form)
    extra = (parameters.bias_k is not None) + form.add_zero_attn
    if extra:
        k = _appended(k, parameters.bias_k, form.add_zero_attn, form)
        v = _appended(v, parameters.bias_v, form.add_zero_attn, form)
        masks = pad_for_extra_keys(masks, extra)
    q, k, v = (_heads_first(t, form.batch_first) for t in (q, k, v))
    fused = q.shape[-1] <= MOST_HEAD_DIM and form.dropout_p < 1.0
    weights = None
    if need_weights or not fused:
        if seed is None and 0.0 < form.dropout_p < 1.0:
            seed = dropout.default_seed(q.device)
        weights = attention_weights(q, k, masks, form.dropout_p, seed, extra)
    if fused:
        attn_mask = masks.attn_mask
        is_causal = masks.is_causal
        if is_causal and extra:  # what is appended is no future
            attn_mask, is_causal = _with_causality(q, k, attn_mask, extra), False
        out = scaled_dot_product_attention(
            *(q, k, v, attn_mask, form.dropout_p, is_causal), key_mask=masks.key_mask, seed=seed
        )
    else:
        size = q.shape[-1]
        reason = f"head dim {size} is over {MOST_HEAD_DIM}" if size > MOST_HEAD_DIM else "everything is dropped"
        record("MultiheadAttention", "", reason, "the weights of every query and key are stored")
        assert weights is not None
        out = weights.to(v.dtype) @ v
    merged = out.transpose(1, 2) if form.batch_first else out.permute(2, 0, 1, 3)
    return merged.flatten(2), weights if need_weights else None


def _causal(q: Tensor, k: Tensor, extra: int) -> Tensor:
    keep = torch.ones(q.shape[-2], k.shape[-2] - extra, dtype=torch.bool, device=q.device).tril()
    return F.pad(keep, (0, extra), value=True)


def _with_causality(q: Tensor, k: Tensor, attn_mask: Tensor | None, extra: int) -> Tensor:
    keep = _causal(q, k, extra)
    if attn_mask is None:
        return keep
    return attn_mask & keep if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~keep, -torch.inf)


def attention_weights(
    q: Tensor, k: Tensor, masks: Masks, dropout_p: float, seed: Tensor | None, extra: int = 0
) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D) + mask)), as torch's need_weights has it; zero for a query that sees no key."""
    attn_mask, key_mask, is_causal = masks
    logits = (q * (q.shape[-1] ** -0.5 if q.shape[-1] else 1.0)) @ k.transpose(-2, -1)
    keep = None if key_mask is None else key_mask[:, None, None]
    if is_causal:
        causal = _causal(q, k, extra)
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
