"""Host time of the way to a Triton launch, with the driver left out: no GPU is needed.

    python3 -m pytest benchmarks/test_launch.py --benchmark-columns=min,median,iqr

Everything that Python does for a call is done on CPU tensors, to the point where the compiled kernel would be run.
Eager beside it does the same and computes 4 x 64 numbers. What the launch itself takes is the driver's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    """The Triton provider taken for usable on the CPU, every launch a call of a handle that does nothing."""
    handles: dict[tuple[Any, ...], Callable[..., None]] = {}

    def launch(self, grid, pointers, numbers):
        key = (pointers[0].get_device(), tuple([None if t is None else t.dtype for t in pointers]))
        run = handles.get(key) or handles.setdefault(key, lambda *arguments: None)
        run(*grid, 1, None, None, None, None, None, None, *pointers, *numbers, *self.constants)

    monkeypatch.setattr(triton_launch.Variant, "launch", launch)
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
def test_layer_norm_forward_and_backward(benchmark, who):
    x, weight, bias = tensors(True)
    cotangent = torch.ones(SHAPE)
    function = F.layer_norm if who == "eager" else fusednorm.layer_norm
    benchmark(lambda: torch.autograd.grad(function(x, WIDTH, weight, bias), (x, weight, bias), cotangent))
