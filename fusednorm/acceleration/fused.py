"""What rewritten forwards call: the fused operators, and the original operations wherever those do not apply."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._activations import FUNCTIONS, GELUS
from ..activation import bias_act_dropout
from ..autograd.linear import linear as linear_product
from ..modules._fusible import any_global_hooks
from .adaptive import PARAMETERS, Gate, Gated, Normed, vectors
from .handover import (
    PLAIN,
    NormForm,
    Parameters,
    any_autocast,
    can_hand_over,
    following,
    hand_over,
    inner,
    take,
    waits_plain,
    without_hooks,
)
from .products import reading
from .steps import LINEAR, NO_STEPS, Dropout, Steps, activation_name, as_arguments, is_light, step_kind

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._get_tracing_state
# what rewritten methods use
__all__ = [
    "Dropout",
    "Gate",
    "activate",
    "add",
    "following",
    "gated",
    "gelu_of",
    "inner",
    "later",
    "modulate",
    "modulate_by",
    "settled",
]


def _weight(linear: Any) -> Tensor:
    """(out, in). Hugging Face's ``Conv1D`` keeps it transposed."""
    weight: Tensor = linear.weight
    return weight if isinstance(linear, nn.Linear) else weight.t()


# Elements from which drop path, gates and modulations are fused. Forward and backward with drop path, torch's operators
# were 1.3 times as fast on 2^13 elements, as fast on 2^16, and 1.3 to 1.5 times as slow on 2^18 (one thread, AMD EPYC).
_LARGE = 1 << 17
# A bare sum before a LayerNorm is fused from so many times that on. Ours took 1.05 to 1.23 of torch's time on 2^17,
# 0.82 to 1.10 on 2^19, 0.68 to 1.14 on 2^20, with and without gradients (1 and 2 threads).
_BARE = 4
_listener: Callable[[nn.Module, Tensor, Steps], None] | None = None


def _is_small(residual: Tensor) -> bool:
    """While accelerate() compares results, nothing is: every operator runs."""
    return _listener is None and residual.numel() < _LARGE


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
    *,
    residual: Tensor,
    branch: Any,
    norm: Any,
    steps: tuple[Any, ...] = (),
    branch_first: bool = False,
    modulation: Callable[[], tuple[Any, ...]] | None = None,
) -> Tensor:
    """``residual + steps(branch)``, and the norm of that sum handed over to `norm`.

    Args:
        residual: one side of the sum.
        branch: what the first step takes, or the other side of the sum.
        norm: the module that reads the sum next; None where that is not known.
        steps: the modules between `branch` and the sum, in the order in which they run: a linear layer, dropout, layer
            scale or gate, drop path.
        branch_first: whether the branch is the left side.
        modulation: scale, shift and `unsqueezed` as :func:`modulate` will be given them, where that is known.

    Returns:
        The sum.
    """
    if type(branch) is Gated:
        branch, steps = branch.branch, (branch.gate, *steps)
    form = type(norm).__dict__.get("_fusednorm_norm")  # of this very class: a parametrised norm computes by itself
    if form is not None and not _is_compiling() and _is_tracing() is None:
        total = _fused_add(form, residual, branch, norm, steps, modulation)
        if total is not None:
            return total
    for step in steps:
        branch = step(branch)
    return branch + residual if branch_first else residual + branch


def _own(form: NormForm, norm: Any, like: Tensor) -> tuple[Parameters, Any] | None:
    """(parameters, eps) of a norm, or None where it computes something else of a tensor of that width and dtype."""
    own = weight, bias = form.parameters(norm)
    eps, dtype = form.epsilon(norm), like.dtype
    if eps is not None and type(eps) is not float:
        return None
    if weight is None:
        width = like.shape[-1:]
        if bias is not None or tuple(getattr(norm, "normalized_shape", width)) != width:
            return None
    elif type(weight) not in PARAMETERS or weight.dtype is not dtype:
        return None
    if (bias is not None and bias.dtype is not dtype) or (form.float32_only and dtype is not torch.float32):
        return None
    return own, eps


def _fused_add(
    form: NormForm,
    residual: Tensor,
    x: Tensor,
    norm: Any,
    modules: tuple[Any, ...],
    modulation: Callable[[], tuple[Any, ...]] | None,
) -> Tensor | None:
    if type(residual) is not Tensor or type(x) is not Tensor:
        return None
    small = _is_small(residual)
    # Handing over takes as long as one of torch's operators, and the look at a gate or a modulation as another.
    if _listener is None and is_light(form.rms, type(modules[-1]) if modules else None):
        bare = not modules and modulation is None
        if residual.numel() < (_BARE * _LARGE if bare else _LARGE):
            return None
    if not without_hooks(norm):
        return None
    steps = as_arguments(modules) if modules else NO_STEPS
    if steps is None or any_global_hooks() or any_autocast() or not can_hand_over():
        return None
    dtype, bias, found = residual.dtype, None, _own(form, norm, residual)
    if x.dtype is not dtype or not residual.is_contiguous() or found is None:
        return None
    own, eps = found
    if steps is not NO_STEPS:
        if steps.drop_path_p and small:
            return None
        scale, gate = steps.layer_scale, steps.gate
        if scale is not None and (scale.dtype is not dtype or scale.shape != residual.shape[-1:]):
            return None
        if gate is not None:
            steps = steps._replace(gate=vectors(gate.gate, residual, gate.unsqueezed))
            if steps.gate is None:
                return None
        if steps.linear is not None:
            matrix, bias = _weight(steps.linear), steps.linear.bias
            if type(matrix) not in PARAMETERS or matrix.dtype is not dtype or matrix.shape[:1] != residual.shape[-1:]:
                return None
            x = linear_product(x, matrix)
    if not x.is_contiguous():
        return None
    modulated = PLAIN
    if modulation is not None and not small:
        try:
            *pair, unsqueezed = modulation()
        except NameError:  # of a variable that is not assigned yet
            pair = []
        folded = _folded(steps, pair, residual, unsqueezed) if pair else None
        if folded is not None:
            steps, modulated = folded, (pair[0], pair[1])
    try:
        normed, total = form.add(own, eps, residual, x, bias, steps)
    except (TypeError, ValueError):  # a sum that broadcasts, or what is wrong: said as torch says it
        return None
    hand_over(norm, own, eps, total, normed, modulated)
    if _listener is not None:
        _listener(norm, total, steps)
    return total


def _folded(steps: Steps, pair: Sequence[Any], like: Tensor, unsqueezed: bool) -> Steps | None:
    """The steps with a scale and a shift, or None where they are no vectors for the samples of `like`."""
    scale, shift = (None if given is None else vectors(given, like, unsqueezed) for given in pair)
    if scale is None or (shift is None) is not (pair[1] is None):
        return None
    # Copies: the operator keeps them for its backward, torch's statements do not, and they may be changed in place.
    return steps._replace(scale=scale.clone(), shift=None if shift is None else shift.clone())


def gated(branch: Any, gate: Gate) -> Any:
    """``gate(branch)`` for the sum that comes next, and that alone reads it."""
    return gate(branch) if _is_compiling() or _is_tracing() is not None else Gated(branch, gate)


def later(norm: Any, x: Any) -> Any:
    """``norm(x)``, or what stands for it where :func:`modulate` comes next and alone reads it."""
    if (
        _is_compiling()
        or _is_tracing() is not None
        or type(x) is not Tensor
        or _is_small(x)
        or "_fusednorm_norm" not in type(norm).__dict__
        or not without_hooks(norm)
        or any_global_hooks()
        or any_autocast()
    ):
        return norm(x)
    return Normed(norm, x)


def settled(normed: Any) -> Any:
    """A normed tensor itself, where :func:`modulate` did not come."""
    return normed.norm(normed.x) if type(normed) is Normed else normed


def modulate(
    normed: Any, otherwise: Callable[[Any], Any], *, scale: Any, shift: Any = None, unsqueezed: bool = False
) -> Any:
    """``normed * (1 + scale) + shift``, in one operator with the norm.

    Args:
        normed: what :func:`later` gave, or a tensor.
        otherwise: the method's own statement.
        scale, shift: what the method adds 1 to and what it adds, without a dimension that it adds for that; shift None
            adds nothing.
        unsqueezed: whether the method adds a dimension after the first to both.
    """
    if type(normed) is Normed:
        y = _modulated(normed.norm, normed.x, scale, shift, unsqueezed)
        if y is not None:
            return y
    return otherwise(settled(normed))


def modulate_by(function: Callable[..., Any], *given: Any) -> Any:
    """``function(*given)`` of a function that modulates one of its arguments, which may come from :func:`later`."""
    parts = None if _is_compiling() else reading(function)
    if parts is None:
        return function(*map(settled, given))

    def otherwise(normed: Any) -> Any:
        return function(*(normed if i == parts.normed else value for i, value in enumerate(given)))

    shift = None if parts.shift is None else given[parts.shift]
    return modulate(given[parts.normed], otherwise, scale=given[parts.scale], shift=shift, unsqueezed=parts.unsqueezed)


def _modulated(norm: Any, x: Tensor, scale: Any, shift: Any, unsqueezed: bool) -> Tensor | None:
    handed = can_hand_over()
    if handed and waits_plain(x):
        return None
    form = type(norm)._fusednorm_norm
    steps = _folded(NO_STEPS, (scale, shift), x, unsqueezed)
    if steps is None:
        return None
    y = take(norm, x, (scale, shift)) if handed else None
    if y is not None:
        return y
    found = _own(form, norm, x)
    if found is None or not x.is_contiguous():
        return None
    try:
        y = form.add(*found, None, x, None, steps)[0]
    except (TypeError, ValueError):  # said as torch says it
        return None
    return y


def gelu_of(approximate: Any) -> Callable[[Tensor], Tensor]:
    """``F.gelu`` in that form: the function that :func:`activate` knows, or one that fails as torch's does."""
    name = GELUS.get(approximate) if isinstance(approximate, str) else None
    return functools.partial(F.gelu, approximate=approximate) if name is None else FUNCTIONS[name]


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
    steps = NO_STEPS if dropout is None else as_arguments((dropout,))
    if not known or steps is None or not x.ndim or any_global_hooks():
        return None
    weight = _weight(linear)
    if type(weight) not in PARAMETERS:
        return None
    return bias_act_dropout(linear_product(x, weight), linear.bias, name, steps.dropout_p)
