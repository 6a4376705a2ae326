"""Whether a layer may do the work of its submodules itself, and if not why; loading that leaves nothing half-loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks

from .. import providers

_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def obstacle(name: str, module: Any, classes: tuple[type, ...]) -> str:
    """Why a submodule has to be called as it is, or nothing. A parametrised module is of a class of its own."""
    if type(module) not in classes:
        return f"{name} is a {type(module).__name__}, not {' or '.join(c.__name__ for c in classes)}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{name} has hooks"
    if "forward" in module.__dict__:
        return f"{name}.forward was replaced"
    return ""


def first_obstacle(parts: Iterable[tuple[str, Any, tuple[type, ...]]]) -> str:
    for name in _GLOBAL:
        if getattr(global_hooks, name):
            return "hooks are registered for every module"
    for part in parts:
        reason = obstacle(*part)
        if reason:
            return reason
    return ""


def overridden(layer: nn.Module, base: type, methods: tuple[str, ...]) -> str:
    """Which of the methods that the fused path does not call a user has replaced, or nothing."""
    for name in methods:
        if name in layer.__dict__ or getattr(type(layer), name) is not getattr(base, name):
            return f"{name} is overridden"
    return ""


def record(layer: nn.Module, how: str, reason: str) -> None:
    """Tell explain(), if it listens."""
    if providers.automatic or torch.compiler.is_compiling():
        return
    name = type(layer).__name__
    if reason:
        route = providers.Route(name, "unfused", "each submodule by itself", (("the fused path", reason),))
    else:
        route = providers.Route(name, "fused", how)
    providers.record(route)


class WholeLoading(nn.Module):
    """``load_state_dict`` that looks at everything before it loads anything."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`, but a state that does not fit changes nothing.

        Raises:
            RuntimeError: keys are missing or unexpected, or sizes differ; each is named, and nothing was loaded.
        """
        translated = any(  # may take other keys than its own
            m._load_state_dict_pre_hooks or type(m)._load_from_state_dict is not nn.Module._load_from_state_dict
            for m in self.modules()
        )
        if isinstance(state_dict, Mapping) and not translated:
            problems = _problems(self.state_dict(keep_vars=True), state_dict, strict)
            if problems:
                raise RuntimeError(
                    f"Error(s) in loading state_dict for {type(self).__name__} (nothing was loaded):\n\t"
                    + "\n\t".join(problems)
                )
        return super().load_state_dict(state_dict, strict, assign)


def _problems(own: Mapping[str, Any], given: Mapping[str, Any], strict: bool) -> list[str]:
    problems = []
    if strict:
        for kind, keys in (("Unexpected", given.keys() - own.keys()), ("Missing", own.keys() - given.keys())):
            if keys:
                order = own if kind == "Missing" else given
                named = ", ".join(f'"{key}"' for key in order if key in keys)
                problems.append(f"{kind} key(s) in state_dict: {named}.")
    for key, value in given.items():
        mine = own.get(key)
        if isinstance(mine, torch.Tensor) and isinstance(value, torch.Tensor) and mine.shape != value.shape:
            problems.append(
                f"size mismatch for {key}: copying a param with shape {value.shape} from checkpoint, the shape in "
                f"current model is {mine.shape}."
            )
    return problems
