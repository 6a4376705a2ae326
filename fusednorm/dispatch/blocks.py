"""Blocks whose effect holds for the whole process: any thread or task enters and leaves them, in any order.

Each block removes itself. None restores "what was before", which another thread may have changed since.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import torch

Self = TypeVar("Self", bound="Block")

lock = threading.RLock()  # around every change of what blocks and listeners decide


def locked(change: Callable[[], None]) -> None:
    """Make a change under the lock. Dynamo traces no lock; what it traces runs in one thread."""
    if torch.compiler.is_compiling():
        change()
    else:
        with lock:
            change()


class Block(contextlib.ContextDecorator):
    """A context manager and decorator. Its class lists the blocks that are entered, in order: the last one decides."""

    entered: ClassVar[list[Any]]
    changed: ClassVar[Callable[[], None]]  # called after a block was entered or left
    _used = True  # an instance that was not made warns of nothing

    def __call__(self, function: Any) -> Any:
        self._used = True
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            name = type(self).__name__
            raise TypeError(
                f"{name}: {function.__name__} is a generator or coroutine, whose body runs after the decorator "
                f"has left; put a `with {name}(...)` block inside it"
            )
        return super().__call__(function)

    def __enter__(self: Self) -> Self:
        self._used = True

        def enter() -> None:
            self.entered.append(self)
            type(self).changed()

        locked(enter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        def leave() -> None:
            if self not in self.entered:
                raise RuntimeError(f"{self!r}: left once more than it was entered; use it by `with {self!r}:`")
            del self.entered[len(self.entered) - 1 - self.entered[::-1].index(self)]
            type(self).changed()

        locked(leave)

    def __del__(self) -> None:
        if not self._used and not sys.is_finalizing():
            warnings.warn(
                f"{self!r} was never entered and has no effect; write `with {self!r}:` around the calls, or "
                f"`@{self!r}` above a function",
                UserWarning,
                stacklevel=2,
            )
