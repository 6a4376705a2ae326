"""Adaptive norms: a gate, a scale and a shift for each sample, folded into parameters that the operator takes.

The operator's weight, bias and layer_scale may have a vector for each sample. So
``(x̂ w + b) (1 + scale) + shift`` is its ``x̂ W + B`` with ``W = w (1 + scale)`` and ``B = b (1 + scale) + shift``.
These have as many elements as the modulation, and autograd differentiates them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._dtypes import compute_dtype

# What to pass in place of a modulation that is the same for all samples.
SHARED = {"gate": "layer_scale", "scale": "weight with zero_centered_weight=True", "shift": "bias"}


class Parameters(NamedTuple):
    """Of the operator."""

    weight: Tensor | None
    bias: Tensor | None
    layer_scale: Tensor | None
    zero_centered_weight: bool


def folded(
    parameters: Parameters,
    x: Tensor,
    shape: tuple[int, ...],
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Parameters:
    """The operator's parameters of an adaptive norm.

    Raises:
        TypeError: a modulation is no dense floating-point tensor.
        ValueError: its shape is not ``(x.shape[0], *ones, *shape)``, or it is on another device.
    """
    weight, bias, layer_scale, zero_centered_weight = parameters
    gate, scale, shift = (
        _checked(name, modulation, x, shape)
        for name, modulation in (("gate", gate), ("scale", scale), ("shift", shift))
    )
    if scale is not None and shift is not None and scale.shape != shift.shape:  # one (B, N), one (B, 1, N)
        scale, shift = (m if m.ndim == len(shape) else m.reshape(x.shape[0], *shape) for m in (scale, shift))
    if gate is not None:
        layer_scale = gate if layer_scale is None else torch.mul(*_in_one_dtype(gate, layer_scale))
    if bias is not None and scale is not None:
        bias = torch.addcmul(*_in_one_dtype(bias, bias, scale))
    if shift is not None:
        bias = shift if bias is None else torch.add(*_in_one_dtype(shift, bias))
    if scale is not None and weight is None:
        weight, zero_centered_weight = scale, True
    elif scale is not None:
        own, by = _in_one_dtype(weight, scale)
        own = own + 1.0 if zero_centered_weight else own
        weight, zero_centered_weight = torch.addcmul(own, own, by), False
    return Parameters(weight, bias, layer_scale, zero_centered_weight)


def _in_one_dtype(*tensors: Any) -> list[Tensor]:
    """In the dtype that the operator computes in: a product rounded to 16 bits would err more than eager's."""
    acc = compute_dtype(*[t.dtype for t in tensors])
    return [t.to(acc) for t in tensors]


def _checked(name: str, modulation: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The modulation, without its leading dimensions where it is the same for all samples."""
    if modulation is None:
        return None
    _checks.check_tensor(name, modulation)
    _checks.check_same_device(name, modulation, "x", x)
    lead, least = x.ndim - len(shape), len(shape) + 1
    sizes = modulation.shape
    if lead and least <= len(sizes) <= x.ndim and sizes[len(sizes) - len(shape) :] == shape:
        of_samples, *ones = sizes[: len(sizes) - len(shape)]
        if all(size == 1 for size in ones):
            if of_samples == x.shape[0]:
                return modulation
            if of_samples == 1:
                return modulation.reshape(shape)
    samples = tuple(x.shape[:1]) if lead else ("B",)
    wanted = f"{_shown((*samples, *shape))} or {_shown((*samples, 1, *shape))}"
    remedy = f"pass {SHARED[name]} for one vector for all samples"
    if sizes == x.shape and lead > 1:
        remedy = "flatten x's leading dimensions into one for a vector for each token"
    elif not lead:
        remedy = f"x of shape {_shown(tuple(x.shape))} has no dimension of samples; {remedy}"
    raise ValueError(f"{name}: expected shape {wanted}, a vector for each sample, got {_shown(tuple(sizes))}; {remedy}")


def _shown(sizes: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"
