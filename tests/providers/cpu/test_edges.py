"""Calls that the native CPU kernels have to survive: memory, threads and processes as nobody expects them."""

from __future__ import annotations

import math
import threading

import pytest
import torch

import fusednorm
from fusednorm import dispatch
from fusednorm._options import NormOptions
from fusednorm.providers import native
from fusednorm.providers.cpu import library as cpu

REASON = dispatch.unavailable_reason("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"provider cpu: {REASON}")


def assert_as_reference(*args, **options) -> None:
    """The native kernels and the reference agree in float32, masks, NaN and infinities included."""
    results = []
    for name in ("cpu", "reference"):
        with fusednorm.use_provider(name):
            results.append(fusednorm.add_layer_norm(*args, **options))
    for ours, reference in zip(*results, strict=True):
        # two orders of summation over at most 64 columns
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5, equal_nan=True)


OPTIONS = native.packed_norm(NormOptions(1, 1e-5, 0.0, 0.0, torch.float32, torch.float32, False, False, True))


def bare(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None):
    """The library's operator itself, before which nothing is checked."""
    return cpu.add_layer_norm_fwd(x, residual, weight, *[None] * 4, OPTIONS, 1e-5, 0.0, 0.0)[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_say_what_the_backward_computes_in(dtype, generator):
    """A float64 residual that is stored narrower leaves float32 statistics, which were read as float64."""
    x = torch.randn(5, 16, generator=generator).to(dtype).requires_grad_()
    residual = torch.randn(5, 16, generator=generator, dtype=torch.float64).requires_grad_()
    cotangent = torch.randn(5, 16, generator=generator).to(dtype)
    gradients = []
    for name in ("cpu", "reference"):
        with fusednorm.use_provider(name):
            normed, _ = fusednorm.add_layer_norm(x, residual, 16, residual_dtype=dtype)
        gradients.append(torch.autograd.grad(normed, (x, residual), cotangent))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_more_dimensions_than_the_kernels_take():
    x, residual = torch.randn(2, *[1] * 69, 8).unbind(0)
    assert x.ndim == 70
    for requires_grad in (False, True):  # two ways down
        normed, _ = fusednorm.add_layer_norm(x.requires_grad_(requires_grad), residual, 8)
        expected = torch.nn.functional.layer_norm((x + residual).flatten(), (8,))
        torch.testing.assert_close(normed.flatten(), expected)
    with fusednorm.use_provider("cpu"), pytest.raises(ValueError, match="70 dimensions, its kernels take 64"):
        fusednorm.add_layer_norm(x, residual, 8)
    with pytest.raises(RuntimeError, match="at most 64 dimensions"):
        bare(x.detach(), residual, None)


def test_the_operators_check_what_they_are_given():
    """Shapes, seeds and freed memory too: tests/helpers/hostile.py asks every operator."""
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="expected float64"):
        bare(x.long(), x, None)
    for p in (1.0, -0.5, math.nan, 1e30):
        with pytest.raises(RuntimeError, match="probability"):
            cpu.add_layer_norm_fwd(x, None, None, None, None, None, torch.tensor([1]), OPTIONS, 1e-5, p, 0.0)
    for stats in (torch.ones(2, 2).bfloat16(), torch.ones(2, 3), torch.ones(2, 4)[:, ::2]):
        with pytest.raises(RuntimeError, match="stats"):
            cpu.add_layer_norm_bwd(x, None, x, stats, *[None] * 6, OPTIONS, 0.0, 0.0)


def test_a_saved_tensor_may_come_back_in_another_layout(generator):
    x = torch.randn(5, 16, generator=generator, requires_grad=True)
    cotangent = torch.randn(5, 16, generator=generator)
    gradients = []
    for unpack in (lambda t: t, lambda t: t.t().contiguous().t() if t.ndim == 2 else t):
        with fusednorm.use_provider("cpu"), torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            normed, _ = fusednorm.add_layer_norm(x, x, 16)
            gradients.append(torch.autograd.grad(normed, x, cotangent)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("strides", [(2**31, 1), (1, 2**31)], ids=["rows_apart", "columns_apart"])
def test_strides_past_2_31(strides):
    """4 GB of addresses, of which two pages are touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # poison would touch all of it
    x = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    torch.utils.deterministic.fill_uninitialized_memory = True
    view = x.as_strided((2, 2), strides)
    view.copy_(torch.randn(2, 2))
    assert_as_reference(view, None, 2, dropout_p=0.5, seed=1)


def test_parameters_of_any_strides(generator):
    x, residual = torch.randn(2, 6, 3, 8, generator=generator)
    wide = torch.randn(4, 8, 3, 5, generator=generator)
    parameters = [wide[i, ..., 2].t() for i in range(4)]
    assert not parameters[0].is_contiguous()
    results = []
    for weight, bias, x_bias, layer_scale in (parameters, [p.contiguous() for p in parameters]):
        with fusednorm.use_provider("cpu"):
            options = {"x_bias": x_bias, "layer_scale": layer_scale, "dropout_p": 0.3, "seed": 5}
            results.append(fusednorm.add_layer_norm(x, residual, (3, 8), weight, bias, **options))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_any_eps(eps):
    assert_as_reference(torch.randn(3, 8), torch.randn(3, 8), 8, eps=eps)


@pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1, -(2**63), 2**64 - 1])
@pytest.mark.parametrize("p", [5e-324, 2**-32, 0.5, 1 - 2**-33, 1 - 2**-53])
def test_any_probability_and_seed(p, seed):
    assert_as_reference(torch.randn(5, 31), torch.randn(5, 31), 31, dropout_p=p, drop_path_p=p, seed=seed)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)], ids=str)
def test_dimensions_of_no_elements(shape):
    for ndim in range(1, len(shape) + 1):
        assert_as_reference(
            *(torch.randn(shape), torch.randn(shape), shape[-ndim:]), dropout_p=0.3, drop_path_p=0.2, seed=1
        )


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        x, weight = torch.randn(4, 64), torch.randn(64)
        assert_as_reference(x, x, 64, weight)
    assert_as_reference(torch.randn(4, 64), x, 64, weight)


def test_the_number_of_threads_may_change_before_the_backward(generator):
    x = torch.randn(517, 300, generator=generator, requires_grad=True)
    cotangent, before, gradients = torch.randn(517, 300, generator=generator), torch.get_num_threads(), []
    try:
        for forward, backward in ((1, 3), (3, 1), (2, 2)):
            torch.set_num_threads(forward)
            with fusednorm.use_provider("cpu"):
                normed, _ = fusednorm.add_layer_norm(x, x, 300, dropout_p=0.1, seed=3)
            torch.set_num_threads(backward)
            gradients.append(torch.autograd.grad(normed, x, cotangent)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_several_python_threads_at_once(generator):
    x, weight = torch.randn(300, 513, generator=generator), torch.randn(513, generator=generator)
    cotangent, results = torch.randn(300, 513, generator=generator), []

    def run(times: int) -> None:
        for _ in range(times):
            leaf = x.clone().requires_grad_()
            normed, _ = fusednorm.add_layer_norm(leaf, x, 513, weight, dropout_p=0.2, seed=1)
            results.append((normed.detach(), torch.autograd.grad(normed, leaf, cotangent)[0]))

    with fusednorm.use_provider("cpu"):
        threads = [threading.Thread(target=run, args=(8,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 40
    for normed, gradient in results[1:]:
        assert torch.equal(normed, results[0][0]) and torch.equal(gradient, results[0][1])


class Normalized(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return normalized(index)


def normalized(index: int) -> torch.Tensor:
    x = torch.randn(517, 300, generator=torch.Generator().manual_seed(index))
    with fusednorm.use_provider("cpu"):
        return fusednorm.add_layer_norm(x, x, 300)[0]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_forked_after_threads_were_used():
    here = [normalized(index) for index in range(4)]
    loader = torch.utils.data.DataLoader(
        Normalized(), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork"
    )
    for ours, theirs in zip(here, loader, strict=True):
        assert torch.equal(ours, theirs)
