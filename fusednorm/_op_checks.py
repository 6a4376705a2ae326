"""What the operators check by themselves: the public functions have seen to it, a caller of torch.ops may not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._activations import ACTIVATIONS
from ._options import ActivationInputs, ActivationOptions, AttentionInputs, AttentionOptions


def check_rows(name: str, rows: Tensor, seed: Tensor | None, normalized_ndim: int, dropped: bool) -> None:
    if not 0 < normalized_ndim <= rows.ndim:
        raise ValueError(f"normalized_ndim: {name} expects 1 to {rows.ndim}, x's dimensions, got {normalized_ndim}")
    _check_seed(name, seed, dropped)


def _check_seed(name: str, seed: Tensor | None, dropped: bool) -> None:
    if dropped and seed is None:
        raise ValueError(f"seed: {name} needs one where something is dropped, a one-element int64 tensor; got None")


def _check_activation(name: str, inputs: ActivationInputs, options: ActivationOptions) -> None:
    if inputs.x.ndim == 0:
        raise ValueError(f"x: {name} expects at least one dimension, got a 0-d tensor; reshape it to (1,)")
    if options.activation not in ACTIVATIONS:
        raise ValueError(f"activation: {name} knows {', '.join(map(repr, ACTIVATIONS))}, got {options.activation!r}")
    _check_seed(name, inputs.seed, options.dropped)


def _check_attention(name: str, inputs: AttentionInputs, options: AttentionOptions) -> None:
    if (inputs.cu_seqlens_q is None) != (inputs.cu_seqlens_k is None):
        missing = "cu_seqlens_q" if inputs.cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing}: {name} got None beside the other; pass both for packed sequences, or neither")
    expected, form = (4, "(B, H, S, D)") if inputs.cu_seqlens_q is None else (3, "(total, H, D)")
    for operand, tensor in zip("qkv", inputs[:3], strict=True):
        if tensor.ndim != expected:
            raise ValueError(f"{operand}: {name} expects {form}, got shape {tuple(tensor.shape)}")
    _check_seed(name, inputs.seed, options.dropped)


# Each takes the operator's name and the arguments of a provider's function.
CHECKS: dict[str, Callable[..., None]] = {
    "add_layer_norm_fwd": lambda name, inputs, options: check_rows(
        name, inputs.x, inputs.seed, options.normalized_ndim, options.dropped
    ),
    "add_layer_norm_bwd": lambda name, dnormed, dresidual_out, saved, options, output_mask: check_rows(
        name, saved.rows, saved.seed, options.normalized_ndim, options.dropped
    ),
    "bias_act_dropout_fwd": _check_activation,
    "bias_act_dropout_bwd": lambda name, dy, inputs, options, output_mask: _check_activation(name, inputs, options),
    "attention_fwd": _check_attention,
    "attention_bwd": lambda name, dout, dlse, inputs, out, lse, options, output_mask: _check_attention(
        name, inputs, options
    ),
}


def check(name: str, args: tuple[Any, ...]) -> None:
    """Raise ValueError if an operator's arguments, grouped by `_options.from_flat`, do not fit together."""
    CHECKS[name](name, *args)
