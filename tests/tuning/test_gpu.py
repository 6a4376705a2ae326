"""`tune` on a GPU, with a stand-in for the device: its tensors are on the CPU, and its clock is the host's."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

import fusednorm
from fusednorm import dispatch
from fusednorm.autograd import attention_torch
from fusednorm.dispatch import rules, tuned
from fusednorm.tuning import auto, calls, measure, run, store, worker
from fusednorm.tuning.calls import CallClass
from tests.helpers.tuning_records import CPU, GPU, record

CLASSES = [CallClass("add_layer_norm", "float32", grad, (4, 64)) for grad in (False, True)]
CLASSES += [CallClass("attention_causal", "float32", False, (1, 1, 16, 16, 16))]


def on_fake_tensors(function, *sizes: int) -> str:
    with FakeTensorMode():
        x = torch.empty(*sizes, device="cuda")
        tensors = (x, x, x) if function is fusednorm.scaled_dot_product_attention else (x, x, sizes[-1])
        return fusednorm.explain(function, *tensors)


def test_the_device_that_is_meant(gpu):
    assert run.chosen_device(None) == run.chosen_device("cuda") == GPU
    with pytest.raises(ValueError, match="cuda:3 is not here: torch sees 1 GPUs"):
        run.chosen_device("cuda:3")


def test_the_whole_way_on_a_gpu(gpu, in_a_fork):
    result = run.measure_and_keep(CLASSES, GPU, 0.01, 120.0, True, False, in_a_fork)
    assert [r["name"] for r in result.records] == [of.name for of in CLASSES]
    for found in result.records[:2]:
        assert {"triton", "torch"} <= {*found["providers"]} and found["best"] != "triton"  # it is interpreted here
    content = json.loads(result.path.read_text())
    assert result.path.name == "cuda-stand-in-h200.json" and content["key"] == "sm_90"
    machine = content["machine"]
    assert machine["capability"] == [9, 0] and machine["driver"] == "580.00" and machine["cudnn"] == 91000
    assert "threads" not in machine and tuned.file(GPU) is not None and tuned.file(CPU) is None


@pytest.mark.parametrize("best", ["triton", "torch"])
def test_what_was_measured_decides_on_the_gpu(gpu, best: str, monkeypatch):
    other = "torch" if best == "triton" else "triton"
    names = ["add_layer_norm/float32/forward/4096x1024", "add_layer_norm/float32/both/4096x1024"]
    store.save(GPU, [{**record("4x64", best, other), "name": name} for name in names])
    for module in dispatch.get("triton"):
        monkeypatch.setattr(module, "refusal", lambda op, *args: None)
    monkeypatch.setattr(dispatch.get("triton")[0], "runs_on", lambda: "cuda")
    monkeypatch.setitem(dispatch.registry._reasons, "cuda", "it is not built")
    rules.forget()
    said = on_fake_tensors(fusednorm.add_layer_norm, 4096, 1024)
    assert said.startswith(f"add_layer_norm: {best}, ") and "cuda-stand-in-h200.json" in said
    call = rules.Norm("add_layer_norm", torch.float32, 4096 * 1024, 1024, True, 0, True, False)
    preferred = rules.fastest(call)
    assert preferred.provider == best and preferred.own
    unmeasured = on_fake_tensors(fusednorm.add_layer_norm, 64, 1024)
    assert "cuda-stand-in" not in unmeasured


def test_attention_on_the_gpu_goes_by_it(gpu, monkeypatch):
    name = "attention/float32/forward/2x8x128x128x64"
    for module in dispatch.get("triton"):
        monkeypatch.setattr(module, "refusal", lambda op, *args: None)
    monkeypatch.setattr(dispatch.get("triton")[0], "runs_on", lambda: "cuda")
    monkeypatch.setitem(dispatch.registry._reasons, "cuda", "it is not built")
    rules.forget()
    assert on_fake_tensors(fusednorm.scaled_dot_product_attention, 2, 8, 128, 64).startswith(
        "scaled_dot_product_attention: torch"
    )
    store.save(GPU, [{**record("4x64", "triton"), "name": name}])
    said = on_fake_tensors(fusednorm.scaled_dot_product_attention, 2, 8, 128, 64)
    assert said.startswith("scaled_dot_product_attention: triton") and "cuda-stand-in-h200.json" in said


@pytest.mark.parametrize("what", ["driver", "capability", "cudnn", "cuda"])
def test_a_file_of_another_driver_or_library_is_left_out(gpu, what: str):
    path = store.save(GPU, [record("4x64", "triton")])
    content = json.loads(path.read_text())
    content["machine"][what] = "another"
    with pytest.raises(tuned.Unusable, match=f"measured with {what} another, and now it is"):
        path.write_text(json.dumps(content))
        tuned.read(path, tuned.machine(GPU))


def test_a_gpu_that_is_lost_ends_the_process_of_the_run(gpu, monkeypatch):
    def gone(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "why_wrong", gone)
    monkeypatch.setattr(worker, "measured", gone)
    monkeypatch.setattr(worker, "_answers", lambda device: False)
    said = []
    worker.work(CLASSES, GPU, 0.01, lambda kind, content: said.append((kind, content)), {})
    assert said == [("lost", "RuntimeError: CUDA error: an illegal memory access was encountered")]


def test_autotune_waits_for_the_gpu_and_not_while_a_graph_is_captured(gpu, monkeypatch):
    torch.use_deterministic_algorithms(False)
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waits.append(device))
    monkeypatch.setattr(auto, "capturing", lambda index: False)
    assert auto._allowed(GPU)
    monkeypatch.setattr(auto, "capturing", lambda index: True)
    assert not auto._allowed(GPU)
    assert auto._seconds(lambda: None, GPU, 3) >= 0.0 and waits == [GPU, GPU]


def test_the_grid_of_a_gpu_has_larger_shapes():
    on_cpu, on_gpu = ({of.elements for of in calls.grid(kind, "quick", ["norms"])} for kind in ("cpu", "cuda"))
    assert max(on_gpu) > max(on_cpu) and min(on_gpu) == min(on_cpu)


def test_each_kernel_of_torchs_attention_is_a_candidate(gpu):
    of = CLASSES[2]
    assert measure.candidates(of, GPU)[-3:] == ["torch/flash", "torch/cudnn", "torch/efficient"]
    assert not any("/" in name for name in measure.candidates(of, CPU) + measure.candidates(CLASSES[0], GPU))


def test_the_kernel_that_was_measured_fastest_comes_first(gpu, monkeypatch):
    orders = []

    @contextlib.contextmanager
    def noted(backends, set_priority=False):
        orders.append((backends, set_priority))
        yield

    monkeypatch.setattr(attention_torch, "sdpa_kernel", noted)
    name = "attention/float32/forward/2x8x128x128x64"
    on_fake_tensors(fusednorm.scaled_dot_product_attention, 2, 8, 128, 64)
    assert orders == []
    store.save(GPU, [{**record("4x64", "torch/cudnn"), "name": name}])
    said = on_fake_tensors(fusednorm.scaled_dot_product_attention, 2, 8, 128, 64)
    assert said.startswith("scaled_dot_product_attention: torch") and "by its cudnn kernel" in said
    ((backends, by_priority),) = orders
    assert backends[0] is SDPBackend.CUDNN_ATTENTION and by_priority and len(backends) == 4
    with fusednorm.batch_invariant():
        on_fake_tensors(fusednorm.scaled_dot_product_attention, 2, 8, 128, 64)
    assert len(orders) == 1
