"""A cache folder of its own for each test, and providers that are planted among the real ones."""

from __future__ import annotations

import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusednorm import dispatch
from fusednorm.dispatch import crossovers, registry, rules, tuned
from fusednorm.providers.reference import norm as reference_norm
from fusednorm.tuning import calls, measure, run, worker
from fusednorm.tuning.supervise import Child
from tests.helpers.tuning_records import CPU


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
    """Add a provider of add_layer_norm whose forward is slow or wrong, hangs, or ends the process."""

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
        module.add_layer_norm_fwd, module.add_layer_norm_bwd = forward, reference_norm.add_layer_norm_bwd
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(registry.PROVIDERS, name, (module.__name__,))
        for known in ("_modules", "_serving", "functions", "_reasons"):
            monkeypatch.setattr(registry, known, dict(getattr(registry, known)))
        return name

    return add


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def gpu(monkeypatch):
    """`torch.cuda` as far as tuning uses it, and Triton's interpreter as the provider of that device."""
    pytest.importorskip("triton")
    if dispatch.unavailable_reason("triton") is not None:
        pytest.skip(f"provider triton: {dispatch.unavailable_reason('triton')}")
    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "Stand-in H200",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 10, clock_rate=1_000_000),
        "synchronize": lambda device=None: None,
        "mem_get_info": lambda device=None: (1 << 34, 1 << 35),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "Event": Event,
        "_sleep": lambda cycles: None,
    }
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(tuned, "_driver", lambda: "580.00")
    monkeypatch.setattr(dispatch.get("triton")[0], "for_tests", None)
    built, zeros, served_by = calls.build, torch.zeros, measure.served_by
    monkeypatch.setattr(measure, "build", lambda of, device, seed=0: built(of, CPU, seed))
    monkeypatch.setattr(measure, "served_by", lambda of, device, provider: served_by(of, CPU, provider))
    monkeypatch.setattr(torch, "zeros", lambda *args, device=None, **kwargs: zeros(*args, **kwargs))
    monkeypatch.setattr(run.BackgroundLoad, "share", lambda self: 0.0)
    crossovers._architecture.cache_clear()
    rules.forget()
    yield
    monkeypatch.undo()
    crossovers._architecture.cache_clear()
    rules.forget()
