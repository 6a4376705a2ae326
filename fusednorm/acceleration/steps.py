"""What may stand between a branch and its sum, and which step or activation a module is seen to compute."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .._activations import FUNCTIONS, GELUS, MODULES
from .adaptive import Gate
from .handover import without_hooks

BASE = "_fusednorm_base"  # on generated classes: the class that restore() gives back


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
    Gate: "gate",
    nn.Identity: "identity",
}
LINEAR = ("linear", "conv1d")
_ACTIVATIONS: dict[Any, str] = {
    **{function: name for name, function in FUNCTIONS.items()},
    **MODULES,
    F.relu: "relu",
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


def torchs_kind(module: Any) -> str | None:
    """The kind of a step of torch's own classes, a swapped linear layer among them."""
    return STEP_KINDS.get(type(module).__dict__.get(BASE, type(module)))


def step_kind(module: Any) -> str | None:
    """The kind of a step, or None if the operator cannot do it."""
    kind = torchs_kind(module)
    if kind is None:
        return _seen_to_compute(module) if isinstance(module, nn.Module) else None
    return None if getattr(module, "inplace", False) else kind  # what it changes may be read later


def is_light(rms: bool, last: Any) -> bool:
    """Whether a sum gains on large inputs alone: before a LayerNorm, without steps or with a gate as the last one.

    Args:
        rms: whether the norm after it is an RMSNorm.
        last: the kind or the class of its last step; None: it has none.
    """
    return not rms and last in (None, "gate", Gate)


def activation_name(activation: Any) -> str | None:
    """What ``bias_act_dropout`` calls an activation, as far as torch's classes and `mark` say."""
    if not isinstance(activation, nn.Module):
        return _ACTIVATIONS.get(activation) if isinstance(activation, Hashable) else None
    if type(activation) is nn.GELU:
        return GELUS.get(activation.approximate)
    return _ACTIVATIONS.get(type(activation)) or _seen_to_compute(activation)


class Steps(NamedTuple):
    """What the fused operator computes between the branch and the sum, and after the norm."""

    linear: Any = None
    dropout_p: float = 0.0
    layer_scale: Tensor | None = None
    drop_path_p: float = 0.0
    gate: Any = None
    scale: Tensor | None = None
    shift: Tensor | None = None


NO_STEPS = Steps()
_WITHOUT_HOOKS = (Dropout, Gate)


def as_arguments(modules: tuple[Any, ...]) -> Steps | None:
    """The steps as arguments of the operator; None if one of them has hooks or they come in another order."""
    steps = NO_STEPS
    for module in modules:
        kind = step_kind(module)
        if kind is None or (type(module) not in _WITHOUT_HOOKS and not without_hooks(module)):
            return None
        if kind == "dropout":
            if module.training and module.p:
                if steps[1:] != NO_STEPS[1:] or not 0.0 < module.p < 1.0:
                    return None
                steps = steps._replace(dropout_p=float(module.p))
        elif kind in LINEAR:
            if steps != NO_STEPS:
                return None
            steps = Steps(module)
        elif kind == "layer_scale":
            if steps.layer_scale is not None or steps.drop_path_p:
                return None
            steps = steps._replace(layer_scale=next(iter(module._parameters.values())))
        elif kind == "gate":
            if steps.gate is not None or steps.drop_path_p:
                return None
            steps = steps._replace(gate=module)
        elif kind == "drop_path" and module.training and module.drop_prob:
            if steps.drop_path_p or not 0.0 < module.drop_prob < 1.0:
                return None
            steps = steps._replace(drop_path_p=float(module.drop_prob))
    return steps
