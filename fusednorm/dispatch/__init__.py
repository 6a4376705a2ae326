"""The ordered table of providers, and the choice among them.

A provider is one module or several. Each has ``refusal(op, inputs, options)`` and a function for each op it implements;
the first has ``unavailable_reason()``. A module may have ``reluctance(op, inputs, options)``: why automatic choice
passes it over, whatever the shape. Providers never import one another; this table is the only place that lists them.

``torch`` stands for torch's own operators. Its functions carry no ``_fwd`` or ``_bwd``: autograd differentiates them.
Automatic choice takes it where no kernel of ours serves a call, or is faster; it takes ``reference``, our readable
definition, only for what torch's operators cannot do.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import torch

from .._once import first_time
from .._options import Inputs, Options
from .._transforms import traced
from ..providers.cuda import host as cuda_host
from . import blocks
from . import crossovers as choice
from . import fastpath as _shortcut

_log = logging.getLogger("fusednorm")

PROVIDERS: dict[str, tuple[str, ...]] = {  # best first
    "triton": (
        "fusednorm.providers.triton.norm",
        "fusednorm.providers.triton.activation",
        "fusednorm.providers.triton.attention",
    ),
    "cuda": ("fusednorm.providers.cuda.norm", "fusednorm.providers.cuda.activation"),
    "cpu": ("fusednorm.providers.cpu.norm", "fusednorm.providers.cpu.activation", "fusednorm.providers.cpu.attention"),
    "torch": (
        "fusednorm.providers.torch.norm",
        "fusednorm.providers.torch.activation",
        "fusednorm.providers.torch.attention",
    ),
    "reference": (
        "fusednorm.providers.reference.norm",
        "fusednorm.providers.reference.activation",
        "fusednorm.providers.reference.attention",
    ),
}

_default = os.environ.get("FUSEDNORM_PROVIDER") or None  # what is requested outside any block; named at first use
_requested = _default  # a module global, not a ContextVar: torch.compile traces and guards it
_active: list[use_provider] = []  # entered and not left, in order
_invariant: list[batch_invariant] = []
_records: list[_Listener] = []  # where explain() collects the decisions of a thread
_modules: dict[str, tuple[ModuleType, ...]] = {}
_serving: dict[tuple[str, str], ModuleType] = {}  # by provider and op
_functions: dict[tuple[str, str], Callable[..., Any]] = {}  # of these modules: one look-up a call
_reasons: dict[str, str | None] = {}
by_shape = True  # False inside batch_invariant()
automatic = _default is None  # False while a provider is requested or decisions are recorded
torch_asked = _default == "torch"  # torch's own operators are requested, and no decision is recorded
short_cuts = automatic or torch_asked  # False while decisions are recorded, or another provider than these two and cpu
shortcut: Any = (
    None  # the module of fusednorm/dispatch/fastpath.py while it may serve, once a library it leads to is loaded
)
shortcut_asked: bool | str = True  # for what: a choice by what was measured (True), the CPU library (False), or "cuda"


class Decision(NamedTuple):
    """How one call is served."""

    call: str
    provider: str
    how: str
    refusals: tuple[tuple[str, str], ...] = ()
    where: str = ""  # the name of the module that made the call, in the model that explain() was given


class _Listener(NamedTuple):
    thread: int
    names: Mapping[int, str]  # of modules, by their identity
    decisions: list[Decision]


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
            _functions.update({(name, op): function for op, function in ops.items()})
        _modules[name] = modules  # last: another thread that sees it looks for the ops
    return modules


def _get_torch(modules: tuple[ModuleType, ...]) -> None:
    """It serves the ops that the reference has. A raw op that names it runs the reference's kernel of that op: torch
    has none of its signature."""
    get("reference")
    for (name, op), function in list(_functions.items()):
        for module in modules:
            if name == "reference" and hasattr(module, op.rpartition("_")[0]):
                _serving["torch", op], _functions["torch", op] = module, function


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
        reason = get(name)[0].unavailable_reason()
        with blocks.lock:
            _reasons[name] = reason
            if name in ("cpu", "cuda"):
                _renew()
    return _reasons[name]


# what torch.compiler.assume_constant_result sets, without its import of the compiler: the answer is not to be traced
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def tell_missing_library() -> None:
    """Warn once, for a call on CPU tensors that our library would have served, that torch's operators do."""
    if torch.compiler.is_compiling() or not first_time("no CPU library"):
        return
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusednorm", "torch"):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(
        f"fusednorm's CPU kernels are not used: {unavailable_reason('cpu')}. Torch's own operators serve calls on CPU "
        "tensors instead. FUSEDNORM_PROVIDER=torch in the environment asks for them, without this warning.",
        UserWarning,
        stacklevel=depth,
    )


def available_providers() -> list[str]:
    """Names of the providers usable here and now, best first."""
    return [name for name in PROVIDERS if unavailable_reason(name) is None]


def requested() -> str | None:
    """The provider named by the innermost ``use_provider`` block or by FUSEDNORM_PROVIDER; None: automatic choice."""
    return _requested


def refusal(name: str, op: str, inputs: Inputs, options: Options) -> str | None:
    """Why provider `name` cannot take this call, or None if it can."""
    reason = unavailable_reason(name)
    if reason is not None:
        return reason
    module = serving(name, op)
    return f"it has no {op.rpartition('_')[0]}" if module is None else module.refusal(op, inputs, options)


def reluctance(name: str, op: str, inputs: Inputs, options: Options) -> str | None:
    """Why automatic choice passes over a provider that could take this call, or None if it does not."""
    hook = getattr(serving(name, op), "reluctance", None)
    return None if hook is None else hook(op, inputs, options)


def _serves(name: str, *call: Any) -> bool:
    return name in PROVIDERS and refusal(name, *call) is None and reluctance(name, *call) is None


def choose(
    op: str, inputs: Inputs, options: Options, without: tuple[str, str] | None = None
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The provider for a call of `op`, and (name, reason) of those passed over.

    An explicit request never falls back: it raises. Automatic choice takes what was measured to be fastest, or else
    the first provider of the table that can serve the call, and logs each refusal once. It passes over the provider
    that `without` names, for the reason given there.
    """
    call = op, inputs, options
    requested = _requested  # once: another thread may enter or leave a block meanwhile
    if requested is not None:
        _check_request(requested, *call)
        return requested, ()
    if traced():  # its sizes are tensors, and it may run without this package
        return "torch", ()
    preference = None
    if by_shape and not torch.compiler.is_compiling():  # a graph would be compiled anew for each number of rows
        preference = choice.preference(*call)
        if preference is not None and not _serves(preference.provider, *call):
            preference = None
    if without is not None and preference is not None and preference.provider == without[0]:
        preference = None
    refusals: tuple[tuple[str, str], ...] = ()
    for name in PROVIDERS:
        reason = refusal(name, *call) or reluctance(name, *call)
        if reason is None and without is not None and name == without[0]:
            reason = without[1]
        if reason is None and preference is not None:
            reason = preference.why if preference.provider != name else None
        if reason is None:
            passed_over = name == "torch" and inputs[0].is_cpu and "cpu" in dict(refusals)
            if passed_over and unavailable_reason("cpu") and not reluctance("cpu", *call):
                tell_missing_library()
            return name, refusals
        refusals += ((name, reason),)
        if not torch.compiler.is_compiling() and first_time((name, reason)):
            _log.info("provider %s is not used: %s", name, reason)
    raise RuntimeError(f"no provider can run {op}: {refusals}")


def _check_request(name: str, op: str, inputs: Inputs, options: Options) -> None:
    """Raise ValueError if the requested provider cannot run a call, or if there is none of that name."""
    if name not in PROVIDERS:
        raise ValueError(f"FUSEDNORM_PROVIDER: {_unknown(name)}")
    reason = refusal(name, op, inputs, options)
    if reason is not None:
        asked = f"`use_provider({name!r})`" if _active else f"FUSEDNORM_PROVIDER={name}"
        raise ValueError(f"provider {name!r} cannot run {op}: {reason}; leave {asked} out for automatic choice")


def _unknown(name: object) -> str:
    near = difflib.get_close_matches(str(name), PROVIDERS, 1)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"no provider is called {name!r}{guess or '.'} Known are {', '.join(map(repr, PROVIDERS))}"


def record(decision: Decision) -> None:
    """Hand a decision to explain(), if it listens to this thread."""
    for thread, names, decisions in tuple(_records):  # another thread may leave meanwhile
        if torch.compiler.is_compiling():  # which traces neither
            decisions.append(decision)
        elif thread == threading.get_ident():
            decisions.append(decision._replace(where=_caller(names)))


def _caller(names: Mapping[int, str]) -> str:
    """The name of the module whose method, or function of it, is the innermost one that runs.

    The frames say so: a fused layer calls no submodule, and a hook would make it call each.
    """
    frame: FrameType | None = sys._getframe(2) if names else None
    while frame is not None:
        if frame.f_code.co_argcount:
            name = names.get(id(frame.f_locals.get(frame.f_code.co_varnames[0])))
            if name is not None:
                return name
        frame = frame.f_back
    return ""


@contextlib.contextmanager
def recording(names: Mapping[int, str] | None = None) -> Iterator[list[Decision]]:
    """Collect every decision that this thread makes inside, with the name of the module that made it."""
    decisions: list[Decision] = []
    with blocks.lock:
        _records.append(_Listener(threading.get_ident(), names or {}, decisions))
        _renew()
    try:
        yield decisions
    finally:
        with blocks.lock:
            _records[:] = [listener for listener in _records if listener.decisions is not decisions]
            _renew()


def _renew() -> None:
    """What calls look at, after a block was entered or left. The caller holds the lock."""
    global _requested, automatic, torch_asked, short_cuts, by_shape, shortcut, shortcut_asked
    _requested = _active[-1].name if _active else _default
    by_shape = not (_invariant and _invariant[-1].enabled)
    automatic = _requested is None and not _records
    torch_asked = _requested == "torch" and not _records
    short_cuts = not _records and _requested in (None, "cpu", "torch")
    leads_there = not _records and _requested in (None, "cpu", "cuda")
    reason = _reasons.get("cuda", "not asked yet")
    if _requested != "cuda":
        reason = _reasons.get("cpu", reason)
    shortcut = _shortcut.load()[0] if leads_there and reason is None else None
    shortcut_asked = "cuda" if _requested == "cuda" else automatic and by_shape


class use_provider(blocks.Block):
    """Run everything inside with one provider, as a context manager or a decorator.

    ``use_provider("torch")`` takes torch's own operators for every function and module. The environment variable
    ``FUSEDNORM_PROVIDER``, read when the package is imported, names the provider outside of any block.

    The choice holds for the whole process until the block ends; the block entered last decides, whichever thread
    entered it. The backward of what was computed inside uses the same provider wherever it runs, but what activation
    checkpointing computes anew runs with the choice of that moment: keep the backward inside the block too. A call
    that the provider cannot take raises; nothing falls back silently. Under a ``torch.func`` transform or forward-mode
    AD the elementary operators of the reference serve, whatever is requested.

    Args:
        name: one of ``available_providers()``.

    Raises:
        ValueError: no provider has that name.
        RuntimeError: the provider cannot run here (raised on entry, with the reason).
    """

    entered = _active
    changed = staticmethod(lambda: _renew())

    def __init__(self, name: str) -> None:
        if name not in PROVIDERS:
            raise ValueError(f"name: {_unknown(name)}")
        self.name = name
        self._used = False

    def __repr__(self) -> str:
        return f"use_provider({self.name!r})"

    def __enter__(self) -> use_provider:
        self._used = True
        reason = unavailable_reason(self.name)
        if reason is not None:
            raise RuntimeError(
                f"provider {self.name!r} cannot run here: {reason}; usable are {', '.join(available_providers())}"
            )
        return super().__enter__()


class batch_invariant(blocks.Block):
    """Keep a row's result independent of the batch around it, as a context manager or a decorator.

    With a fixed provider it is in any case. Automatic choice goes by what was measured to be fastest at a shape, and so
    may take another provider for another number of rows; inside this block it does not look at shapes. Like
    ``use_provider``, it holds for the whole process until the block ends.

    Args:
        enabled: False lets the choice look at shapes again, inside an enclosing block.
    """

    entered = _invariant
    changed = staticmethod(lambda: _renew())

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._used = False

    def __repr__(self) -> str:
        return f"batch_invariant({self.enabled})"


# Now, because torch.compile cannot trace an import. None loads anything optional; the others are imported by
# unavailable_reason, which is not traced.
get("torch")
get("cpu")
get("cuda")
cuda_host.hand_over = _shortcut.attach_cuda
