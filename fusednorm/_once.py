"""What happens once in a process, whichever of its threads comes first."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_said: set[Hashable] = set()


def first_time(said: Hashable) -> bool:
    """Whether nothing has said this in the process yet; of several threads, one is told so."""
    if said in _said:
        return False
    with _lock:
        first = said not in _said
        _said.add(said)
    return first


class once(Generic[T]):
    """``functools.cache`` for a function without arguments that only one thread may run: the others wait for it."""

    def __init__(self, function: Callable[[], T]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._lock = threading.RLock()
        self._results: list[T] = []

    def __call__(self) -> T:
        results = self._results  # one list: another thread may clear the cache
        if not results:
            with self._lock:
                if not results:
                    results.append(self._function())
        return results[0]

    def cache_clear(self) -> None:
        self._results = []
