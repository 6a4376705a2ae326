"""Whether a layer may do the work of its submodules itself, and if not why; loading that leaves nothing half-loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..dispatch import settings
from ..dispatch.settings import Decision

EVERYWHERE = "hooks are registered for every module"


def class_path(kind: type) -> str:
    """Where a user finds a class: ``torch.nn.Linear``, ``peft.tuners.lora.layer.Linear``."""
    home = kind.__module__
    for inner, public in (("torch.nn.modules.", "torch.nn"), ("fusednorm.modules.", "fusednorm")):
        if home.startswith(inner):
            home = public
    return f"{home}.{kind.__qualname__}"


def any_global_hooks() -> bool:
    return bool(_has_any_global_hook())


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def why_not_fused(name: str, module: Any, classes: tuple[type, ...]) -> str:
    """Why a submodule has to be called as it is, or nothing. A parametrised module is of a class of its own."""
    kind = type(module)
    if kind not in classes:
        if module is None:
            return f"{name} is None"
        expected = class_path(classes[0])
        if kind in classes[0].__bases__:  # torch's, where ours is needed
            return f"{name} is {class_path(kind)}; use {expected}"
        return f"{name} is {class_path(kind)}, not {expected}"
    if has_hooks(module):
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"{name}.forward was replaced"
    return ""


def first_not_fused(parts: Iterable[tuple[str, Any, tuple[type, ...]]]) -> str:
    if any_global_hooks():
        return EVERYWHERE
    for part in parts:
        reason = why_not_fused(*part)
        if reason:
            return reason
    return ""


def overridden(layer: nn.Module, base: type, methods: tuple[str, ...]) -> str:
    """Which of the methods that the fused path does not call a user has replaced, or nothing."""
    for name in methods:
        if name in layer.__dict__ or getattr(type(layer), name) is not getattr(base, name):
            return f"{name} is overridden"
    return ""


def record(layer: nn.Module | str, how: str, reason: str, instead: str = "each submodule by itself") -> None:
    """Tell explain(), if it listens."""
    if not settings.current.listeners or torch.compiler.is_compiling():
        return
    name = layer if isinstance(layer, str) else type(layer).__name__
    if reason:
        decision = Decision(name, "unfused", instead, (("the fused path", reason),))
    else:
        decision = Decision(name, "fused", how)
    settings.record(decision)


def warn_of_torchs(name: str, module: nn.Module, base: type, ours: type) -> None:
    """At construction: a module that is torch's, or derived from torch's, is called as it is."""
    if isinstance(module, base) and not isinstance(module, ours):
        path = class_path(ours)
        advice = f"use {path}" if type(module) is base else f"derive it from {path}"
        warnings.warn(f"{name}: is {class_path(type(module))}, which runs unfused; {advice}", stacklevel=3)


class AtomicStateDict(nn.Module):
    """``load_state_dict`` that looks at everything before it loads anything."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`, but a state that does not fit changes nothing.

        Where a submodule has hooks on its state, or its own way to save or load, torch's method alone loads.

        Raises:
            RuntimeError: keys are missing or unexpected, sizes differ, or a value is no tensor with data. Each key is
                named, and nothing was loaded.
        """
        if isinstance(state_dict, Mapping) and not any(map(_translates, self.modules())):
            problems = _problems(self, state_dict, strict, assign)
            if problems:
                raise RuntimeError(
                    f"Error(s) in loading state_dict for {type(self).__name__} (nothing was loaded):\n\t"
                    + "\n\t".join(problems)
                )
        return super().load_state_dict(state_dict, strict, assign)


_STATE_HOOKS = (
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_state_dict_pre_hooks", "_state_dict_hooks"),
)
_STATE_METHODS = ("_load_from_state_dict", "_save_to_state_dict", "state_dict", "get_extra_state", "set_extra_state")


def _translates(module: nn.Module) -> bool:
    """Whether the keys that a module takes may be others than those it has."""
    return any(getattr(module, name) for name in _STATE_HOOKS) or any(
        getattr(type(module), name) is not getattr(nn.Module, name) for name in _STATE_METHODS
    )


def _problems(module: nn.Module, given: Mapping[str, Any], strict: bool, assign: bool) -> list[str]:
    own = module.state_dict(keep_vars=True)
    problems = []
    if strict:
        removed = tuple(  # torch looks at no key below a child that is None
            f"{path}.{name}." if path else f"{name}."
            for path, part in module.named_modules(remove_duplicate=False)
            for name, child in part._modules.items()
            if child is None
        )
        missing = [key for key in own if key not in given]
        unexpected = [key for key in given if key not in own and not key.startswith(removed)]
        for kind, keys in (("Missing", missing), ("Unexpected", unexpected)):
            if keys:
                named = ", ".join(f'"{key}"' for key in keys)
                problems.append(f"{kind} key(s) in state_dict: {named}.")
    for key, value in given.items():
        mine = own.get(key)
        if mine is None:
            continue
        if not torch.overrides.is_tensor_like(value):
            problems.append(f'expected a tensor for "{key}", got {type(value).__name__}.')
        elif value.shape != mine.shape and not (mine.ndim == 0 and value.shape == (1,)):  # torch takes the latter
            problems.append(
                f"size mismatch for {key}: copying a param with shape {value.shape} from checkpoint, the shape in "
                f"current model is {mine.shape}."
            )
        elif value.is_meta and not mine.is_meta and not assign:
            problems.append(f'a tensor on meta for "{key}": there is no data to copy; pass assign=True to keep it so.')
    return problems
