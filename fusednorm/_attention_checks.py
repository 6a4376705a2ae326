"""Argument validation of attention: what is wrong, what was given, what is accepted."""

from __future__ import annotations

from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ._checks import (
    check_choice,
    check_is_tensor,
    check_number,
    check_probability,
    check_same_device,
    check_seed,
    check_tensor,
    refuse_nested,
    shown,
)

MOST_HEAD_DIM = 256
_TINY, _HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # kernels compute in float32
ALIGNS = ("upper_left", "lower_right")


def check_operands(query: Any, key: Any, value: Any, packed: bool) -> None:
    """Dense floating-point tensors of one dtype and device whose last two sizes fit."""
    least, form = (3, "(total, heads, head_dim)") if packed else (2, "(..., sequence, head_dim)")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.ndim < least or (packed and tensor.ndim > least):
            raise ValueError(f"{name}: expected shape {form}, got {tuple(tensor.shape)}; reshape it")
        if tensor.shape[-1] > MOST_HEAD_DIM:
            raise ValueError(
                f"{name}: head dim {tensor.shape[-1]} is over {MOST_HEAD_DIM}; split it into more heads, or use "
                "torch.nn.functional.scaled_dot_product_attention"
            )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: is {tensor.dtype}, query {query.dtype}; convert one of them with .to(dtype)")
        check_same_device(name, tensor, "query", query)
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key: head dim {key.shape[-1]} differs from query's {query.shape[-1]}; project both to one size"
        )
    length = 0 if packed else -2
    if value.shape[length] != key.shape[length]:
        raise ValueError(
            f"value: has {value.shape[length]} positions, key {key.shape[length]}; pass one value for each key"
        )


def check_heads(name: str, heads: int, query_heads: int) -> None:
    """Under grouped-query attention."""
    if heads == 0 or query_heads % heads:
        raise ValueError(
            f"{name}: {heads} heads do not divide query's {query_heads}; give it a number of heads that does"
        )


def check_options(
    dropout_p: Any, scale: Any, window: Any, softcap: Any, causal_align: Any, seed: Any
) -> tuple[float, float | None, float]:
    """(dropout_p, scale, softcap) as floats."""
    if type(dropout_p) is type(softcap) is float and dropout_p == softcap == 0.0 and scale is window is seed is None:
        check_choice("causal_align", causal_align, ALIGNS)
        return dropout_p, scale, softcap
    dropout_p = check_probability("dropout_p", dropout_p)
    if scale is not None:
        scale = check_number("scale", scale, "a number or None")
    softcap = check_number("softcap", softcap, "a number (0.0 is no cap)")
    if softcap != 0.0 and not _TINY <= softcap <= _HUGE:
        raise ValueError(f"softcap: expected 0.0 (no cap) or a number from {_TINY:g} to {_HUGE:g}, got {softcap}")
    check_choice("causal_align", causal_align, ALIGNS)
    check_window(window)
    if seed is not None:
        check_seed(seed)
    return dropout_p, scale, softcap


def check_window(window: Any) -> None:
    if window is None:
        return
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"window: expected (left, right) or None, got {type(window).__name__}; pass (w, w) or (w, 0)")
    if len(window) != 2:
        raise ValueError(f"window: expected (left, right), got {len(window)} entries; pass (w, w) or (w, 0)")
    for side in window:
        if side is None:
            continue
        if isinstance(side, bool) or not isinstance(side, Integral):
            raise TypeError(f"window: expected ints or None in (left, right), got {window}; None is unbounded")
        if side < 0:
            raise ValueError(f"window: expected sizes >= 0, got {tuple(window)}; None is unbounded")


def check_attn_mask(mask: Any, query: Tensor, logits: tuple[int, ...]) -> None:
    """Bool or additive, broadcasting to the logits' shape."""
    check_is_tensor("attn_mask", mask, "a torch.Tensor or None")
    check_layout("attn_mask", mask)
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        added = "float32" if query.dtype == torch.float32 else f"torch.float32 or query's {query.dtype}"
        raise TypeError(
            f"attn_mask: expected bool (True: attend) or {added} (added to the logits), got {mask.dtype}; "
            "convert it first"
        )
    check_same_device("attn_mask", mask, "query", query)
    if mask.ndim < 2:
        raise ValueError(f"attn_mask: expected at least 2 dimensions, got shape {tuple(mask.shape)}; unsqueeze it")
    fits = mask.ndim <= len(logits) and all(
        size in (1, full) for size, full in zip(mask.shape[::-1], logits[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask: shape {tuple(mask.shape)} does not broadcast to {tuple(logits)}, (..., query positions, key "
            "positions); unsqueeze or slice it"
        )


def check_key_mask(mask: Any, query: Tensor, expected: tuple[int, ...]) -> None:
    check_is_tensor("key_mask", mask, "a bool torch.Tensor or None")
    if mask.dtype != torch.bool:
        remedy = "pass `mask != 0` if 1 stands for attend"
        if mask.is_floating_point():
            remedy += ", `mask == 0` if it is additive (0 keeps, -inf hides)"
        raise TypeError(f"key_mask: expected bool (True: attend), got {mask.dtype}; {remedy}")
    check_layout("key_mask", mask)
    check_same_device("key_mask", mask, "query", query)
    if mask.shape == expected:
        return
    remedy = "expand or slice it"
    if mask.ndim == 4 and mask.shape[1:3] == (1, 1) and (mask.shape[0], mask.shape[3]) == expected:
        remedy = "pass `mask[:, 0, 0]`, or the whole as attn_mask"
    elif mask.ndim > len(expected):
        remedy = "pass it as attn_mask if it differs between heads or queries"
    raise ValueError(
        f"key_mask: expected shape {tuple(expected)}, (*batch, key positions), got {tuple(mask.shape)}; {remedy}"
    )


def check_layout(name: str, tensor: Tensor) -> None:
    refuse_nested(name, tensor)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}; call to_dense()")


def check_cu_seqlens(name: str, bounds: Any, total: int, longest: Any, packed_name: str, packed: Tensor) -> None:
    """Boundaries of packed sequences. Their values are looked at on the CPU only: on a GPU a look would wait."""
    check_is_tensor(f"cu_seqlens_{name}", bounds, "an int32 torch.Tensor")
    if bounds.dtype != torch.int32:
        raise TypeError(f"cu_seqlens_{name}: expected int32, got {bounds.dtype}; convert it with .to(torch.int32)")
    if bounds.ndim != 1 or bounds.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens_{name}: expected shape (batch + 1,), got {tuple(bounds.shape)}; it begins with 0 and ends "
            f"with {packed_name}'s length"
        )
    check_layout(f"cu_seqlens_{name}", bounds)
    check_same_device(f"cu_seqlens_{name}", bounds, packed_name, packed)
    if isinstance(longest, bool) or not isinstance(longest, (Integral, torch.SymInt)):
        raise TypeError(f"max_seqlen_{name}: expected an int, got {type(longest).__name__}")
    if longest < 0 or longest >= 2**63:  # type: ignore[operator]
        raise ValueError(f"max_seqlen_{name}: expected a length >= 0, got {shown(longest)}")
    if (
        not bounds.is_cpu
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.is_functorch_wrapped_tensor(bounds)
    ):
        return
    values = bounds.tolist()
    lengths = [after - before for before, after in pairwise(values)]
    if values[0] != 0 or values[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens_{name}: expected boundaries that begin with 0, never decrease, and end with {packed_name}'s "
            f"length {total}, got {values}; pass the cumulative sum of the lengths"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(
            f"max_seqlen_{name}: is {longest}, but a sequence has {max(lengths)} positions; pass the longest length"
        )
