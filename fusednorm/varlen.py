"""``varlen_attention``: attention within packed sequences."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor
from torch.overrides import has_torch_function_variadic

from . import _attention_checks as checks
from . import _attention_operands as operands
from . import _autocast
from ._checks import check_flag
from ._options import AttentionInputs, AttentionOptions
from .attention import delegate, run
from .dispatch import eager


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    causal_align: str = "upper_left",
    seed: int | Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    causal_align: str = "upper_left",
    seed: int | Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    causal_align: str = "upper_left",
    seed: int | Tensor | None = None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    causal_align: str = "upper_left",
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    r"""Attention within each of several sequences that are packed one after another, without padding.

    .. math:: O_b = \mathrm{attention}(Q_b, K_b, V_b), \qquad
              Q_b = Q[\mathrm{cu\_seqlens\_q}_b : \mathrm{cu\_seqlens\_q}_{b+1}]

    Queries and keys are split on their own, so sequences of cross attention fit, and either may be empty.

    Args:
        query: (total_q, Hq, D), key: (total_k, H, D), value: (total_k, H, Dv); Hq a multiple of H. dtypes as in
            :func:`scaled_dot_product_attention`, as are the arguments not named here.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,): 0 and the cumulative sums of the lengths, on query's device.
            Their values are checked on the CPU only.
        max_seqlen_q, max_seqlen_k: the longest lengths.
        dropout_p: as there; the mask is ``dropout_mask((Hq, total_q, max_seqlen_k), dropout_p, seed)``: a row for each
            head and packed query, the column is the key's position in its own sequence.
        causal_align: "lower_right" takes each sequence's own off.

    Returns:
        out (total_q, Hq, Dv), and with `return_lse` lse (Hq, total_q).

    Raises:
        TypeError: an argument is of another type or dtype than said above.
        ValueError: a shape, device or number does not fit, or boundaries are none.

    Example:
        >>> q, k, v = torch.randn(3, 7, 4, 8).unbind()  # sequences of 3 and 4 positions
        >>> bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> fusednorm.varlen_attention(q, k, v, bounds, bounds, 4, 4, is_causal=True).shape
        torch.Size([7, 4, 8])
    """
    if has_torch_function_variadic(query, key, value, cu_seqlens_q, cu_seqlens_k, seed):
        return delegate(
            varlen_attention,
            (query, key, value, cu_seqlens_q, cu_seqlens_k, seed),
            *(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, is_causal, scale),
            window=window,
            softcap=softcap,
            causal_align=causal_align,
            seed=seed,
            return_lse=return_lse,
        )
    for name, operand in (("query", query), ("key", key), ("value", value)):
        if type(operand) not in eager.TENSORS and eager.is_sharded(operand):
            raise TypeError(
                f"{name}: varlen_attention takes no DTensor; pass the to_local() of each, and wrap the result"
            )
    query, key, value, _ = _autocast.cast_for_autocast(query, key, value, None)
    checks.check_operands(query, key, value, True)
    dropout_p, scale, softcap = checks.check_options(dropout_p, scale, window, softcap, causal_align, seed)
    is_causal, return_lse = check_flag("is_causal", is_causal), check_flag("return_lse", return_lse)
    checks.check_heads("key", key.shape[1], query.shape[1])
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value: has {value.shape[1]} heads, key {key.shape[1]}; give both as many")
    checks.check_cu_seqlens("q", cu_seqlens_q, query.shape[0], max_seqlen_q, "query", query)
    checks.check_cu_seqlens("k", cu_seqlens_k, key.shape[0], max_seqlen_k, "key", key)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: {cu_seqlens_k.shape[0] - 1} sequences, cu_seqlens_q has {cu_seqlens_q.shape[0] - 1}; pass "
            "the boundaries of one batch"
        )
    seed = operands.seed_of(seed, dropout_p, query)
    options = AttentionOptions(
        *(max_seqlen_q, max_seqlen_k, operands.scale_of(scale, query), dropout_p, is_causal),
        *(causal_align == "lower_right", *operands.window_of(window), softcap),
    )
    inputs = AttentionInputs(query, key, value, None, None, seed, cu_seqlens_q, cu_seqlens_k)
    out, lse = run("varlen_attention", inputs, options, return_lse)
    return (out, lse) if return_lse else out
