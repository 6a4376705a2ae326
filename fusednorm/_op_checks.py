"""What the operators check by themselves: the public functions have seen to it, a caller of torch.ops may not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._activations import ACTIVATIONS


def check_rows(name: str, x: Tensor, normalized_ndim: int, seed: Tensor | None, dropped: float) -> None:
    if not 0 < normalized_ndim <= x.ndim:
        raise ValueError(f"normalized_ndim: {name} expects 1 to {x.ndim}, x's dimensions, got {normalized_ndim}")
    _check_seed(name, seed, dropped)


def _check_seed(name: str, seed: Tensor | None, dropped: float) -> None:
    if dropped and seed is None:
        raise ValueError(f"seed: {name} needs one where something is dropped, a one-element int64 tensor; got None")


def _add_layer_norm_fwd(*args: Any) -> None:
    check_rows("add_layer_norm_fwd", args[0], args[7], args[6], args[9] or args[10])


def _add_layer_norm_bwd(*args: Any) -> None:
    check_rows("add_layer_norm_bwd", args[2], args[10], args[9], args[11] or args[12])


def _bias_act_dropout_fwd(*args: Any) -> None:
    _check_activation("bias_act_dropout_fwd", *args)


def _bias_act_dropout_bwd(*args: Any) -> None:
    _check_activation("bias_act_dropout_bwd", *args[1:6])


def _check_activation(
    name: str, x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, dropout_p: float
) -> None:
    if x.ndim == 0:
        raise ValueError(f"x: {name} expects at least one dimension, got a 0-d tensor; reshape it to (1,)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: {name} knows {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    _check_seed(name, seed, dropout_p)


def _attention_fwd(*args: Any) -> None:
    _check_attention("attention_fwd", args[:3], args[5], args[6], args[7], args[11])


def _attention_bwd(*args: Any) -> None:
    _check_attention("attention_bwd", args[2:5], args[9], args[10], args[11], args[15])


def _check_attention(
    name: str,
    operands: tuple[Tensor, ...],
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_p: float,
) -> None:
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing}: {name} got None beside the other; pass both for packed sequences, or neither")
    expected, form = (4, "(B, H, S, D)") if cu_seqlens_q is None else (3, "(total, H, D)")
    for operand, tensor in zip("qkv", operands, strict=True):
        if tensor.ndim != expected:
            raise ValueError(f"{operand}: {name} expects {form}, got shape {tuple(tensor.shape)}")
    _check_seed(name, seed, dropout_p)


CHECKS: dict[str, Callable[..., None]] = {
    "add_layer_norm_fwd": _add_layer_norm_fwd,
    "add_layer_norm_bwd": _add_layer_norm_bwd,
    "bias_act_dropout_fwd": _bias_act_dropout_fwd,
    "bias_act_dropout_bwd": _bias_act_dropout_bwd,
    "attention_fwd": _attention_fwd,
    "attention_bwd": _attention_bwd,
}
