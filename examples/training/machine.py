"""The machine that a job trains on: its device, its threads, its determinism, its provider."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

import fusednorm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def deterministic() -> Iterator[None]:
    """Only deterministic kernels, without the debugging aid that fills new tensors (it would be timed too)."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Parameters stay in float32; with bfloat16 the operators run under torch's autocast."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, dtype=DTYPES[dtype])


def progress_bar(items: Iterable[Any], total: int, label: str) -> Any:
    """tqdm where it is installed and stderr is a terminal; otherwise the bare iterable."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc=label, unit="step", leave=False, disable=not sys.stderr.isatty())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def provider_context(name: str | None) -> Any:
    return fusednorm.use_provider(name) if name else nullcontext()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch compute with so many threads on the CPU; None leaves it at its own choice."""
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise ValueError(f"threads is {count}; it must be at least 1")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
