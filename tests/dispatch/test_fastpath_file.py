"""The fast path's file: left out where it does not fit or is broken; and it is no part of a compiled graph."""

from __future__ import annotations

import contextlib
import importlib.machinery

import pytest
import torch
import torch._dynamo.testing
from fastpath_calls import NEEDS_FASTPATH

import fusednorm
from fusednorm import dispatch
from fusednorm.dispatch import crossovers as choice
from fusednorm.dispatch import fastpath
from fusednorm.providers.cpu import library as cpu

pytestmark = NEEDS_FASTPATH


@contextlib.contextmanager
def _file(path, monkeypatch):
    monkeypatch.setattr(fastpath, "FILE", path)
    fastpath.load.cache_clear()
    try:
        yield
    finally:
        fastpath.load.cache_clear()
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "it is not built, and this is torch "),
        (["2.99.0{suffix}"], "it was built for torch 2.99.0, and this is torch "),
        (["2.99.0{suffix}", "2.98.0.cpython-39.so"], "it was built for torch 2.98.0 and another Python, 2.99.0, and "),
    ],
)
def test_fastpath_of_another_torch_or_python_is_left_out(files, said, tmp_path, monkeypatch):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    for name in files:
        (tmp_path / f"_fastpath.torch-{name.format(suffix=suffix)}").touch()
    with _file(tmp_path / fastpath.FILE.name, monkeypatch):
        module, reason = fastpath.load()
        assert module is None
        assert reason.startswith(said) and torch.__version__ in reason.split("this is ")[1]


@pytest.mark.parametrize(
    ("here", "built", "serves"),
    [
        ("2.99.0+cpu", "2.99.0+cu130{suffix}", True),
        ("2.99.0+cu126", "2.99.0{suffix}", True),
        ("2.99.0", "2.99.0+cpu{suffix}", True),
        ("2.99.0a0+gitabc", "2.99.0a0+gitabc{suffix}", True),
        ("2.99.0+cpu", "2.99.1+cpu{suffix}", False),
        ("2.99.0+cpu", "2.99.0+gitabc{suffix}", False),
        ("2.99.0a0+gitabc", "2.99.0+cpu{suffix}", False),
        ("2.99.0+cpu", "2.99.0+cpu.cpython-39.so", False),
    ],
)
def test_fastpath_serves_the_published_builds_of_its_release(here, built, serves, tmp_path, monkeypatch):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_fastpath.torch-{built.format(suffix=suffix)}").write_bytes(fastpath.FILE.read_bytes())
    monkeypatch.setattr(torch, "__version__", here)
    with _file(tmp_path / f"_fastpath.torch-{here}{suffix}", monkeypatch):
        module, reason = fastpath.load()
    assert (module is not None) == serves, reason
    assert serves == (not reason)


def test_fastpath_can_be_left_out(monkeypatch):
    monkeypatch.setenv("FUSEDNORM_FASTPATH", "0")
    with _file(fastpath.FILE, monkeypatch):
        assert fastpath.load() == (None, "FUSEDNORM_FASTPATH=0 leaves it out")
        assert choice.device_key(torch.device("cpu")) == "cpu_without_fastpath"
    assert choice.device_key(torch.device("cpu")) == ("cpu_amd" if cpu.vendor() == "amd" else "cpu")


@pytest.mark.parametrize("content", ["nothing", "half", "text"])
def test_fastpath_that_is_broken_is_left_out(content, tmp_path, monkeypatch):
    whole = fastpath.FILE.read_bytes()
    broken = {"nothing": b"", "half": whole[: len(whole) // 2], "text": b"#!/bin/sh\n"}[content]
    path = tmp_path / fastpath.FILE.name
    path.write_bytes(broken)
    with _file(path, monkeypatch):
        module, reason = fastpath.load()
        assert module is None and str(path) in reason


def test_info_says_whether_there_is_a_fastpath(monkeypatch, tmp_path):
    from fusednorm.__main__ import info

    assert "fast path  ready" in info()
    with _file(tmp_path / fastpath.FILE.name, monkeypatch):
        assert "fast path  not here: it is not built" in info()


def test_fastpath_is_no_part_of_a_compiled_graph(monkeypatch):
    """It comes with the first call that is not compiled; what was compiled before stays."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: fusednorm.add_layer_norm(x, x, 8)[0] + fusednorm.add_rms_norm(x, x, 8)[0] + fusednorm.rms_norm(x, 8),
        backend=counter,
        fullgraph=True,
    )
    x = torch.randn(4, 8)
    with dispatch.settings.without_fastpath():
        run(x)
    assert dispatch.settings.current.fastpath is not None
    run(x)
    assert counter.frame_count == 1
