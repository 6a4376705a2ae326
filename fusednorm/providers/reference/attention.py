"""Attention in readable PyTorch: forward and backward by hand, a block of queries at a time; defines the semantics.

Logits, softmax and every sum are in float32 (float64 for float64); the probabilities are not rounded; one rounding at
the end. A key is *visible* to a query if causal, window, key mask and attention mask (its -inf too) all let it be;
what is not visible contributes to nothing, NaN and Inf included. Two products (`masked_pv`, `masked_qk`)
see to that; they are each other's derivatives, so that derivatives of any order and kind hold to it as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import dropout
from ..._dtypes import compute_dtype
from ..._options import AttentionInputs, AttentionOptions
from ..strides import rows_like
from .masked_matmul import masked_pv, masked_qk

_MOST_ROWS = 1024  # of a block of queries
_MOST_LOGITS = 2**20  # of a block, for each head: no square of a longer sequence is ever held


class _Softmax(NamedTuple):
    """A block of queries."""

    visible: Tensor  # broadcasts to the probabilities' shape
    probabilities: Tensor  # 0 where not visible
    lse: Tensor
    slope: Tensor | None  # the derivative of the capped logits by the uncapped
    keep: Tensor | None


def refusal(op: str, inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    return None


# --- one block of queries ---


def _rows(tensor: Tensor, block: slice) -> Tensor:
    return tensor.narrow(-2, block.start, block.stop - block.start)


class _Sequences(NamedTuple):
    """Batches of one length, in the precision computed in; k and v with as many heads as q."""

    q: Tensor  # (B, H, Sq, D), scaled
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None  # 4-D
    key_mask: Tensor | None
    seed: Tensor | None
    rows: Tensor | None  # of the dropout mask: (B, H), the first query's
    contiguous: bool  # whether these rows are all the mask's, in order
    options: AttentionOptions

    def blocks(self) -> Iterator[slice]:
        n_queries, n_keys = self.q.shape[-2], self.k.shape[-2]
        step = max(1, min(_MOST_ROWS, _MOST_LOGITS // max(n_keys, 1)))
        for start in range(0, n_queries, step):
            yield slice(start, min(start + step, n_queries))

    def mask_of(self, block: slice) -> Tensor | None:
        mask = self.attn_mask
        return mask if mask is None or mask.shape[-2] == 1 else _rows(mask, block)

    def visible(self, block: slice) -> Tensor:
        n_keys, o = self.k.shape[-2], self.options
        offset = n_keys - self.q.shape[-2] if o.lower_right else 0
        i = torch.arange(block.start, block.stop, device=self.q.device)[:, None] + offset
        j = torch.arange(n_keys, device=self.q.device)
        visible = torch.ones(block.stop - block.start, n_keys, dtype=torch.bool, device=self.q.device)
        if o.causal:
            visible = visible & (j <= i)
        if o.window_left >= 0:
            visible = visible & (j >= i - o.window_left)
        if o.window_right >= 0:
            visible = visible & (j <= i + o.window_right)
        mask = self.mask_of(block)
        if mask is not None:
            visible = visible & (mask if mask.dtype == torch.bool else mask != -math.inf)
        return visible if self.key_mask is None else visible & self.key_mask[:, None, None, :]

    def keep(self, block: slice) -> Tensor | None:
        p = self.options.dropout_p
        if not p:
            return None
        assert self.seed is not None and self.rows is not None
        shape = (*self.q.shape[:3], self.k.shape[-2])
        if self.contiguous and block == slice(0, shape[2]):
            return dropout.element_mask(shape, p, self.seed)
        rows = self.rows[..., None] + torch.arange(block.start, block.stop, device=self.rows.device)
        return dropout.rows_mask(rows, shape[3], p, self.seed)

    def softmax(self, block: slice) -> _Softmax:
        visible, slope, cap = self.visible(block), None, self.options.softcap
        logits = masked_qk(_rows(self.q, block), self.k, visible)
        if cap:
            capped = torch.tanh(logits / cap)
            logits, slope = cap * capped, 1.0 - capped * capped
        mask = self.mask_of(block)
        if mask is not None and mask.dtype != torch.bool:
            logits = logits + torch.where(visible, mask.to(logits.dtype), 0.0)
        logits = torch.where(visible, logits, -math.inf)
        if not self.k.shape[-2]:
            return _Softmax(visible, logits, logits.sum(-1) - math.inf, slope, self.keep(block))
        largest = logits.detach().amax(-1, keepdim=True)
        dead = largest == -math.inf
        # -inf - -inf would be NaN, and so would be the derivative of log at 0
        weights = torch.where(visible, logits - torch.where(dead, 0.0, largest), -math.inf).exp()
        total = torch.where(dead, 1.0, weights.sum(-1, keepdim=True))
        lse = torch.where(dead, -math.inf, largest + total.log()).squeeze(-1)
        probabilities = torch.where(visible, weights / total, 0.0)  # 0 / NaN is NaN
        return _Softmax(visible, probabilities, lse, slope, self.keep(block))


def _dropped(probabilities: Tensor, visible: Tensor, keep: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    """What is dropped is not visible to the values."""
    if keep is None:
        return probabilities, visible
    return torch.where(keep, probabilities * dropout.keep_scale(p), 0.0), visible & keep


def _forward(s: _Sequences) -> tuple[Tensor, Tensor]:
    out = [s.q.new_empty((*s.q.shape[:2], 0, s.v.shape[-1]))]
    lse = [s.q.new_empty((*s.q.shape[:2], 0))]
    for block in s.blocks():
        soft = s.softmax(block)
        weights, visible = _dropped(soft.probabilities, soft.visible, soft.keep, s.options.dropout_p)
        out.append(masked_pv(weights, s.v, visible))
        lse.append(soft.lse)
    return torch.cat(out, -2), torch.cat(lse, -1)


def _backward(
    s: _Sequences, dout: Tensor, dlse: Tensor | None, mask_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    r"""Gradients of (scaled q, k, v, attn_mask): :math:`dS = P\,(dP - \mathrm{sum}(P\,dP) + d\mathrm{lse})`."""
    dq, dk, dv = [s.q.new_empty((*s.q.shape[:2], 0, s.q.shape[-1]))], torch.zeros_like(s.k), torch.zeros_like(s.v)
    dmask: list[Tensor] = []
    for block in s.blocks():
        soft, dy = s.softmax(block), _rows(dout, block)
        weights, visible = _dropped(soft.probabilities, soft.visible, soft.keep, s.options.dropout_p)
        dv = dv + masked_pv(weights.mT, dy, visible.mT)
        dp = masked_qk(dy, s.v, visible)
        if soft.keep is not None:
            dp = dp * dropout.keep_scale(s.options.dropout_p)
        dp = dp - (soft.probabilities * dp).sum(-1, keepdim=True)  # first: with few keys they cancel exactly
        if dlse is not None:
            dp = dp + torch.where(soft.lse[..., None] == -math.inf, 0.0, _rows(dlse.unsqueeze(-1), block))
        ds = torch.where(soft.visible, soft.probabilities * dp, 0.0)
        if mask_wanted:
            assert s.attn_mask is not None
            dmask.append(_summed_to(ds, s.attn_mask.shape))
        if soft.slope is not None:
            ds = ds * soft.slope
        dq.append(masked_pv(ds, s.k, soft.visible))
        dk = dk + masked_pv(ds.mT, _rows(s.q, block), soft.visible.mT)
    if not mask_wanted:
        return torch.cat(dq, -2), dk, dv, None
    assert s.attn_mask is not None
    if not dmask:
        return torch.cat(dq, -2), dk, dv, torch.zeros_like(s.attn_mask)
    return torch.cat(dq, -2), dk, dv, sum(dmask[1:], dmask[0]) if s.attn_mask.shape[-2] == 1 else torch.cat(dmask, -2)


def _summed_to(gradient: Tensor, shape: torch.Size) -> Tensor:
    """A block's gradient summed over the dimensions that the mask was broadcast along."""
    dims = [d for d in range(4) if shape[d] == 1 != gradient.shape[d]]
    return gradient.sum(dims, keepdim=True) if dims else gradient


# --- batches and packed sequences ---


def _sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    options: AttentionOptions,
    rows: Tensor | None = None,
) -> _Sequences:
    """`rows` is None for a batch, whose dropout rows are all of the mask's in order."""
    acc, group = compute_dtype(q.dtype), q.shape[1] // max(k.shape[1], 1)
    k, v = k.to(acc), v.to(acc)
    if group != 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
    contiguous = rows is None
    if rows is None and options.dropout_p:
        heads = torch.arange(q.shape[0] * q.shape[1], device=q.device).reshape(q.shape[:2])
        rows = heads * q.shape[2]
    return _Sequences(q.to(acc) * options.scale, k, v, attn_mask, key_mask, seed, rows, contiguous, options)


def _packed(inputs: AttentionInputs, options: AttentionOptions) -> Iterator[tuple[_Sequences, slice, slice]]:
    """Each sequence as a batch of one, and where its queries and keys stand."""
    q, k, v, _, _, seed, cu_seqlens_q, cu_seqlens_k = inputs
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    total, heads = q.shape[:2]
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    for n in range(len(bounds_q) - 1):
        queries, keys = slice(*bounds_q[n : n + 2]), slice(*bounds_k[n : n + 2])
        rows = (torch.arange(heads, device=q.device) * total + queries.start)[None]
        pieces = (q[:, :, queries], k[:, :, keys], v[:, :, keys])
        yield _sequences(*pieces, None, None, seed, options, rows), queries, keys


def attention(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """(out, lse) by differentiable operators, which every transform goes through."""
    q, v = inputs.q, inputs.v
    if inputs.cu_seqlens_q is None:
        out, lse = _forward(_sequences(*inputs[:6], options))
        return out.to(q.dtype), lse
    outs, lses = [q.new_empty((0, q.shape[1], v.shape[-1]))], [q.new_empty(q.shape[1], 0, dtype=compute_dtype(q.dtype))]
    for sequence, _, _ in _packed(inputs, options):
        out, lse = _forward(sequence)
        outs.append(out[0].transpose(0, 1).to(q.dtype))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


def attention_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: AttentionInputs,
    options: AttentionOptions,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of (q, k, v, attn_mask), again by differentiable operators."""
    q, k, v, attn_mask, *_ = inputs
    acc, scale = compute_dtype(q.dtype), options.scale
    if inputs.cu_seqlens_q is None:
        sequence = _sequences(*inputs[:6], options)
        dq, dk, dv, dmask = _backward(sequence, dout.to(acc), dlse, output_mask[3])
        if attn_mask is not None and dmask is not None:
            dmask = dmask.reshape(attn_mask.shape).to(attn_mask.dtype)
        dk, dv = (_grouped(gradient, t.shape[1]) for gradient, t in ((dk, k), (dv, v)))
        return (dq * scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dmask
    parts = [[t.new_empty((0, *t.shape[1:]))] for t in (q, k, v)]
    for sequence, queries, _ in _packed(inputs, options):
        dy = dout[queries].transpose(0, 1)[None].to(acc)
        dlse_part = None if dlse is None else dlse[:, queries].unsqueeze(0)
        dq, dk, dv, _ = _backward(sequence, dy, dlse_part, False)
        gradients = (dq * scale, _grouped(dk, k.shape[1]), _grouped(dv, v.shape[1]))
        for part, gradient in zip(parts, gradients, strict=True):
            part.append(gradient[0].transpose(0, 1).to(q.dtype))
    dq, dk, dv = (torch.cat(part) for part in parts)
    return dq, dk, dv, None


def _grouped(gradient: Tensor, heads: int) -> Tensor:
    """The heads of a group share a key: their gradients add up."""
    if gradient.shape[1] == heads:
        return gradient
    return gradient.unflatten(1, (heads, gradient.shape[1] // heads)).sum(2)


# --- the ops ---


def _laid_out(result: Tensor, like: Tensor) -> Tensor:
    """In memory as `like` is where its rows are contiguous, so that (B, S, H, D) storage stays that; no alias."""
    if result.shape != like.shape:
        return result.contiguous()
    return rows_like(like).copy_(result)


def attention_fwd(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    out, lse = attention(inputs, options)
    return _laid_out(out, inputs.q), lse.contiguous()


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """`out` and `lse` are for kernels that hold no whole row of logits."""
    gradients = attention_gradients(dout, dlse, inputs, options, output_mask)
    return tuple(
        _laid_out(gradient, like) if wanted and gradient is not None and like is not None else None
        for gradient, like, wanted in zip(gradients, inputs[:4], output_mask, strict=True)
    )
