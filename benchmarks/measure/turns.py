"""Seconds of calls that take milliseconds and more, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm


def in_turns(calls: Sequence[Callable[[], Any]], rounds: int, title: str = "") -> list[list[float]]:
    """The seconds of each call in every round. Rounds alternate between the given order and its reverse.

    Without a title there is no bar.
    """
    times: list[list[float]] = [[] for _ in calls]
    order = [*zip(calls, times, strict=True)]
    for _ in tqdm(range(rounds), title, leave=False, disable=None if title else True):
        for call, taken in order:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        order.reverse()
    return times
