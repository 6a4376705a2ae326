"""What the constructors and the inputs of the modules are checked for, by the names that the caller knows."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from .. import _autocast, _checks
from .._activations import ACTIVATIONS


class IndivisibleError(ValueError, AssertionError):
    """A ValueError, and also what torch raises here."""


def _said(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if isinstance(value, str | Real) else type(value).__name__


def check_count(name: str, value: Any, least: int = 0) -> None:
    if not isinstance(value, Integral | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {_said(value)}; pass an int")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}; pass a larger number")


def check_sizes(name: str, sizes: Any) -> None:
    """An int or ints, as torch takes them."""
    if isinstance(sizes, str | Real) or sizes is None:
        return check_count(name, sizes)
    for size in sizes if isinstance(sizes, Sequence) else ():
        check_count(name, size)


def check_heads(width: Any, heads: Any, names: tuple[str, str] = ("embed_dim", "num_heads")) -> None:
    check_count(names[0], width, 1)
    check_count(names[1], heads, 1)
    if width % heads:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - heads))
        raise IndivisibleError(
            f"{names[0]}: {width} is not divisible by {names[1]} {heads}; pass {names[1]}={nearest}, or a multiple of "
            f"{heads} as {names[0]}"
        )


def check_rate(name: str, p: Any) -> None:
    if not isinstance(p, Real):
        raise TypeError(f"{name}: expected a number in [0, 1], got {_said(p)}; pass a float")
    if not 0.0 <= float(p) <= 1.0:
        raise ValueError(f"{name}: expected a dropout probability between 0 and 1, got {p}; 0.0 is no dropout")


def check_eps(name: str, eps: Any, optional: bool = False) -> None:
    if (optional and eps is None) or isinstance(eps, Real | Tensor):
        return
    raise TypeError(
        f"{name}: expected a number{' or None' if optional else ''}, got {_said(eps)}; pass a float"
        + (f" (YAML reads {eps} as text, 1.0e-5 as a number)" if isinstance(eps, str) else "")
    )


def check_activation(activation: Any) -> Any:
    """What torch's layers take for it: of names they know two, "relu" and "gelu"."""
    names = "/".join(ACTIVATIONS)
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise RuntimeError(f"activation should be {names}, not {activation}")  # torch's kind and words
        return activation if activation in ("relu", "gelu") else ACTIVATIONS[activation].torch_function
    if isinstance(activation, type):
        raise TypeError(
            f"activation: expected a function or a module, got the class {activation.__name__}; pass an instance, "
            f"{activation.__name__}()"
        )
    if not callable(activation):
        raise TypeError(
            f"activation: expected a function or one of {names}, got {_said(activation)}; pass one that takes a tensor"
        )
    return activation


def check_layer(name: str, layer: Any) -> None:
    if not isinstance(layer, nn.Module):
        given = f"the class {layer.__name__}" if isinstance(layer, type) else _said(layer)
        raise TypeError(f"{name}: expected a layer (torch.nn.Module), got {given}; pass an instance")


def check_operand(name: str, tensor: Tensor, parameter: Tensor) -> None:
    """An input that differs from the parameters in dtype or device."""
    if not {type(tensor), type(parameter)} <= {Tensor, nn.Parameter}:  # what is not plain knows what it takes
        return
    _checks.check_same_device(name, tensor, "the module's parameters", parameter)
    if parameter.dtype in _checks.FLOAT_DTYPES and not _autocast.enabled(tensor.device.type):
        raise TypeError(
            f"{name}: is {tensor.dtype}, the module's parameters {parameter.dtype}; convert {name} with "
            f".to({parameter.dtype}) or the module with .to({tensor.dtype}), or call it under torch.autocast"
        )
