"""The shortcut's file: left out where it does not fit or is broken; and it is no part of a compiled graph."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch._dynamo.testing

import fusednorm
from fusednorm import dispatch
from fusednorm.dispatch import crossovers as choice
from fusednorm.dispatch import fastpath as _shortcut
from fusednorm.providers.cpu import norm as cpu

_missing = _shortcut.load()[1]
pytestmark = pytest.mark.skipif(bool(_missing), reason=f"no shortcut: {_missing}")


@contextlib.contextmanager
def _file(path, monkeypatch):
    monkeypatch.setattr(_shortcut, "FILE", path)
    _shortcut.load.cache_clear()
    try:
        yield
    finally:
        _shortcut.load.cache_clear()
        monkeypatch.undo()


def test_shortcut_of_another_torch_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "_shortcut.torch-2.99.0.cpython-311-x86_64-linux-gnu.so").touch()
    with _file(tmp_path / _shortcut.FILE.name, monkeypatch):
        module, reason = _shortcut.load()
        assert module is None
        assert "it was built for others (_shortcut.torch-2.99.0.cpython-311" in reason and _shortcut.FILE.name in reason


def test_shortcut_can_be_left_out(monkeypatch):
    monkeypatch.setenv("FUSEDNORM_SHORTCUT", "0")
    with _file(_shortcut.FILE, monkeypatch):
        assert _shortcut.load() == (None, "FUSEDNORM_SHORTCUT=0 leaves it out")
        assert choice.device_key(torch.device("cpu")) == "cpu_without_shortcut"
    assert choice.device_key(torch.device("cpu")) == ("cpu_amd" if cpu.vendor() == "amd" else "cpu")


@pytest.mark.parametrize("content", ["nothing", "half", "text"])
def test_shortcut_that_is_broken_is_left_out(content, tmp_path, monkeypatch):
    whole = _shortcut.FILE.read_bytes()
    broken = {"nothing": b"", "half": whole[: len(whole) // 2], "text": b"#!/bin/sh\n"}[content]
    path = tmp_path / _shortcut.FILE.name
    path.write_bytes(broken)
    with _file(path, monkeypatch):
        module, reason = _shortcut.load()
        assert module is None and str(path) in reason


def test_info_says_whether_there_is_a_shortcut(monkeypatch, tmp_path):
    from fusednorm.__main__ import info

    assert "fast path  ready" in info()
    with _file(tmp_path / _shortcut.FILE.name, monkeypatch):
        assert "fast path  not here: it is not built" in info()


def test_shortcut_is_no_part_of_a_compiled_graph(monkeypatch):
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
