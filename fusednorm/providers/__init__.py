"""The ordered table of providers, and the choice among them.

A provider is one module or several, each with ``refusal(op, *args)`` and a function for each op it implements; the
first has ``unavailable_reason()``. A module may have ``reluctance(op, *args)``: why automatic choice passes it over,
whatever the shape. Providers never import one another; this table is the only place that lists them.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch

from .. import _shortcut
from .._transforms import traced
from . import choice

_log = logging.getLogger("fusednorm")

PROVIDERS: dict[str, tuple[str, ...]] = {  # best first
    "triton": (
        "fusednorm.providers.triton_norm",
        "fusednorm.providers.triton_activation",
        "fusednorm.providers.triton_attention",
    ),
    "cuda": ("fusednorm.providers.cuda", "fusednorm.providers.cuda_activation"),
    "cpu": ("fusednorm.providers.cpu", "fusednorm.providers.cpu_activation", "fusednorm.providers.cpu_attention"),
    "reference": (
        "fusednorm.providers.reference",
        "fusednorm.providers.reference_activation",
        "fusednorm.providers.reference_attention",
    ),
}

_requested: str | None = None  # a module global, not a ContextVar: torch.compile traces and guards it
_active: list[use_provider] = []  # entered and not left, in order; blocks of several threads or tasks may interleave
_records: list[list[Route]] = []  # where explain() collects decisions
_modules: dict[str, tuple[ModuleType, ...]] = {}
_serving: dict[tuple[str, str], ModuleType] = {}  # by provider and op
_functions: dict[tuple[str, str], Callable[..., Any]] = {}  # of these modules: one look-up a call
_reasons: dict[str, str | None] = {}
_logged: set[tuple[str, str]] = set()
by_shape = True  # False inside batch_invariant()
automatic = True  # False while a provider is requested or decisions are recorded
short_cuts = True  # False while decisions are recorded, or a provider other than the CPU library is requested
shortcut: Any = None  # the module of fusednorm/_shortcut.py while it may serve, once a library it leads to is loaded
shortcut_asked: bool | str = True  # for what: a choice by what was measured (True), the CPU library (False), or "cuda"


class Route(NamedTuple):
    """How one call is served."""

    call: str
    provider: str
    how: str
    refusals: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.call}: {self.provider}, {self.how}"]
        lines += [f"  {name} is not used: {reason}" for name, reason in self.refusals]
        return "\n".join(lines)


def get(name: str) -> tuple[ModuleType, ...]:
    """The modules of provider `name`, imported."""
    modules = _modules.get(name)
    if modules is None:
        modules = _modules[name] = tuple([importlib.import_module(path) for path in PROVIDERS[name]])
        for module in modules:
            ops = {op: function for op, function in vars(module).items() if op.endswith(("_fwd", "_bwd"))}
            _serving.update({(name, op): module for op in ops})
            _functions.update({(name, op): function for op, function in ops.items()})
    return modules


def serving(name: str, op: str) -> ModuleType | None:
    """The module of provider `name` that has the op, or None."""
    module = _serving.get((name, op))
    if module is None and name not in _modules:
        get(name)
        module = _serving.get((name, op))
    return module


def function(name: str, op: str) -> Callable[..., Any]:
    """The function of provider `name` for an op that it has."""
    found = _functions.get((name, op))
    if found is None:
        get(name)
        found = _functions[name, op]
    return found


def unavailable_reason(name: str) -> str | None:
    """Why provider `name` cannot be used here and now, or None if it can."""
    if name not in _reasons:
        _reasons[name] = get(name)[0].unavailable_reason()
        if name in ("cpu", "cuda"):
            _renew()
    return _reasons[name]


# what torch.compiler.assume_constant_result sets, without its import of the compiler: the answer is not to be traced
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def available_providers() -> list[str]:
    """Names of the providers usable here and now, best first."""
    return [name for name in PROVIDERS if unavailable_reason(name) is None]


def requested() -> str | None:
    """The provider named by the innermost ``use_provider`` block, or None for automatic choice."""
    return _requested


def refusal(name: str, op: str, args: tuple[Any, ...]) -> str | None:
    """Why provider `name` cannot take this call, or None if it can."""
    reason = unavailable_reason(name)
    if reason is not None:
        return reason
    module = serving(name, op)
    return f"it has no {op.rpartition('_')[0]}" if module is None else module.refusal(op, *args)


def reluctance(name: str, op: str, args: tuple[Any, ...]) -> str | None:
    """Why automatic choice passes over a provider that could take this call, or None if it does not."""
    hook = getattr(serving(name, op), "reluctance", None)
    return None if hook is None else hook(op, *args)


def _serves(name: str, op: str, args: tuple[Any, ...]) -> bool:
    return name in PROVIDERS and refusal(name, op, args) is None and reluctance(name, op, args) is None


def choose(op: str, args: tuple[Any, ...]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The provider for a call of `op` with the op's arguments, and (name, reason) of those passed over.

    An explicit request never falls back: it raises. Automatic choice takes what was measured to be fastest, or else
    the first provider of the table that can serve the call, and logs each refusal once.
    """
    if _requested is not None:
        reason = refusal(_requested, op, args)
        if reason is not None:
            raise ValueError(
                f"provider {_requested!r} cannot run {op}: {reason}; leave `use_provider({_requested!r})` out for "
                "automatic choice"
            )
        return _requested, ()
    if traced():  # its sizes are tensors, and it may run without this package
        return "reference", ()
    preference = None
    if by_shape and not torch.compiler.is_compiling():  # a graph would be compiled anew for each number of rows
        preference = choice.preference(op, args)
        if preference is not None and not _serves(preference.provider, op, args):
            preference = None
    refusals: tuple[tuple[str, str], ...] = ()
    for name in PROVIDERS:
        reason = refusal(name, op, args) or reluctance(name, op, args)
        if reason is None and preference is not None:
            reason = preference.why if preference.provider != name else None
        if reason is None:
            return name, refusals
        refusals += ((name, reason),)
        if not torch.compiler.is_compiling() and (name, reason) not in _logged:
            _logged.add((name, reason))
            _log.info("provider %s is not used: %s", name, reason)
    raise RuntimeError(f"no provider can run {op}: {refusals}")


def record(route: Route) -> None:
    """Hand a decision to explain(), if it listens."""
    for listener in _records:
        listener.append(route)


@contextlib.contextmanager
def recording() -> Iterator[list[Route]]:
    """Collect every decision made inside."""
    routes: list[Route] = []
    _records.append(routes)
    _renew()
    try:
        yield routes
    finally:
        _records[:] = [listener for listener in _records if listener is not routes]
        _renew()


def _renew() -> None:
    """What calls look at, after a block was entered or left."""
    global _requested, automatic, short_cuts, shortcut, shortcut_asked
    _requested = _active[-1].name if _active else None
    automatic = not _active and not _records
    short_cuts = not _records and _requested in (None, "cpu")
    leads_there = not _records and _requested in (None, "cpu", "cuda")
    reason = _reasons.get("cuda", "not asked yet")
    if _requested != "cuda":
        reason = _reasons.get("cpu", reason)
    shortcut = _shortcut.load()[0] if leads_there and reason is None else None
    shortcut_asked = "cuda" if _requested == "cuda" else automatic and by_shape


class use_provider(contextlib.ContextDecorator):
    """Run everything inside with one provider, as a context manager or a decorator.

    The choice holds for the whole process until the block ends; the block entered last decides. The backward of what
    was computed inside uses the same provider wherever it runs, but what activation checkpointing computes anew runs
    with the choice of that moment: keep the backward inside the block too. A call that the provider cannot take
    raises; nothing falls back silently.

    Args:
        name: one of ``available_providers()``.

    Raises:
        ValueError: no provider has that name.
        RuntimeError: the provider cannot run here (raised on entry, with the reason).
    """

    def __init__(self, name: str) -> None:
        if name not in PROVIDERS:
            raise ValueError(f"name: no provider is called {name!r}; known are {', '.join(map(repr, PROVIDERS))}")
        self.name = name

    def __call__(self, function: Any) -> Any:
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise TypeError(
                f"use_provider: {function.__name__} is a generator or coroutine, whose body runs after the decorator "
                "has left; put a `with use_provider(...)` block inside it"
            )
        return super().__call__(function)

    def __enter__(self) -> use_provider:
        reason = unavailable_reason(self.name)
        if reason is not None:
            raise RuntimeError(
                f"provider {self.name!r} cannot run here: {reason}; usable are {', '.join(available_providers())}"
            )
        _active.append(self)
        _renew()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        last = len(_active) - 1 - _active[::-1].index(self)
        del _active[last]
        _renew()


class batch_invariant(contextlib.ContextDecorator):
    """Keep a row's result independent of the batch around it, as a context manager or a decorator.

    With a fixed provider it is in any case. Automatic choice goes by what was measured to be fastest at a shape, and so
    may take another provider for another number of rows; inside this block it does not look at shapes. Like
    ``use_provider``, it holds for the whole process until the block ends.

    Args:
        enabled: False lets the choice look at shapes again, inside an enclosing block.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool] = []

    def __enter__(self) -> batch_invariant:
        global by_shape
        self._before.append(by_shape)
        by_shape = not self.enabled
        _renew()
        return self

    def __exit__(self, *exception: object) -> None:
        global by_shape
        by_shape = self._before.pop()
        _renew()


# Now, because torch.compile cannot trace an import. None loads anything optional; the others are imported by
# unavailable_reason, which is not traced.
get("reference")
get("cpu")
get("cuda")
