"""What the operators check by themselves: the public functions have seen to it, a caller of torch.ops may not have."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._activations import ACTIVATIONS
from ._options import (
    ActivationInputs,
    ActivationOptions,
    AttentionInputs,
    AttentionOptions,
    NormInputs,
    NormSaved,
    inputs_and_options,
)
from .providers.samples import is_per_sample


def _check_rows(name: str, rows: Tensor, normalized_ndim: int) -> None:
    if not 0 < normalized_ndim <= rows.ndim:
        raise ValueError(f"normalized_ndim: {name} expects 1 to {rows.ndim}, x's dimensions, got {normalized_ndim}")


def _check_samples(name: str, inputs: NormInputs | NormSaved, normalized_ndim: int) -> None:
    """Parameters that are one vector for each sample. Those that are not, each provider checks by itself."""
    rows = inputs[0]
    lead = rows.ndim - normalized_ndim
    for parameter in ("weight", "bias", "layer_scale"):
        given = getattr(inputs, parameter)
        if not is_per_sample(given, normalized_ndim):
            continue
        samples, *ones = given.shape[: given.ndim - normalized_ndim]
        fits = lead > 0 and given.ndim <= rows.ndim and samples == rows.shape[0] and all(size == 1 for size in ones)
        if not fits or given.shape[given.ndim - normalized_ndim :] != rows.shape[lead:]:
            raise ValueError(
                f"{parameter}: {name} expects {tuple(rows.shape[lead:])}, or a vector for each sample, "
                f"{(*rows.shape[: min(lead, 1)], *rows.shape[lead:])}; got {tuple(given.shape)}"
            )


def _check_activation(name: str, inputs: ActivationInputs, options: ActivationOptions) -> None:
    if inputs.x.ndim == 0:
        raise ValueError(f"x: {name} expects at least one dimension, got a 0-d tensor; reshape it to (1,)")
    if options.activation not in ACTIVATIONS:
        raise ValueError(f"activation: {name} knows {', '.join(map(repr, ACTIVATIONS))}, got {options.activation!r}")


def _check_attention(name: str, inputs: AttentionInputs, options: AttentionOptions) -> None:
    if (inputs.cu_seqlens_q is None) != (inputs.cu_seqlens_k is None):
        missing = "cu_seqlens_q" if inputs.cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"{missing}: {name} got None beside the other; pass both for packed sequences, or neither")
    expected, form = (4, "(B, H, S, D)") if inputs.cu_seqlens_q is None else (3, "(total, H, D)")
    for operand, tensor in zip("qkv", inputs[:3], strict=True):
        if tensor.ndim != expected:
            raise ValueError(f"{operand}: {name} expects {form}, got shape {tuple(tensor.shape)}")


def check(name: str, args: tuple[Any, ...]) -> None:
    """Raise ValueError if an operator's arguments, grouped by `_options.from_flat`, do not fit together."""
    inputs, options = inputs_and_options(args)
    if isinstance(inputs, ActivationInputs):
        _check_activation(name, inputs, options)
    elif isinstance(inputs, AttentionInputs):
        _check_attention(name, inputs, options)
    else:
        _check_rows(name, inputs[0], options.normalized_ndim)
        _check_samples(name, inputs, options.normalized_ndim)
    if options.dropped and inputs.seed is None:
        raise ValueError(f"seed: {name} needs one where something is dropped, a one-element int64 tensor; got None")
