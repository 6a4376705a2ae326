"""Hands a normed tensor from the sum that it was computed with to the norm that is called with that sum.

The guess which norm that is may be wrong at no cost but time: the norm takes the tensor only if it gets the very sum,
and if nothing that decides its values or gradients has changed since. Otherwise it computes.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import norm as norm_functions
from ..modules._fusible import has_hooks

NEXT = "_fusednorm_next"

_is_compiling = torch.compiler.is_compiling
any_autocast = torch._C._is_any_autocast_enabled
_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


Parameters = tuple[Tensor | None, Tensor | None]


class NormForm(NamedTuple):
    """The type of a norm, and the names of its eps, weight and bias attributes."""

    rms: bool
    eps: str | None  # None: the machine epsilon of torch.nn.RMSNorm
    weight: str | None = "weight"
    bias: str | None = None
    zero_centered: bool = False
    float32_only: bool = False  # in 16 bits the module computes another dtype than its input's
    keeps_strides: bool = False  # its output lies in memory as its input does

    def parameters(self, module: nn.Module) -> Parameters:
        own = module._parameters  # four times as fast as the attribute
        if self.weight is None:
            return None, None
        weight = own[self.weight] if self.weight in own else getattr(module, self.weight)  # a parametrised one
        if self.bias is None:
            return weight, None
        return weight, own[self.bias] if self.bias in own else getattr(module, self.bias)

    def epsilon(self, module: nn.Module) -> Any:
        return None if self.eps is None else getattr(module, self.eps)

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        weight, bias = self.parameters(module)
        eps = self.epsilon(module)
        size = x.shape[-1:] if weight is None else weight.shape
        if not self.rms:
            return norm_functions.layer_norm(x, size, weight, bias, eps)
        if self.zero_centered and weight is not None:
            weight = 1.0 + weight.float()
        return norm_functions.rms_norm(x, size, weight, eps)

    def add(
        self, own: Parameters, eps: Any, residual: Tensor | None, x: Tensor, bias: Tensor | None, steps: Any
    ) -> Any:
        """(normed, sum) in one operator, with the parameters and eps of a module of this form."""
        weight, norm_bias = own
        size = x.shape[-1:] if weight is None else weight.shape
        _, dropout_p, layer_scale, drop_path_p, gate, scale, shift = steps
        keywords: dict[str, Any] = {}
        if not (layer_scale is gate is scale is shift is None) or drop_path_p:
            keywords = {"layer_scale": layer_scale, "drop_path_p": drop_path_p}
            keywords |= {"gate": gate, "scale": scale, "shift": shift}
        if not self.rms:
            return norm_functions.add_layer_norm(
                x, residual, size, weight, norm_bias, eps, x_bias=bias, dropout_p=dropout_p, **keywords
            )
        if self.zero_centered:
            keywords["zero_centered_weight"] = True
        return norm_functions.add_rms_norm(x, residual, size, weight, eps, x_bias=bias, dropout_p=dropout_p, **keywords)


Modulation = tuple[Tensor | None, Tensor | None]  # scale and shift, as a method names them
PLAIN: Modulation = None, None


class _Waiting(NamedTuple):
    sum: weakref.ref[Tensor]
    norm: nn.Module
    normed: Tensor
    state: tuple[Any, ...]
    modulation: Modulation


# By id of the sum, and not as its attribute: a sum that is saved or copied takes nothing along.
waiting: dict[int, _Waiting] = {}


def _state(own: Parameters, eps: float | None, total: Tensor, modulation: Modulation) -> tuple[Any, ...]:
    """Whatever decides the values and gradients of the norm of `total`."""
    weight, bias = own
    state = total._version, total.requires_grad, total.grad_fn, torch.is_grad_enabled(), eps
    for vectors in modulation:
        if vectors is not None:
            state += vectors._version, vectors.requires_grad  # type: ignore[assignment]
    if weight is not None:
        state += id(weight), weight._version, weight.requires_grad  # type: ignore[assignment]
    if bias is not None:
        state += id(bias), bias._version, bias.requires_grad  # type: ignore[assignment]
    return state


def hand_over(
    norm: nn.Module, own: Parameters, eps: float | None, total: Tensor, normed: Tensor, modulation: Modulation = PLAIN
) -> None:
    """Let `normed` wait for a call of `norm` with `total`, and for its modulation, as long as `total` lives."""
    key = id(total)

    def forget(dead: weakref.ref[Tensor]) -> None:
        entry = waiting.get(key)
        if entry is not None and entry.sum is dead:
            waiting.pop(key, None)

    waiting[key] = _Waiting(weakref.ref(total, forget), norm, normed, _state(own, eps, total, modulation), modulation)


def waits_plain(x: Tensor) -> bool:
    """Whether a normed tensor without modulation waits at `x`."""
    entry = waiting.get(id(x))
    return entry is not None and entry.sum() is x and entry.modulation is PLAIN


def take(norm: nn.Module, x: Tensor, modulation: Modulation = PLAIN) -> Tensor | None:
    """The tensor that waits at `x` for `norm`, if computing it now would give the same values and gradients."""
    if _is_compiling() or not waiting:
        return None
    entry = waiting.get(id(x))
    if entry is None or entry.sum() is not x:
        return None
    waiting.pop(id(x), None)
    form: NormForm = type(norm)._fusednorm_norm  # type: ignore[attr-defined]
    if (
        entry.norm is not norm
        or any(was is not now for was, now in zip(entry.modulation, modulation, strict=True))
        or entry.state != _state(form.parameters(norm), form.epsilon(norm), x, modulation)
        or x._backward_hooks  # a hook on the sum has to see its whole gradient
        or x.retains_grad
        or any_autocast()
        or not can_hand_over()
    ):
        return None
    return entry.normed


def can_hand_over() -> bool:
    """Not where changes in place leave no trace, nor under activation checkpointing.

    There each part is computed again alone, so a part cannot do the work of the next one.
    """
    return not torch.is_inference_mode_enabled() and _saved_tensor_hooks(True) is None


class Next:
    """The norm that reads a block's output, kept outside the module tree of the block."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm


def following(block: nn.Module) -> nn.Module | None:
    """The norm of the next block, which reads what this block returns; None where it must not be computed here."""
    if _is_compiling():
        return None
    link = block.__dict__.get(NEXT)
    return None if link is None or not without_hooks(block) else link.norm


def inner(block: nn.Module, path: str) -> Any:
    """The module at a path below a block, or None if it is there no more."""
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def without_hooks(module: nn.Module) -> bool:
    return not has_hooks(module) and "forward" not in module.__dict__
