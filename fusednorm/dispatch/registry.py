"""The ordered table of providers: which modules each one is made of, and whether it can be used here.

A provider is one module or several. Each has ``refusal(op, inputs, options)``, which says why it cannot serve a call,
and a function for each op that it implements. The first also has ``unavailable_reason()``, and ``runs_on()``
if it takes tensors of one kind of device. Providers never import one another; this table is the only place that lists
them. Which one serves a call is decided in `resolve.py`.

``torch`` stands for torch's own operators. Its functions carry no ``_fwd`` or ``_bwd``: autograd differentiates them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .._options import Inputs, Options

PROVIDERS: dict[str, tuple[str, ...]] = {  # best first
    name: tuple(f"fusednorm.providers.{name}.{op}" for op in ops)
    for name, ops in {
        "triton": ("norm", "activation", "attention"),
        "cuda": ("norm", "activation", "attention"),
        "cpu": ("norm", "activation", "attention"),
        "torch": ("norm", "activation", "attention"),
        "reference": ("norm", "activation", "attention"),
    }.items()
}

_modules: dict[str, tuple[ModuleType, ...]] = {}
_serving: dict[tuple[str, str], ModuleType] = {}  # by provider and op
functions: dict[tuple[str, str], Callable[..., Any]] = {}  # of these modules: one look-up a call
_reasons: dict[str, str | None] = {}


def get(name: str) -> tuple[ModuleType, ...]:
    """The modules of provider `name`, imported."""
    modules = _modules.get(name)
    if modules is None:
        modules = tuple([importlib.import_module(path) for path in PROVIDERS[name]])
        if name == "torch":
            _get_torch(modules)
        for module in modules:
            ops = {op: function for op, function in vars(module).items() if op.endswith(("_fwd", "_bwd"))}
            _serving.update({(name, op): module for op in ops})
            functions.update({(name, op): function for op, function in ops.items()})
        _modules[name] = modules  # last: another thread that sees it looks for the ops
    return modules


def _get_torch(modules: tuple[ModuleType, ...]) -> None:
    """It serves the ops that the reference has. A raw op that names it runs the reference's kernel of that op: torch
    has none of its signature."""
    get("reference")
    for (name, op), function in list(functions.items()):
        for module in modules:
            if name == "reference" and hasattr(module, op.rpartition("_")[0]):
                _serving["torch", op], functions["torch", op] = module, function


def serving(name: str, op: str) -> ModuleType | None:
    """The module of provider `name` that has the op, or None."""
    module = _serving.get((name, op))
    if module is None and name not in _modules:
        get(name)
        module = _serving.get((name, op))
    return module


def function(name: str, op: str) -> Callable[..., Any]:
    """The function of provider `name` for an op that it has."""
    found = functions.get((name, op))
    if found is None:
        get(name)
        found = functions[name, op]
    return found


def unavailable_reason(name: str) -> str | None:
    """Why provider `name` cannot be used here and now, or None if it can."""
    if name not in _reasons:
        _reasons[name] = get(name)[0].unavailable_reason()
    return _reasons[name]


# what torch.compiler.assume_constant_result sets, without its import of the compiler: the answer is not to be traced
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def runs_on(name: str) -> str | None:
    """The kind of device whose tensors provider `name` takes, or None: every kind."""
    kind = getattr(get(name)[0], "runs_on", None)
    return None if kind is None else kind()


runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def available_providers() -> list[str]:
    """Names of the providers usable here and now, best first.

    Example:
        >>> "torch" in fusednorm.available_providers()
        True
    """
    return [name for name in PROVIDERS if unavailable_reason(name) is None]


def refusal(name: str, op: str, inputs: Inputs, options: Options) -> str | None:
    """Why provider `name` cannot take this call, or None if it can.

    The tensor's device is looked at first. A provider for GPUs initialises CUDA when it is asked, and a process that is
    forked afterwards cannot use CUDA: a call on CPU tensors must not do that.
    """
    x, kind = inputs[0], runs_on(name)
    if kind not in (None, x.device.type) and not x.is_meta:
        return f"x is on {x.device}, its kernels run on {kind} tensors here"
    reason = unavailable_reason(name)
    if reason is not None:
        return reason
    module = serving(name, op)
    return f"it has no {op.rpartition('_')[0]}" if module is None else module.refusal(op, inputs, options)
