"""``scaled_dot_product_attention``: the contract."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _attention_checks as checks
from . import _attention_operands as operands
from . import _autocast, dropout
from ._checks import check_flag
from ._options import AttentionInputs, AttentionOptions
from .autograd import attention as autograd_attention
from .dispatch import eager, settings
from .dispatch.settings import Decision

_SIDES = frozenset({int, type(None)})  # types of a window's sides

_is_compiling = torch.compiler.is_compiling
delegate: Any = handle_torch_function  # untyped: overloaded functions do not fit its type


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
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
    compiling = _is_compiling()
    if (
        not compiling
        and attn_mask is None is seed
        and type(dropout_p) is type(softcap) is float
        and dropout_p == softcap == 0.0
        and return_lse is False
        and type(causal_align) is str
        and causal_align == "upper_left"
        and (current := settings.current).fastpath is not None
        and current.provider != "cpu"
    ):
        fast, mode = current.fastpath, current.fastpath_mode
        fast_out = fast.attention(query, key, value, key_mask, is_causal, window, scale, enable_gqa, mode)
        if fast_out is not None:
            return fast_out
    if has_torch_function_variadic(query, key, value, attn_mask, key_mask, seed):
        return delegate(
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
    if type(query) not in eager.TENSORS and eager.is_sharded(query):
        from .integrations import dtensor

        return dtensor.attention(
            "scaled_dot_product_attention",
            {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "key_mask": key_mask},
            dropout_p,
            seed,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            window=window,
            softcap=softcap,
            causal_align=causal_align,
            return_lse=return_lse,
        )
    signature = None
    if (
        not compiling
        and type(dropout_p) is type(softcap) is float
        and (scale is None or type(scale) is float)
        and type(is_causal) is type(enable_gqa) is type(return_lse) is bool
        and type(causal_align) is str
        and seed is None
        and (window is None or (type(window) is tuple and _SIDES.issuperset(map(type, window))))
    ):
        inputs = AttentionInputs(query, key, value, attn_mask, key_mask)
        deterministic = torch.are_deterministic_algorithms_enabled()
        flags = is_causal, enable_gqa, return_lse, deterministic
        plan, signature = eager.find(inputs, "attention", dropout_p, softcap, scale, causal_align, window, *flags)
        if plan is not None:
            out, lse = plan(inputs)
            return (out, lse) if return_lse else out
    enable_gqa = check_flag("enable_gqa", enable_gqa)
    query, key, value, attn_mask = _autocast.cast_for_autocast(query, key, value, attn_mask)
    plain = operands.is_plain(query, key, value, enable_gqa)
    if not plain:
        checks.check_operands(query, key, value, False)
    dropout_p, scale, softcap = checks.check_options(dropout_p, scale, window, softcap, causal_align, seed)
    is_causal, return_lse = check_flag("is_causal", is_causal), check_flag("return_lse", return_lse)
    lead: tuple[int, ...] = query.shape[:2]
    if not plain:
        query, key, value, lead = operands.broadcast(query, key, value, enable_gqa)
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
        attn_mask = operands.four_dimensional_mask(attn_mask, batch, heads)
    q, k, v = query, key, value
    if not plain:
        q, k, v = (operands.four_dimensional(t, batch, heads) for t in (query, key, value))
    inputs = AttentionInputs(q, k, v, attn_mask, key_mask, operands.seed_of(seed, dropout_p, q))
    options = AttentionOptions(
        *(n_queries, n_keys, operands.scale_of(scale, q), dropout_p, is_causal, causal_align == "lower_right"),
        *(*operands.window_of(window), softcap),
    )
    call = "scaled_dot_product_attention"
    if signature is not None and plain and dropout_p != 1.0 and (attn_mask is None or attn_mask is given_mask):
        plan = autograd_attention.plan_by_values(call, inputs, options, return_lse, dims)
        eager.keep(signature, plan)
        out, lse = plan(inputs)
    else:
        out, lse = run(call, inputs, options, return_lse, dims)
    if not plain:
        out = out.reshape(*lead, n_queries, v.shape[-1])
        lse = lse if lse is None else lse.reshape(*lead, n_queries)
    return (out, lse) if return_lse else out


def run(
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
