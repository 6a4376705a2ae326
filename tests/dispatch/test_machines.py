"""Machines that no kernel of ours is for: what serves there, and the words of docs/providers.md for what does not."""

from __future__ import annotations

import sys
from pathlib import Path

import emulated
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusednorm
from fusednorm import dispatch
from fusednorm.dispatch import crossovers
from fusednorm.providers.cuda import library as cuda_library
from fusednorm.providers.triton import host

PAGE = (Path(__file__).parents[2] / "docs" / "providers.md").read_text(encoding="utf-8")


@pytest.fixture
def no_kernels(monkeypatch):
    """As a user's process has it: neither the interpreter nor the emulation takes CPU tensors."""
    monkeypatch.setattr(dispatch.registry, "_reasons", {})
    monkeypatch.setattr(host, "INTERPRETING", False)
    monkeypatch.setattr(cuda_library, "EMULATED", None)
    for provider in ("triton", "cuda"):
        monkeypatch.setattr(dispatch.get(provider)[0], "for_tests", None)


@pytest.fixture
def on(request, monkeypatch, no_kernels) -> str:
    """A kind of device; "rocm" is that of an AMD GPU, which torch calls cuda."""
    if request.param != "rocm":
        return request.param
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    crossovers._architecture.cache_clear()
    request.addfinalizer(crossovers._architecture.cache_clear)
    return "cuda"


def refusals(said: str) -> dict[str, str]:
    lines = (line.strip().split(" is not used: ") for line in said.splitlines() if " is not used: " in line)
    return dict(lines)


@pytest.mark.parametrize("on", ["rocm", "mps", "xpu"], indirect=True)
def test_torch_serves_on_other_gpus_and_the_page_has_each_refusal(on):
    if on == "cuda":
        pytest.importorskip("triton")
    with FakeTensorMode():
        x = torch.empty(4, 64, device=on)
        norm = fusednorm.explain(fusednorm.add_layer_norm, x, x, 64)
        q = torch.empty(1, 2, 8, 64, device=on)
        capped = fusednorm.explain(fusednorm.scaled_dot_product_attention, q, q, q, softcap=2.0)
    assert norm.startswith("add_layer_norm: torch, ")
    assert capped.startswith("scaled_dot_product_attention: reference, ")
    for said in (norm, capped):
        found = refusals(said)
        assert {"triton", "cuda", "cpu"} <= set(found)
        for name in ("triton", "cuda", "cpu"):
            assert f"{name}: {found[name]}".replace(f"{on}:0", "DEVICE") in PAGE


@pytest.mark.parametrize("on", ["rocm"], indirect=True)
def test_an_amd_gpu_has_no_crossovers_of_an_nvidia_gpu(on):
    """Their capabilities have the same numbers."""
    assert crossovers.device_key(torch.device(on, 0)) == "gfx_90"


def test_on_windows_nothing_is_built(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(RuntimeError) as fault:
        emulated.setup_script().check_tools()
    assert str(fault.value) in PAGE


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "aarch64")])
def test_without_x86_the_cpu_library_has_the_baseline_alone(system, machine, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    script = emulated.setup_script()
    assert list(script.INSTRUCTION_SETS) == ["baseline"]
    commands, _ = script.cpu_commands(tmp_path, emulated.torch_directory(), ["c++"])
    assert not [command for command in commands.values() if any("-mavx" in word for word in command)]
