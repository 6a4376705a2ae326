"""What is dear to make, made once for all processes of pytest-xdist."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

Made = TypeVar("Made")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """What `make` gives and writes into its folder. The first process makes it, and the others wait for that."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all processes
    kept = base / f"{name}.pickle"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            shutil.rmtree(base / name, ignore_errors=True)  # of a process that failed
            (base / name).mkdir()
            kept.write_bytes(pickle.dumps(make(base / name)))
    return pickle.loads(kept.read_bytes())
