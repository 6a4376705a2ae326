"""What rewritten forwards call: the fused operators, and the original operations wherever those do not apply."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._activations import FUNCTIONS, gelu_tanh
from ..activation import bias_act_dropout
from ..autograd.linear import linear as linear_product
from ..modules._fusible import any_global_hooks
from .handover import NormForm, any_autocast, can_hand_over, following, hand_over, inner, without_hooks

BASE = "_fusednorm_base"  # on generated classes: the class that restore() gives back

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._get_tracing_state
# what rewritten methods use
__all__ = ["Dropout", "activate", "add", "following", "gelu_tanh", "inner"]


class Dropout(NamedTuple):
    """``F.dropout(x, p, training)`` as a step between a branch and the sum."""

    p: float = 0.5
    training: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


# What the classes of torch compute as steps of a branch.
STEP_KINDS: dict[type, str] = {
    nn.Linear: "linear",
    nn.Dropout: "dropout",
    Dropout: "dropout",
    nn.Identity: "identity",
}
LINEAR = ("linear", "conv1d")
_ACTIVATIONS: dict[Any, str] = {
    **{function: name for name, function in FUNCTIONS.items()},
    F.relu: "relu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
}


class Verdict(NamedTuple):
    """What an instance of another library's class was seen to compute, and the attributes that may decide it."""

    computes: str  # a kind of step, or the name of an activation
    attributes: dict[str, Any]


_VERDICT = "_fusednorm_verdict"
_NOT_DECISIVE = {"training", "drop_prob", "p"}  # read at every call


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in module.__dict__.items()
        if name[0] != "_"
        and name not in _NOT_DECISIVE
        and (value is None or callable(value) or isinstance(value, (bool, int, float, str)))
    }


def mark(module: nn.Module, computes: str) -> None:
    module.__dict__[_VERDICT] = Verdict(computes, _attributes(module))


def unmark(module: nn.Module) -> None:
    module.__dict__.pop(_VERDICT, None)


def _seen_to_compute(module: nn.Module) -> str | None:
    verdict = module.__dict__.get(_VERDICT)
    return verdict.computes if verdict is not None and verdict.attributes == _attributes(module) else None


def _torchs_kind(module: Any) -> str | None:
    """The kind of a step of torch's own classes, a swapped linear layer among them."""
    return STEP_KINDS.get(type(module).__dict__.get(BASE, type(module)))


def step_kind(module: Any) -> str | None:
    """The kind of a step, or None if the operator cannot do it."""
    kind = _torchs_kind(module)
    if kind is None:
        return _seen_to_compute(module) if isinstance(module, nn.Module) else None
    return None if getattr(module, "inplace", False) else kind  # what it changes may be read later


def activation_name(activation: Any) -> str | None:
    """What ``bias_act_dropout`` calls an activation, as far as torch's classes and `mark` say."""
    if not isinstance(activation, nn.Module):
        return _ACTIVATIONS.get(activation) if isinstance(activation, Hashable) else None
    if type(activation) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
    return _ACTIVATIONS.get(type(activation)) or _seen_to_compute(activation)


class Steps(NamedTuple):
    """What the fused operator computes between the branch and the sum."""

    linear: Any = None
    dropout_p: float = 0.0
    layer_scale: Tensor | None = None
    drop_path_p: float = 0.0


_NO_STEPS = Steps()


def _steps(modules: tuple[Any, ...]) -> Steps | None:
    """The steps as arguments of the operator; None if one of them has hooks or they come in another order."""
    steps = _NO_STEPS
    for module in modules:
        kind = step_kind(module)
        if kind is None or (type(module) is not Dropout and not without_hooks(module)):
            return None
        if kind == "dropout":
            if module.training and module.p:
                if steps[1:] != _NO_STEPS[1:] or not 0.0 < module.p < 1.0:
                    return None
                steps = steps._replace(dropout_p=float(module.p))
        elif kind in LINEAR:
            if steps != _NO_STEPS:
                return None
            steps = Steps(module)
        elif kind == "layer_scale":
            if steps.layer_scale is not None or steps.drop_path_p:
                return None
            steps = steps._replace(layer_scale=next(iter(module._parameters.values())))
        elif kind == "drop_path" and module.training and module.drop_prob:
            if steps.drop_path_p or not 0.0 < module.drop_prob < 1.0:
                return None
            steps = steps._replace(drop_path_p=float(module.drop_prob))
    return steps


def _weight(linear: Any) -> Tensor:
    """(out, in). Hugging Face's ``Conv1D`` keeps it transposed."""
    weight: Tensor = linear.weight
    return weight if isinstance(linear, nn.Linear) else weight.t()


# Layer scale and drop path have no C++ fast path. Forward and backward, torch's operators were 1.3 times as fast on
# 2^13 elements, as fast on 2^16, and 1.3 to 1.5 times as slow on 2^18 (one thread, AMD EPYC).
_LEAST_WITHOUT_FASTPATH = 1 << 17
_PARAMETERS = (nn.Parameter, Tensor)  # not a sharded one
_listener: Callable[[nn.Module, Tensor, Steps], None] | None = None


def _too_small(residual: Tensor) -> bool:
    """For what has no fast path. While accelerate() compares results, every operator runs."""
    return _listener is None and residual.numel() < _LEAST_WITHOUT_FASTPATH


@contextlib.contextmanager
def listening(listener: Callable[[nn.Module, Tensor, Steps], None]) -> Iterator[None]:
    """Call `listener(norm, sum, steps)` for every fused sum inside the block."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def add(
    *, residual: Tensor, branch: Tensor, norm: Any, steps: tuple[Any, ...] = (), branch_first: bool = False
) -> Tensor:
    """``residual + steps(branch)``, and the norm of that sum handed over to `norm`.

    Args:
        residual: one side of the sum.
        branch: what the first step takes, or the other side of the sum.
        norm: the module that reads the sum next; None where that is not known.
        steps: the modules between `branch` and the sum, in the order in which they run: a linear layer, dropout, layer
            scale, drop path.
        branch_first: whether the branch is the left side.

    Returns:
        The sum.
    """
    form = type(norm).__dict__.get("_fusednorm_norm")  # of this very class: a parametrised norm computes by itself
    if form is not None and not _is_compiling() and _is_tracing() is None:
        total = _fused_add(form, residual, branch, norm, steps)
        if total is not None:
            return total
    for step in steps:
        branch = step(branch)
    return branch + residual if branch_first else residual + branch


def _fused_add(form: NormForm, residual: Tensor, x: Tensor, norm: Any, modules: tuple[Any, ...]) -> Tensor | None:
    if type(residual) is not Tensor or type(x) is not Tensor or not without_hooks(norm):
        return None
    if modules and _too_small(residual) and not all(map(_torchs_kind, modules)):
        return None
    steps = _steps(modules) if modules else _NO_STEPS
    if steps is None or any_global_hooks() or any_autocast() or not can_hand_over():
        return None
    dtype, bias = residual.dtype, None
    own = weight, norm_bias = form.parameters(norm)
    eps = form.epsilon(norm)
    if x.dtype is not dtype or not residual.is_contiguous() or (eps is not None and type(eps) is not float):
        return None
    if weight is None:
        width = residual.shape[-1:]
        if norm_bias is not None or tuple(getattr(norm, "normalized_shape", width)) != width:
            return None
    elif type(weight) not in _PARAMETERS or weight.dtype is not dtype:
        return None
    if (norm_bias is not None and norm_bias.dtype is not dtype) or (form.float32_only and dtype is not torch.float32):
        return None
    if steps is not _NO_STEPS:
        scale = steps.layer_scale
        if scale is not None and (scale.dtype is not dtype or scale.shape != residual.shape[-1:]):
            return None
        if steps.linear is not None:
            matrix, bias = _weight(steps.linear), steps.linear.bias
            if type(matrix) not in _PARAMETERS or matrix.dtype is not dtype or matrix.shape[:1] != residual.shape[-1:]:
                return None
            x = linear_product(x, matrix)
    if not x.is_contiguous():
        return None
    try:
        normed, total = form.add(own, eps, residual, x, bias, steps)
    except (TypeError, ValueError):  # a sum that broadcasts, or what is wrong: said as torch says it
        return None
    hand_over(norm, own, eps, total, normed)
    if _listener is not None:
        _listener(norm, total, steps)
    return total


def activate(*, x: Tensor, linear: Any, activation: Any, name: str, dropout: Any = None) -> Tensor:
    """``dropout(activation(linear(x)))``, where bias, activation and dropout are one operator.

    Args:
        x: what the linear layer takes.
        linear: a linear module.
        activation: the original activation, a module or a function.
        name: what :func:`fusednorm.bias_act_dropout` calls it.
        dropout: a dropout module or :class:`Dropout`, or None.
    """
    if not _is_compiling() and _is_tracing() is None:
        y = _fused_activate(x, linear, activation, name, dropout)
        if y is not None:
            return y
    y = activation(linear(x))
    return y if dropout is None else dropout(y)


def _fused_activate(x: Tensor, linear: Any, activation: Any, name: str, dropout: Any) -> Tensor | None:
    if type(x) is not Tensor or step_kind(linear) not in LINEAR or not without_hooks(linear):
        return None
    known = activation_name(activation) == name and (not isinstance(activation, nn.Module) or without_hooks(activation))
    steps = _NO_STEPS if dropout is None else _steps((dropout,))
    if not known or steps is None or not x.ndim or any_global_hooks():
        return None
    weight = _weight(linear)
    if type(weight) not in _PARAMETERS:
        return None
    return bias_act_dropout(linear_product(x, weight), linear.bias, name, steps.dropout_p)
