"""The machine while it measures: its device, threads, allocator and free memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def best_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def steady_machine(threads: int | None) -> Iterator[dict[str, Any]]:
    """Fix the threads and keep freed memory in the process; both are undone afterwards.

    glibc maps every large tensor anew and gives it back when freed, so each call pays a page fault for every 4 KB
    it writes: a fresh output then measures the kernel's page allocator and not the operator.
    """
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or min(before, cores))
    kept = _mallopt({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20})
    try:
        yield {
            "threads": torch.get_num_threads(),
            "cores": cores,
            "allocator": "glibc mallopt M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1: freed memory is kept, no new pages a call"
            if kept
            else "the C library's own (no glibc mallopt): large fresh results may measure page faults",
        }
    finally:
        if kept:
            _mallopt({_M_MMAP_MAX: 65536, _M_TRIM_THRESHOLD: 128 << 10, _M_TOP_PAD: 128 << 10})
        torch.set_num_threads(before)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def _mallopt(settings: Mapping[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return [mallopt(name, value) for name, value in settings.items()] == [1] * len(settings)
