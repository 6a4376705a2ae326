"""A GPU on which no kernel of the CUDA library runs is refused, and no call fails there. The emulation is made to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from backends import EMULATED
from torch._subclasses.fake_tensor import FakeTensorMode

import fusednorm
from fusednorm import dispatch
from fusednorm.providers.cpu import library as cpu
from fusednorm.providers.cuda import library as cuda_library

NO_IMAGE = "no kernel image is available for execution on the device"


@pytest.fixture(autouse=True)
def nothing_asked(request):
    """As in a new process; afterwards nothing is left of the faults."""
    if request.node.get_closest_marker("gpu"):
        yield
        return
    if not EMULATED:
        pytest.skip("the emulation's launches are made to fail, and here is a GPU or no g++")
    dispatch.registry._reasons.clear()
    cuda_library.forget_devices()
    yield
    for device in range(3):
        torch.ops.fusednorm_cuda.fail(device, "")
    cuda_library.forget_devices()
    dispatch.registry._reasons.clear()
    assert dispatch.unavailable_reason("cuda") is None


def calls():
    x, bias = torch.randn(4, 64, requires_grad=True), torch.zeros(64)
    fusednorm.add_layer_norm(x, x, 64)[0].sum().backward()
    fusednorm.layer_norm(x, 64)
    fusednorm.bias_act_dropout(x, bias, "relu")


def test_a_launch_on_the_emulation_fails_where_it_is_told_to():
    with fusednorm.use_provider("cuda"):
        calls()
        torch.ops.fusednorm_cuda.fail(0, NO_IMAGE)
        with pytest.raises(RuntimeError, match=f"launch of a kernel: {NO_IMAGE}"):
            calls()
        torch.ops.fusednorm_cuda.fail(0, "")
        calls()


@pytest.mark.parametrize("said", [NO_IMAGE, "CUDA driver version is insufficient for CUDA runtime version"])
def test_the_only_gpu_is_asked_before_the_provider_is_said_to_be_there(said):
    """And says what to do; automatic choice goes elsewhere."""
    torch.ops.fusednorm_cuda.fail(0, said)
    reason = dispatch.unavailable_reason("cuda")
    assert said in reason and "cuda:0" in reason and "FUSEDNORM_CUDA_ARCHITECTURES=native" in reason, reason
    assert "update the driver" in reason
    assert "cuda" not in fusednorm.available_providers()
    with pytest.raises(RuntimeError, match=r"provider 'cuda' cannot run here: .*a first launch"):
        fusednorm.use_provider("cuda").__enter__()
    calls()


@pytest.fixture
def three_gpus(monkeypatch):
    """As the library would see them, of which the emulation has none: one launch on each is all that happens there."""
    assert dispatch.unavailable_reason("cuda") is None
    cuda_library.forget_devices()
    monkeypatch.setattr(dispatch.registry, "_reasons", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5) if index == 2 else (9, 0))
    monkeypatch.setattr(cuda_library, "_capturing", lambda index: False)
    asked, led, launch = [], [0], cuda_library._first_launch
    monkeypatch.setattr(cuda_library, "LIBRARY", Path(cuda_library.EMULATED))
    monkeypatch.setattr(cuda_library, "EMULATED", None)
    monkeypatch.setattr(cuda_library, "_first_launch", lambda index: asked.append(index) or launch(index))
    monkeypatch.setattr(cuda_library, "hand_over", lambda library, emulated, devices: led.append(devices))
    with FakeTensorMode():
        yield [torch.empty(4, 8, device=f"cuda:{index}") for index in range(3)], asked, led


def test_of_several_gpus_only_that_is_refused_which_fails(three_gpus):
    rows, asked, led = three_gpus
    torch.ops.fusednorm_cuda.fail(1, NO_IMAGE)
    assert dispatch.unavailable_reason("cuda") is None and asked == []  # a launch takes memory on a GPU
    assert cuda_library.refusal(rows[0], 8) is None
    assert NO_IMAGE in cuda_library.refusal(rows[1], 8) and "cuda:1" in cuda_library.refusal(rows[1], 8)
    assert "older than compute capability 8.0" in cuda_library.refusal(rows[2], 8)
    assert cuda_library.refusal(rows[0], 8) is None and NO_IMAGE in cuda_library.refusal(rows[1], 8)
    assert asked == [0, 1]  # once each, and not where the capability says it
    assert led[-1] == 0b001


def test_no_gpu_is_asked_while_it_captures_a_graph(three_gpus, monkeypatch):
    """The call is taken: what runs outside the capture is to run in it."""
    rows, asked, led = three_gpus
    torch.ops.fusednorm_cuda.fail(1, NO_IMAGE)
    monkeypatch.setattr(cuda_library, "_capturing", lambda index: True)
    assert cuda_library.refusal(rows[1], 8) is None and asked == []
    monkeypatch.setattr(cuda_library, "_capturing", lambda index: False)
    assert NO_IMAGE in cuda_library.refusal(rows[1], 8) and asked == [1]
    monkeypatch.setattr(cuda_library, "_capturing", lambda index: True)
    assert NO_IMAGE in cuda_library.refusal(rows[1], 8) and asked == [1] and led[-1] == 0


def test_the_fastpath_leads_to_no_gpu_that_was_not_asked(monkeypatch):
    with fusednorm.use_provider("cuda"):
        taken = lambda: dispatch.settings.current.fastpath.rms_norm(x, (8,), None, 1e-5, "cuda")  # noqa: E731
        x = torch.randn(4, 8)
        if dispatch.settings.current.fastpath is None:
            pytest.skip("no fast path")
        assert taken() is not None
        cuda_library.forget_devices()
        assert taken() is None
        fusednorm.rms_norm(x, 8)
        assert taken() is not None


def test_a_library_without_the_first_launch_is_of_another_version(monkeypatch):
    """The CPU's stands in for it."""
    monkeypatch.setattr(cuda_library, "EMULATED", str(cpu.LIBRARY))
    cuda_library._load.cache_clear()
    try:
        assert "does not load into torch" in dispatch.unavailable_reason("cuda")
    finally:
        monkeypatch.undo()
        cuda_library._load.cache_clear()


@pytest.mark.gpu
def test_a_gpu_is_asked_once_and_not_within_a_graph(monkeypatch):
    if dispatch.unavailable_reason("cuda") is not None:
        pytest.skip(str(dispatch.unavailable_reason("cuda")))
    asked, launch = [], cuda_library._first_launch
    monkeypatch.setattr(cuda_library, "_first_launch", lambda index: asked.append(index) or launch(index))
    x = torch.randn(4, 64, device="cuda")
    with fusednorm.use_provider("cuda"):
        fusednorm.rms_norm(x, 64)
        cuda_library.forget_devices()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            fusednorm.rms_norm(x, 64)
        assert asked == []
        fusednorm.rms_norm(x, 64)
        fusednorm.rms_norm(x, 64)
    assert asked == [0]
