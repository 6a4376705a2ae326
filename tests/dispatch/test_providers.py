"""The provider table: choice, explicit request, refusal."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import types

import fresh
import pytest
import torch

import fusednorm
from fusednorm import _once, dispatch
from fusednorm.providers.reference import norm as reference
from tests.helpers import dispatching


@pytest.fixture
def planted(monkeypatch):
    """Puts a provider of one's own first in the table: the reference under another name, as it was told to behave.

    Returns a function of (reason it is unavailable, refusal of a call, the list it notes its calls in).
    """

    def plant(name="planted", unavailable=None, refusal=None, calls=None):
        module = types.ModuleType(f"fusednorm_test_{name}")
        module.unavailable_reason = lambda: unavailable
        module.refusal = lambda op, *args: refusal(op, *args) if callable(refusal) else refusal

        def op(op_name):
            def run(*args):
                if calls is not None:
                    calls.append(op_name)
                return getattr(reference, op_name)(*args)

            return run

        module.add_layer_norm_fwd = op("add_layer_norm_fwd")
        module.add_layer_norm_bwd = op("add_layer_norm_bwd")
        dispatching.plant(monkeypatch, name, module)
        monkeypatch.setattr(_once, "_said", set())
        return name

    return plant


def call(x=None, **kwargs):
    x = torch.randn(3, 8) if x is None else x
    return fusednorm.add_layer_norm(x, torch.randn(3, 8), (8,), residual_dtype=torch.float64, **kwargs)


def test_available_providers_lists_usable_names_best_first():
    names = fusednorm.available_providers()
    assert "reference" in names
    assert names == [n for n in dispatch.PROVIDERS if dispatch.unavailable_reason(n) is None]
    assert names[-1] == "reference"
    for name in names:
        with fusednorm.use_provider(name):
            pass


def test_explicit_request_never_falls_back(planted):
    planted(refusal=lambda op, x, *rest: "x: more than two rows")
    with (
        fusednorm.use_provider("planted"),
        pytest.raises(ValueError, match=r"'planted'.*add_layer_norm.*x: more than two rows"),
    ):
        call()


def test_automatic_choice_takes_the_first_that_can_serve(planted):
    calls: list[str] = []
    planted(calls=calls)
    x = torch.randn(3, 8, requires_grad=True)
    normed, _ = call(x)
    normed.backward(torch.randn_like(normed))
    assert calls == ["add_layer_norm_fwd", "add_layer_norm_bwd"]
    assert x.grad is not None


def test_automatic_choice_logs_a_refusal_once_and_goes_on(planted, caplog):
    planted(refusal="layer_scale: not taken")
    with caplog.at_level(logging.INFO, logger="fusednorm"):
        for _ in range(3):
            call()
    records = [r for r in caplog.records if "not taken" in r.getMessage()]
    assert len(records) == 1
    assert records[0].name == "fusednorm"
    assert "planted" in records[0].getMessage()


@pytest.mark.parametrize(
    "why", [{"refusal": "layer_scale: not taken"}, {"unavailable": "no such chip here"}], ids="".join
)
def test_explain_names_the_provider_and_why_another_does_not_serve(planted, why):
    (reason,) = why.values()
    planted(**why)
    said = fusednorm.explain(fusednorm.add_layer_norm, torch.randn(3, 8), None, (8,))
    assert re.search("add_layer_norm: (torch, torch's own operators|cpu, one fused op)", said)
    assert re.search(rf"planted.*{reason}", said)


@pytest.mark.parametrize("function", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_explain_every_function(function, provider, using, device):
    x = torch.randn(3, 8, device=device)
    args = (x, x, (8,)) if function.startswith("add") else (x, (8,))
    with using:
        said = fusednorm.explain(getattr(fusednorm, function), *args)
    assert function in said
    assert provider == "automatic" or provider in said


def test_explain_takes_modules_and_leaves_the_random_state_alone():
    module = torch.nn.Sequential(fusednorm.LayerNorm(8), fusednorm.AddLayerNorm(8, dropout_p=0.5))
    state = torch.get_rng_state()
    said = fusednorm.explain(module, torch.randn(3, 8, generator=torch.Generator().manual_seed(1)))
    assert "add_layer_norm" in said
    assert torch.equal(state, torch.get_rng_state())
    assert "no function" in fusednorm.explain(torch.sum, torch.ones(2))


def test_use_provider_nests_and_restores_whatever_happens(planted):
    planted()
    planted("absent", unavailable="no such chip here")
    assert "absent" not in fusednorm.available_providers()
    with pytest.raises(ZeroDivisionError), fusednorm.use_provider("reference"):
        with fusednorm.use_provider("planted"):
            assert dispatch.requested() == "planted"
        assert dispatch.requested() == "reference"
        with pytest.raises(RuntimeError, match=r"'absent'.*no such chip here.*reference"):
            fusednorm.use_provider("absent").__enter__()
        assert dispatch.requested() == "reference"
        raise ZeroDivisionError
    assert dispatch.requested() is None


def test_use_provider_is_a_decorator_also_when_recursive():
    @fusednorm.use_provider("reference")
    def run(depth):
        assert dispatch.requested() == "reference"
        return run(depth - 1) if depth else "done"

    assert run(3) == "done"
    assert dispatch.requested() is None


def test_backward_outside_the_block_uses_the_forwards_provider(planted):
    """And in another thread, as on a GPU."""
    calls: list[str] = []
    planted(calls=calls)
    x = torch.randn(3, 8, requires_grad=True)
    with fusednorm.use_provider("planted"):
        normed, _ = call(x)
    calls.clear()
    with fusednorm.use_provider("reference"):
        thread = threading.Thread(target=lambda: normed.backward(torch.ones_like(normed)))
        thread.start()
        thread.join()
    assert calls == ["add_layer_norm_bwd"]
    assert x.grad is not None


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_forced_provider_really_runs_forward_and_backward(planted, memory_efficient):
    calls: list[str] = []
    planted(calls=calls)
    for function in (fusednorm.layer_norm, fusednorm.rms_norm):
        x = torch.randn(3, 8, requires_grad=True)
        with fusednorm.use_provider("planted"):
            function(x, (8,)).backward(torch.ones(3, 8))
    for function in (fusednorm.add_layer_norm, fusednorm.add_rms_norm):
        x = torch.randn(3, 8, requires_grad=True)
        with fusednorm.use_provider("planted"):
            outputs = function(x, x, (8,), memory_efficient=memory_efficient)
            torch.autograd.backward(outputs, [torch.ones(3, 8)] * 2)
    assert calls == ["add_layer_norm_fwd", "add_layer_norm_bwd"] * 4


def test_no_gradient_needed_no_function_recorded(planted):
    """Inference goes straight to the op: no graph node, nothing kept."""
    calls: list[str] = []
    planted(calls=calls)
    weight = torch.ones(8, requires_grad=True)
    with fusednorm.use_provider("planted"):
        with torch.no_grad():
            outputs = fusednorm.add_layer_norm(torch.randn(3, 8), torch.randn(3, 8), (8,), weight)
        with torch.inference_mode():
            outputs += fusednorm.add_layer_norm(torch.randn(3, 8), torch.randn(3, 8), (8,), weight)
    assert all(output.grad_fn is None and not output.requires_grad for output in outputs)
    assert calls == ["add_layer_norm_fwd"] * 2


def test_decorating_a_generator_is_refused():
    with pytest.raises(TypeError, match="generator"):

        @fusednorm.use_provider("reference")
        def rows():
            yield fusednorm.layer_norm(torch.randn(2, 8), 8)


NO_CUDA = """
import torch, programs
from unittest import mock
import fusednorm as fn

def asked(*_, **__):
    raise AssertionError("CUDA would be initialised")

asking = ("get_device_capability", "get_device_properties", "current_device", "device_count", "_lazy_init")
with mock.patch.multiple(torch.cuda, is_available=asked, **dict.fromkeys(asking, asked)):
    for name, make in programs.CALLS.items():
        program = make()
        programs.gradients(program, list(program.parameters()))
        print(fn.explain(program, *programs.inputs()))
"""


def test_calls_on_the_cpu_ask_nothing_of_cuda():
    """Else a process that is forked afterwards, as a DataLoader's is, could not use CUDA."""
    said = fresh.python("-c", NO_CUDA)
    assert said.count("triton is not used: x is on cpu, its kernels run on cuda tensors here") > 20


def test_explain_keeps_the_random_state_of_every_gpu(monkeypatch):
    kept = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: kept.extend(devices) or contextlib.nullcontext())
    fusednorm.explain(fusednorm.rms_norm, torch.randn(2, 8), 8)
    assert kept == [0, 1]
