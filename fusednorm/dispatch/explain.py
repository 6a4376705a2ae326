"""``explain``: which provider serves a call, how, and why not another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from . import registry
from .settings import Decision, recording

_Group = tuple[str, str, str]  # what decisions that read alike have in common: function, provider, how


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Say which provider serves ``function(*args, **kwargs)``, how, and why each provider before it was passed over.

    The call is made once. Its results are thrown away and torch's random state is restored. Buffers of a module change
    as in any call. `function` may be a function of this package, a module, a whole model, or any callable that reaches
    them. Calls that other threads make meanwhile are not heard.

    Returns:
        A line for each decision made during the call. Decisions that read alike are one line, with their number and
        the names of the modules that made them. What was passed over for one line alone stands below it, indented; the
        rest stands once at the end.

    Raises:
        TypeError: `function` cannot be called.
        Exception: whatever the call raises.

    Example:
        >>> x = torch.randn(2, 8)
        >>> print(fusednorm.explain(fusednorm.bias_act_dropout, x, None, "relu").splitlines()[0])
        bias_act_dropout: torch, torch's own operators
    """
    if not callable(function):
        raise TypeError(
            f"function: expected a function or a module, as fusednorm.layer_norm, got {_described(function)}"
        )
    found = decisions(function, *args, **kwargs)
    if not found:
        name = getattr(function, "__name__", type(function).__name__)
        return f"{name}: no function of fusednorm was called"
    return _text(found)


def decisions(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Decision]:
    """Every decision made during a call, in order; torch's random state is restored."""
    devices = list(range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0))
    owner = getattr(function, "func", function)  # of functools.partial
    owner = getattr(owner, "__self__", owner)  # of a bound method
    names = {id(m): name for name, m in owner.named_modules()} if isinstance(owner, nn.Module) else {}
    with torch.random.fork_rng(devices), recording(names) as found:
        function(*args, **kwargs)
    return found


def _text(decisions: list[Decision]) -> str:
    groups: dict[_Group, list[Decision]] = {}
    passed_over: dict[tuple[str, str], dict[_Group, None]] = {}  # (who, why) -> by which groups
    for decision in decisions:
        group = decision[:3]
        groups.setdefault(group, []).append(decision)
        for refused in decision.refusals:
            passed_over.setdefault(refused, {})[group] = None
    asked = [group for group in groups if group[1] in registry.PROVIDERS]  # the others say: fused or not
    lines = []
    for group, members in groups.items():
        call, provider, how = group
        places = _places(decision.where for decision in members)
        count = f"{len(members)} x " if len(members) > 1 else ""
        lines.append(f"{count}{call}: {provider}, {how}" + (f" (in {places})" if places else ""))
        for (who, why), by in passed_over.items():
            if list(by) == [group] or (group in by and group not in asked):
                lines.append(f"  {who} is not used: {why}")
    for (who, why), by in passed_over.items():
        several = [group for group in by if group in asked]
        if len(several) > 1:
            calls = ", ".join(dict.fromkeys(group[0] for group in several))
            lines.append(f"  {who} is not used{'' if len(several) == len(asked) else f' for {calls}'}: {why}")
    return "\n".join(lines)


def _places(names: Iterable[str]) -> str:
    """Names of modules, those that differ in one number together: "layers.0-11.self_attn, norm"."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in dict.fromkeys(filter(None, names)):
        split = re.fullmatch(r"((?:.*\.)?)(\d+)((?:\..*)?)", name)  # the last number of the path
        before, number, after = split.groups() if split else (name, None, "")
        numbers.setdefault((before, after), []).extend([] if number is None else [int(number)])
    return ", ".join(f"{before}{_ranges(found)}{after}" for (before, after), found in numbers.items())


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "+".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
