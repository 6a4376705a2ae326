"""The native CPU provider of attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._options import AttentionInputs, AttentionOptions
from ..native import attention_arguments, attention_gradients, attention_results
from . import library

refusal = library.refusal


def attention_fwd(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    q, k, v = inputs[:3]
    out, lse = attention_results(q, v, inputs.cu_seqlens_q is not None)
    library.attention_fwd(q, k, v, *attention_arguments(inputs, options), out, lse)
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
    asked = bool(lse.numel())
    gradients = attention_gradients(inputs, output_mask, asked)
    if asked:
        library.attention_bwd(
            # autograd and hooks on saved tensors may bring the statistics in another layout
            *(dout, None if dlse is None else dlse.contiguous(), *inputs[:3], out, lse.contiguous()),
            *(*attention_arguments(inputs, options), *gradients),
        )
    return gradients
