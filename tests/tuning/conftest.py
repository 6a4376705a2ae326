"""A cache folder of its own for each test, and providers that are planted among the real ones."""

from __future__ import annotations

import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fusednorm.dispatch import registry, rules, tuned
from fusednorm.providers.reference import norm as reference_norm
from fusednorm.tuning import worker
from fusednorm.tuning.supervise import Child

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that files are kept in, and no measurements of this process."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(tuned.FOLDER_VARIABLE, str(folder))
    monkeypatch.delenv(tuned.SWITCH_VARIABLE, raising=False)
    monkeypatch.setattr(tuned, "process", {})
    rules.forget()
    yield folder
    monkeypatch.undo()
    rules.forget()


@pytest.fixture
def in_a_fork() -> Callable[..., Child]:
    """Starts the worker with what a test changed in this process. A pool of threads does not outlive a fork."""
    return lambda plan, of, folder: Child.of_function(lambda: worker.follow({**plan, "threads": 1}, of.reports))


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Add a provider of add_layer_norm without gradients: it is slow or wrong, hangs, or ends the process."""

    def add(name: str, kind: str) -> str:
        def forward(inputs, options):
            if kind == "crash":
                os._exit(7)
            if kind == "hang":
                time.sleep(60)
            if kind == "slow":
                time.sleep(0.002)
            outputs = reference_norm.add_layer_norm_fwd(inputs, options)
            return (outputs[0] * 1.1, *outputs[1:]) if kind == "wrong" else outputs

        module = types.ModuleType(f"planted_{name}")
        module.unavailable_reason = lambda: None
        module.refusal = lambda op, inputs, options: None
        module.add_layer_norm_fwd = forward
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(registry.PROVIDERS, name, (module.__name__,))
        for known in ("_modules", "_serving", "functions", "_reasons"):
            monkeypatch.setattr(registry, known, dict(getattr(registry, known)))
        return name

    return add
