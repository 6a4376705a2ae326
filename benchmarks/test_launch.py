"""Host time of the way to a Triton launch, with the driver left out: no GPU is needed.

    python3 -m pytest benchmarks/test_launch.py --benchmark-columns=min,median,iqr

Everything that Python does for a call is done on CPU tensors, to the point where the compiled kernel would be run.
Eager beside it does the same and computes 4 x 64 numbers. What the launch itself takes is the driver's.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fusednorm
from fusednorm import dispatch
from fusednorm.providers.triton import host as triton_host

pytest.importorskip("triton")
from fusednorm.providers.triton import launch as triton_launch

SHAPE, WIDTH = (4, 64), (64,)


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    """The Triton provider taken for usable on the CPU, every compiled kernel one that does nothing."""
    kernel = triton_launch.Handle(None, lambda *arguments: None, (None,) * 5, lambda index: 0, None)
    monkeypatch.setattr(triton_launch.Variant, "_compile", lambda self, dtypes: kernel)
    monkeypatch.setattr(triton_launch, "_loaded", {})
    monkeypatch.setattr(triton_host, "_prepared", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what a CPU tensor's get_device says
    monkeypatch.setattr(triton_host, "INTERPRETING", True)
    monkeypatch.setitem(dispatch.registry._reasons, "triton", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fusednorm.use_provider("triton"):
        yield
    torch.set_num_threads(threads)


def tensors(requires_grad: bool) -> list[torch.Tensor]:
    return [torch.ones(size, requires_grad=requires_grad) for size in (SHAPE, WIDTH, WIDTH)]


@pytest.mark.parametrize("who", ["eager", "fused"])
def test_layer_norm_without_gradients(benchmark, who):
    x, weight, bias = tensors(False)
    function = F.layer_norm if who == "eager" else fusednorm.layer_norm
    benchmark(function, x, WIDTH, weight, bias)


@pytest.mark.parametrize("who", ["eager", "fused"])
def test_add_layer_norm_without_gradients(benchmark, who):
    x, weight, bias = tensors(False)
    residual = torch.ones(SHAPE)
    if who == "eager":
        benchmark(lambda: F.layer_norm(x + residual, WIDTH, weight, bias))
    else:
        benchmark(fusednorm.add_layer_norm, x, residual, WIDTH, weight, bias)


@pytest.mark.parametrize("who", ["eager", "fused"])
def test_bias_act_dropout_without_gradients(benchmark, who):
    x, _, bias = tensors(False)
    if who == "eager":
        benchmark(lambda: F.gelu(x + bias))
    else:
        benchmark(fusednorm.bias_act_dropout, x, bias, "gelu", 0.0)


@pytest.mark.parametrize("who", ["eager", "fused"])
def test_causal_attention_without_gradients(benchmark, who):
    q, k, v = torch.ones(3, 2, 4, 16, 64).unbind()
    function = F.scaled_dot_product_attention if who == "eager" else fusednorm.scaled_dot_product_attention
    benchmark(function, q, k, v, is_causal=True)


@pytest.mark.parametrize("who", ["eager", "fused"])
def test_layer_norm_forward_and_backward(benchmark, who):
    x, weight, bias = tensors(True)
    cotangent = torch.ones(SHAPE)
    function = F.layer_norm if who == "eager" else fusednorm.layer_norm
    benchmark(lambda: torch.autograd.grad(function(x, WIDTH, weight, bias), (x, weight, bias), cotangent))
