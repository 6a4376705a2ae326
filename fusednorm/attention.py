"""``scaled_dot_product_attention`` and ``varlen_attention``: the contract, and the forms that the ops take."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _attention_checks as checks
from . import _autocast, dropout
from ._attention_shapes import broadcast, four_dimensional, four_dimensional_mask
from ._checks import FLOAT_DTYPES, check_flag
from ._options import AttentionInputs, AttentionOptions
from ._transforms import traced
from .autograd import attention as autograd_attention
from .dispatch import eager, settings
from .dispatch.settings import Decision

_UNBOUNDED = 2**62  # past any position, and a 64-bit number
_SIDES = frozenset({int, type(None)})  # types of a window's sides

_is_compiling = torch.compiler.is_compiling
_delegate: Any = handle_torch_function  # untyped: overloaded functions do not fit its type


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    causal_align: str = "upper_left",
    seed: int | Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    causal_align: str = "upper_left",
    seed: int | Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    causal_align: str = "upper_left",
    seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    r"""Attention, as :func:`torch.nn.functional.scaled_dot_product_attention`, with every mask in one call.

    .. math::
        S = c \tanh(\mathrm{scale}\, Q K^T / c) + \mathrm{attn\_mask}, \qquad
        O = \mathrm{dropout}(\mathrm{softmax}(S))\, V, \qquad \mathrm{lse} = \log \sum_j e^{S_{ij}}

    (without the tanh where the soft cap *c* is 0). `attn_mask`, `is_causal`, `key_mask` and `window` combine as AND.
    What they mask reaches neither results nor gradients, NaN and Inf included; a query that sees no key has a zero
    output, zero gradients and an lse of -inf.

    Torch's own operator serves what it computes alike, and what no kernel of ours takes; second derivatives go through
    ours. On a GPU nobody waits to look at values. There NaN and Inf of what a causal or another mask of torch's hides
    may reach its results, as in torch (never those of `key_mask`), and its gradients may differ from run to run in the
    last bits. ``use_provider("triton")`` excludes both, ``torch.use_deterministic_algorithms(True)`` the second.

    Args:
        query: (\*, Hq, Sq, D), key: (\*, H, Sk, D), value: (\*, H, Sk, Dv); float32, bfloat16, float16 or float64, of
            one dtype, any strides, leading dimensions that broadcast; the heads may be absent. D and Dv up to 256.
        attn_mask: broadcasts to (\*, Hq, Sq, Sk), at least 2-dimensional; bool (True: attend), or float32 or query's
            dtype, added to the logits.
        dropout_p: probability that an attention weight is dropped, in [0, 1]; applied whenever it is > 0. The mask is
            ``dropout_mask((*, Hq, Sq, Sk), dropout_p, seed)``.
        is_causal: query i sees the keys j <= i + off.
        scale: of the logits, any sign; :math:`1 / \sqrt D` if not given.
        enable_gqa: key and value may have fewer heads than query, a divisor of its number; several query heads in
            sequence share one. Dimension -3 is the heads'.
        key_mask: bool (\*batch, Sk), True: attend; never expanded. The batch is all before the heads, in three
            dimensions without `enable_gqa` the first.
        window: (left, right), None in it is unbounded: query i sees keys from i + off - left to i + off + right.
        softcap: bounds the scaled logits to (-softcap, softcap), before masks; 0.0 is no cap.
        causal_align: "upper_left": off = 0; "lower_right": off = Sk - Sq.
        seed: int or one-element int64 tensor that fixes the dropout mask; drawn from torch's generator if not given.
            One seed gives every layer the same mask. A function drops in eval mode too: pass dropout_p=0.0 there.
            Without it, where no kernel of ours serves, the mask is torch's own, and so is what NaN it drops.
        return_lse: return (out, lse).

    Returns:
        out (\*, Hq, Sq, Dv) of query's dtype (of autocast's where torch's own function gives that), and with
        `return_lse` lse (\*, Hq, Sq), the natural logarithm, differentiable, in float32 (float64 for float64).

    Raises:
        TypeError: an argument is of another type or dtype than said above.
        ValueError: a shape, device or number does not fit.

    Source: A. Vaswani et al., "Attention is all you need", arXiv:1706.03762.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 6, 8).unbind()
        >>> padding = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
        >>> fusednorm.scaled_dot_product_attention(q, k, v, is_causal=True, key_mask=padding).shape
        torch.Size([2, 4, 6, 8])
    """
    if (
        not _is_compiling()
        and attn_mask is None is seed
        and type(dropout_p) is type(softcap) is float
        and dropout_p == softcap == 0.0
        and return_lse is False
        and type(causal_align) is str
        and causal_align == "upper_left"
        and (current := settings.current).fastpath is not None
        and current.provider is None
    ):
        fast_out = current.fastpath.attention(query, key, value, key_mask, is_causal, window, scale, enable_gqa)
        if fast_out is not None:
            return fast_out
    if has_torch_function_variadic(query, key, value, attn_mask, key_mask, seed):
        return _delegate(
            scaled_dot_product_attention,
            (query, key, value, attn_mask, key_mask, seed),
            *(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa),
            key_mask=key_mask,
            window=window,
            softcap=softcap,
            causal_align=causal_align,
            seed=seed,
            return_lse=return_lse,
        )
    plans, signature = settings.current.plans, None
    if (
        type(dropout_p) is type(softcap) is float
        and (scale is None or type(scale) is float)
        and type(is_causal) is type(enable_gqa) is type(return_lse) is bool
        and type(causal_align) is str
        and seed is None
        and (window is None or (type(window) is tuple and _SIDES.issuperset(map(type, window))))
    ):
        inputs = AttentionInputs(query, key, value, attn_mask, key_mask)
        deterministic = torch.are_deterministic_algorithms_enabled()
        flags = is_causal, enable_gqa, return_lse, deterministic
        signature = eager.signature(inputs, "attention", dropout_p, softcap, scale, causal_align, window, *flags)
        if signature is not None and (plan := plans.get(signature)) is not None:
            out, lse = plan(inputs)
            return (out, lse) if return_lse else out
    enable_gqa = check_flag("enable_gqa", enable_gqa)
    query, key, value, attn_mask = _autocast.cast_for_autocast(query, key, value, attn_mask)
    plain = _plain(query, key, value, enable_gqa)
    if not plain:
        checks.check_operands(query, key, value, False)
    dropout_p, scale, softcap = checks.check_options(dropout_p, scale, window, softcap, causal_align, seed)
    is_causal, return_lse = check_flag("is_causal", is_causal), check_flag("return_lse", return_lse)
    lead: tuple[int, ...] = query.shape[:2]
    if not plain:
        query, key, value, lead = broadcast(query, key, value, enable_gqa)
    n_queries, n_keys, dims = query.shape[-2], key.shape[-2], query.ndim
    if attn_mask is not None:
        checks.check_attn_mask(attn_mask, query, (*lead, n_queries, n_keys))
    # 4-D: the last leading dimension is the heads', but the only one the batch's unless heads are grouped
    batch, heads = (lead[:-1], lead[-1:]) if len(lead) > 1 or enable_gqa else (lead, ())
    if key_mask is not None:
        checks.check_key_mask(key_mask, query, (*batch, n_keys))
        key_mask = key_mask if len(batch) == 1 else key_mask.reshape(math.prod(batch), n_keys)
    given_mask = attn_mask
    if attn_mask is not None and not (plain and attn_mask.ndim == 4):
        attn_mask = four_dimensional_mask(attn_mask, batch, heads)
    q, k, v = (query, key, value) if plain else [four_dimensional(t, batch, heads) for t in (query, key, value)]
    inputs = AttentionInputs(q, k, v, attn_mask, key_mask, _seed(seed, dropout_p, q))
    options = AttentionOptions(
        *(n_queries, n_keys, _scale(scale, q), dropout_p, is_causal, causal_align == "lower_right"),
        *(*_window(window), softcap),
    )
    call = "scaled_dot_product_attention"
    if signature is not None and plain and dropout_p != 1.0 and (attn_mask is None or attn_mask is given_mask):
        plan = autograd_attention.plan_by_values(call, inputs, options, return_lse, dims)
        eager.keep(plans, signature, plan)
        out, lse = plan(inputs)
    else:
        out, lse = _run(call, inputs, options, return_lse, dims)
    if not plain:
        out = out.reshape(*lead, n_queries, v.shape[-1])
        lse = lse if lse is None else lse.reshape(*lead, n_queries)
    return (out, lse) if return_lse else out


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
        return _delegate(
            varlen_attention,
            (query, key, value, cu_seqlens_q, cu_seqlens_k, seed),
            *(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, is_causal, scale),
            window=window,
            softcap=softcap,
            causal_align=causal_align,
            seed=seed,
            return_lse=return_lse,
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
    q, k, v = query, key, value
    out, lse = _run(
        "varlen_attention",
        AttentionInputs(q, k, v, None, None, _seed(seed, dropout_p, q), cu_seqlens_q, cu_seqlens_k),
        AttentionOptions(
            *(max_seqlen_q, max_seqlen_k, _scale(scale, q), dropout_p, is_causal, causal_align == "lower_right"),
            *(*_window(window), softcap),
        ),
        return_lse,
    )
    return (out, lse) if return_lse else out


def _run(
    call: str, inputs: AttentionInputs, options: AttentionOptions, return_lse: bool, dims: int = 4
) -> tuple[Tensor, Tensor | None]:
    """(out, lse). At dropout_p = 1 zeros, whose gradients are zeros, and the lse, which dropout does not touch."""
    if options.dropout_p != 1.0:
        return autograd_attention.plan(call, inputs, options, return_lse, dims)(inputs)
    settings.record(Decision(call, "torch", "zeros, because everything is dropped"))
    q, _, v, *_ = inputs
    zero = sum(dropout.all_dropped(t).sum() for t in inputs[:4] if t is not None and t.is_floating_point())
    out = (q.new_zeros((*q.shape[:-1], v.shape[-1])) + zero).to(q.dtype)
    if not return_lse:
        return out, None
    inputs, options = inputs._replace(seed=None), options._replace(dropout_p=0.0)
    return out, autograd_attention.plan(call, inputs, options, True, dims)(inputs)[1]


def _plain(query: Any, key: Any, value: Any, grouped: bool) -> bool:
    """Whether these are what the checks and the broadcasting below would let through as they are: the usual call."""
    if not type(query) is type(key) is type(value) is Tensor or query.ndim != 4 or query.dtype not in FLOAT_DTYPES:
        return False
    if query.is_nested or key.is_nested or value.is_nested:  # they have no shape
        return False
    shape, keys, values = query.shape, key.shape, value.shape
    return bool(
        len(keys) == len(values) == 4
        and shape[0] == keys[0]
        and (shape[1] == keys[1] or (grouped and keys[1] and shape[1] % keys[1] == 0))
        and shape[3] == keys[3] <= checks.MOST_HEAD_DIM >= values[3]
        and keys[:3] == values[:3]
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and query.layout == key.layout == value.layout == torch.strided
    )


def _scale(scale: float | None, q: Tensor) -> float:
    if scale is None:
        width = int(q.shape[-1]) if traced() else q.shape[-1]  # of a traced size the root would be one in float32
        return 1.0 / width**0.5 if width else 1.0  # as torch computes it, to the last bit
    return scale


def _seed(seed: int | Tensor | None, dropout_p: float, q: Tensor) -> Tensor | None:
    """None where the provider is to draw one: torch's operator draws its own mask."""
    return dropout.seed_tensor(seed, q.device) if dropout_p and seed is not None else None


def _window(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    left, right = (None, None) if window is None else window
    return -1 if left is None else min(int(left), _UNBOUNDED), -1 if right is None else min(int(right), _UNBOUNDED)
