"""What decides over every call besides its arguments: one tuple, replaced as a whole. Only its plans change in place.

``use_provider``, ``batch_invariant`` and explain() replace it when they are entered and left. The plans made under one
setting go with it.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch

from .._transforms import traced
from . import blocks, fastpath, registry


class Decision(NamedTuple):
    """How one call is served."""

    function: str  # the name of the public function, or of a layer
    provider: str
    how: str  # in words, for explain()
    refusals: tuple[tuple[str, str], ...] = ()  # (provider, reason) of those passed over
    where: str = ""  # the name of the module that made the call, in the model that explain() was given
    elementary: bool = False  # by ATen operators, which every transform supports


Plan = Callable[..., Any]
# By what of a call is no tensor: a guard, what picks from the inputs what it looks at, and the plan of what passes.
Plans = dict[tuple[Any, ...], tuple[tuple[Callable[..., bool], Callable[..., Any], Plan], ...]]


class Listener(NamedTuple):
    thread: int
    names: Mapping[int, str]  # of modules, by their identity
    decisions: list[Decision]
    note: Callable[[Any], None] | None = None  # takes each request instead, of any thread


class Settings(NamedTuple):
    provider: str | None  # the requested one; None: automatic choice
    by_shape: bool  # False inside batch_invariant
    listeners: tuple[Listener, ...]  # of explain()
    use_torch_layer_norm: bool  # a plain one on a CPU calls torch's operator at once
    use_torch_rms_norm: bool  # likewise; only where torch is requested, or our library is missing
    fastpath: Any  # the C++ module, while it may serve and the library that it calls is loaded
    fastpath_mode: bool | str  # True: automatic choice; False: the cpu provider; "cuda": the cuda provider
    plans: Plans


_default = os.environ.get("FUSEDNORM_PROVIDER") or None  # outside any block; its name is checked at first use
_providers: list[use_provider] = []  # entered and not left, in order
_invariant: list[batch_invariant] = []
_without: list[without_fastpath] = []
_listeners: list[Listener] = []
_fastpath: Any = None
_warned_of_missing_library = False
# Whether automatic choice leaves every plain layer_norm on a CPU to torch; None: no call has asked yet. What was
# measured is read from files, so that no import pays for it.
_layer_norm_is_torchs: bool | None = None


def _rebuild(plans: Plans | None = None) -> None:
    """Replace the settings, after a block was entered or left. The caller holds the lock."""
    global current
    provider = _providers[-1].name if _providers else _default
    by_shape = not (_invariant and _invariant[-1].enabled)
    missing = bool(registry._reasons.get("cpu"))  # asked before, and there is a reason
    served = provider in (None, "cpu", "cuda") and not (_listeners or _without)
    current = Settings(
        provider,
        by_shape,
        tuple(_listeners),
        (provider == "torch" or (provider is None and (missing or _layer_norm_is_torchs is True))) and not _listeners,
        (provider == "torch" or (provider is None and missing and _warned_of_missing_library)) and not _listeners,
        _fastpath if served else None,
        "cuda" if provider == "cuda" else provider is None and by_shape,
        {} if plans is None else plans,
    )


def load_fastpath() -> None:
    """Let the C++ module serve from now on. Called where a plan is made, so that no import pays for it."""
    global _fastpath
    if _layer_norm_is_torchs is None and not torch.compiler.is_compiling() and not traced():
        ask_for_layer_norm()
    if _fastpath is not None or current.provider not in (None, "cpu", "cuda") or torch.compiler.is_compiling():
        return
    if registry.unavailable_reason(current.provider or "cpu") is None:
        module = fastpath.load()[0]
        if module is not None:
            with blocks.lock:
                _fastpath = module
                _rebuild()


def ask_for_layer_norm() -> None:
    """See whether what was measured leaves every plain layer_norm on a CPU to torch."""
    global _layer_norm_is_torchs
    from .rules import layer_norm_is_torchs

    found = layer_norm_is_torchs()
    with blocks.lock:
        _layer_norm_is_torchs = found
        _rebuild(current.plans)  # a plan that is being made is kept among them


def forget() -> None:
    """Drop what was chosen: the plans, and the answers that the C++ module keeps."""
    global _layer_norm_is_torchs
    with blocks.lock:
        _layer_norm_is_torchs = None
        _rebuild()
    if _fastpath is not None:
        _fastpath.forget()


def warned_of_missing_library() -> None:
    """The user was told that our CPU library is missing: torch's operators may be called at once."""
    global _warned_of_missing_library
    if not _warned_of_missing_library or not (current.use_torch_rms_norm or current.listeners):
        with blocks.lock:
            _warned_of_missing_library = True
            _rebuild()


def requested() -> str | None:
    """The provider named by the innermost ``use_provider`` block or by FUSEDNORM_PROVIDER; None: automatic choice."""
    return current.provider


def unknown(name: object) -> str:
    near = difflib.get_close_matches(str(name), registry.PROVIDERS, 1)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"no provider is called {name!r}{guess or '.'} Known are {', '.join(map(repr, registry.PROVIDERS))}"


def request_in_words() -> str:
    """What asks for the provider that is requested."""
    return f"`use_provider({current.provider!r})`" if _providers else f"FUSEDNORM_PROVIDER={current.provider}"


def record(decision: Decision, request: Any = None) -> None:
    """Hand a decision to explain(), if it listens to this thread, and the request to who notes them."""
    for thread, names, decisions, note in current.listeners:
        if note is not None:
            if request is not None and not torch.compiler.is_compiling():
                note(request)
        elif torch.compiler.is_compiling():  # which traces neither
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
    with _listening(Listener(threading.get_ident(), names or {}, decisions)):
        yield decisions


def noting(note: Callable[[Any], None]) -> contextlib.AbstractContextManager[None]:
    """Hand every request that is made inside to `note`."""
    return _listening(Listener(0, {}, [], note))


@contextlib.contextmanager
def _listening(listener: Listener) -> Iterator[None]:
    with blocks.lock:
        _listeners.append(listener)
        _rebuild()
    try:
        yield
    finally:
        with blocks.lock:
            _listeners[:] = [other for other in _listeners if other.decisions is not listener.decisions]
            _rebuild()


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

    Example:
        >>> x = torch.randn(2, 8)
        >>> with fusednorm.use_provider("torch"):
        ...     normed = fusednorm.rms_norm(x, 8)
        >>> normed.shape
        torch.Size([2, 8])
    """

    entered = _providers
    changed = staticmethod(lambda: _rebuild())

    def __init__(self, name: str) -> None:
        if name not in registry.PROVIDERS:
            raise ValueError(f"name: {unknown(name)}")
        self.name = name
        self._used = False

    def __repr__(self) -> str:
        return f"use_provider({self.name!r})"

    def __enter__(self) -> use_provider:
        self._used = True
        reason = registry.unavailable_reason(self.name)
        if reason is not None:
            raise RuntimeError(
                f"provider {self.name!r} cannot run here: {reason}; usable are "
                f"{', '.join(registry.available_providers())}"
            )
        return super().__enter__()


class batch_invariant(blocks.Block):
    """Keep a row's result independent of the batch around it, as a context manager or a decorator.

    With an explicit provider this always holds. Automatic choice may take another provider for another number of rows;
    inside this block it does not look at shapes. Like ``use_provider``, it holds for the whole process until the block
    ends.

    Args:
        enabled: False lets the choice look at shapes again, inside an enclosing block.

    Example:
        >>> x = torch.randn(4, 8)
        >>> with fusednorm.batch_invariant():
        ...     whole, alone = (fusednorm.add_layer_norm(r, r, 8)[0] for r in (x, x[:1]))
        >>> torch.equal(whole[:1], alone)
        True
    """

    entered = _invariant
    changed = staticmethod(lambda: _rebuild())

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._used = False

    def __repr__(self) -> str:
        return f"batch_invariant({self.enabled})"


class without_fastpath(blocks.Block):
    """Leave the C++ module out, for tests and for counts of what Python does without it."""

    entered = _without
    changed = staticmethod(lambda: _rebuild())


current: Settings
_rebuild()
