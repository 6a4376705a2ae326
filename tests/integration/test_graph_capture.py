"""CUDA-graph capture without a GPU: what must not wait, change or be loaded while a stream is captured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from backends import INTERPRETED

import fusednorm
from fusednorm._options import NormInputs, NormOptions
from fusednorm.autograd import norm as autograd_norm


@pytest.fixture
def capturing(monkeypatch):
    """Say to the package that its stream is being captured, or not."""

    def say(now: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now)

    say(False)
    return say


class OnDevice(torch.nn.Parameter):
    """A parameter that says it is on a GPU."""

    is_cuda = True


def invertible(weight, bias=None, *, dtype=torch.float32, zero_centered=False):
    x = torch.zeros(2, len(weight), dtype=dtype)
    options = NormOptions(1, 1e-5, 0.0, 0.0, dtype, dtype, False, zero_centered, True)
    return autograd_norm.invertible(NormInputs(x, x, weight, bias), options)


def test_verdict_holds_while_capturing_whatever_the_optimizer_did(capturing):
    weight, bias = OnDevice(torch.ones(8)), OnDevice(torch.zeros(8))
    assert invertible(weight, bias)  # the warm-up
    with torch.no_grad():
        weight.add_(0.25)  # an optimizer step
        bias.sub_(0.25)
    capturing(True)
    assert invertible(weight, bias)


def test_verdict_holds_while_capturing_where_z_was_kept(capturing):
    weight = OnDevice(torch.zeros(8))
    assert not invertible(weight)
    with torch.no_grad():
        weight.fill_(1.0)
    capturing(True)
    assert not invertible(weight)
    capturing(False)
    assert invertible(weight)


def test_weight_never_seen_before_keeps_z_while_capturing_and_is_not_looked_at(capturing, monkeypatch):
    capturing(True)
    monkeypatch.setattr(autograd_norm, "weights_invert", lambda *_: pytest.fail("a look waits for the device"))
    assert not invertible(OnDevice(torch.ones(8)))


def test_verdict_of_one_precision_is_not_taken_for_another(capturing):
    """1e-30 is a normal float32 number and no float16 number at all."""
    weight = OnDevice(torch.full((8,), 1e-30), requires_grad=False)
    assert invertible(weight)
    assert not invertible(weight, dtype=torch.float16)
    assert invertible(weight)


def test_verdict_of_a_zero_centered_weight_is_not_taken_for_a_plain_one(capturing):
    weight = OnDevice(torch.zeros(8))
    assert invertible(weight, zero_centered=True)
    assert not invertible(weight)


@pytest.fixture
def launched(monkeypatch, capturing):
    """Launches of compiled kernels without a GPU, as (name, constants). Nothing runs."""
    from fusednorm.providers.triton import host as triton_host
    from fusednorm.providers.triton import launch as triton_launch

    noted = []

    def compile_nothing(function, dtypes, constants, **_options):
        def run(*_):
            noted.append((function.__name__, constants))

        return SimpleNamespace(run=run, function=None, packed_metadata=None)

    driver = SimpleNamespace(get_current_target=lambda: None, get_current_stream=lambda index: 0)
    monkeypatch.setattr(triton_launch, "JITFunction", object)
    monkeypatch.setattr(triton_launch, "compile_kernel", compile_nothing)
    monkeypatch.setattr(triton_launch.triton.runtime, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what a CPU tensor's get_device says
    monkeypatch.setattr(triton_launch, "_loaded", {})  # handles of nothing
    monkeypatch.setattr(triton_host, "_prepared", {})
    return noted


def step(x, weight, **options):
    with fusednorm.use_provider("triton"):
        normed, z = fusednorm.add_rms_norm(x, x, x.shape[-1], weight, **options)
        return torch.autograd.grad((normed, z), (x, weight), (torch.ones_like(normed), torch.ones_like(z)))


@pytest.mark.skipif(not INTERPRETED, reason="only in the interpreter does the provider take CPU tensors")
class TestLaunches:
    def leaves(self):
        return torch.ones(4, 16, requires_grad=True), torch.ones(16, requires_grad=True)

    def test_what_was_called_before_is_launched_while_capturing(self, launched, capturing):
        step(*self.leaves())
        before = list(launched)
        capturing(True)
        step(*self.leaves())
        assert len(before) == 3 and launched == before * 2

    def test_compiling_while_capturing_is_an_error_that_says_what_to_do(self, launched, capturing):
        step(*self.leaves())
        capturing(True)
        with pytest.raises(RuntimeError, match=r"add_layer_norm_fwd: .*call once before capturing"):
            step(*(leaf.detach().double().requires_grad_() for leaf in self.leaves()))
        assert len(launched) == 3

    def test_memory_efficient_launches_the_same_after_an_optimizer_step(self, launched, capturing, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        x, weight = self.leaves()
        step(x, weight, memory_efficient=True)
        before = list(launched)
        with torch.no_grad():
            weight.mul_(0.5)
        capturing(True)
        step(x, weight, memory_efficient=True)
        assert launched == before * 2
