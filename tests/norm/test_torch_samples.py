"""PyTorch's own operator samples through our functions: torch's results, gradients and refusals."""

from __future__ import annotations

import functools

import pytest
import torch
import torch_samples
from oracle import DTYPES, Call, assert_within_budget

import fusednorm

NAMES = {"layer_norm": fusednorm.layer_norm, "rms_norm": fusednorm.rms_norm}
EVERY_OP = pytest.mark.parametrize("name", sorted(NAMES))
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@functools.cache
def samples(name: str, dtype: torch.dtype, device: str) -> list:
    found = list(torch_samples.operator(name).sample_inputs(device, dtype, requires_grad=True))
    assert len(found) >= 5, f"torch has no more samples of {name}"
    return found


def run(function, sample, wide: bool = False) -> dict[str, torch.Tensor]:
    """Output and the gradient of every tensor for a random cotangent; with `wide`, of the float64 copies."""
    dtype = sample.input.dtype
    if wide:
        sample = sample.transform(lambda t: t.detach().double().requires_grad_() if torch.is_tensor(t) else t)
    affine = dict(zip(("weight", "bias"), sample.args[1:], strict=False)) | sample.kwargs
    tensors = {"input": sample.input} | {n: t for n, t in affine.items() if isinstance(t, torch.Tensor)}
    output = function(sample.input, *sample.args, **sample.kwargs)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    cotangent = cotangent.to(output.device, dtype).to(output.dtype)  # the low-precision value, also in float64
    gradients = torch.autograd.grad(output, list(tensors.values()), cotangent)
    return {"output": output} | {f"d{n}": g for n, g in zip(tensors, gradients, strict=True)}


def exactly(name, dtype, x, normalized_shape, weight=None, bias=None, eps=None):
    """The oracle in the samples' signature."""
    function = name.rsplit(".", 1)[-1]
    leaves = {"x": x, "weight": weight, "bias": bias}
    options = {} if eps is None else {"eps": eps}
    call = Call(function, len(normalized_shape), options=options)
    return call.exact({n: leaf for n, leaf in leaves.items() if leaf is not None}, dtype)[0]


@DTYPE
@EVERY_OP
def test_opinfo_samples_give_torchs_results_and_gradients(name, dtype, using, device):
    """The errors over all samples within the budget, torch's own function being the twin.

    The samples have a handful of elements, so a largest error means something only over all of them; with one
    column torch's gradient is pure rounding noise, which a comparison of ours with torch's would chase.
    """
    pooled: dict[str, list[tuple]] = {}
    for sample in samples(name, dtype, "cpu"):
        sample = sample.transform(lambda t: t.detach().to(device).requires_grad_() if torch.is_tensor(t) else t)
        with using:
            ours = run(NAMES[name], sample)
        torchs = run(torch_samples.operator(name).op, sample)
        for got, expected in zip(ours.values(), torchs.values(), strict=True):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        for kind, truth in run(functools.partial(exactly, name, dtype), sample, wide=True).items():
            pooled.setdefault(kind, []).append((ours[kind], torchs[kind], truth))
    assert pooled.keys() >= {"output", "dinput", "dweight"}
    for kind, triples in pooled.items():
        flat = [torch.cat([t.flatten() for t in column]) for column in zip(*triples, strict=True)]
        assert_within_budget(*flat, dtype, f"{name} {kind}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@EVERY_OP
def test_opinfo_samples_without_gradient(name, dtype, using, device):
    """And those that torch checks against its NumPy reference."""
    info = torch_samples.operator(name)
    for sample in (*samples(name, dtype, "cpu"), *info.reference_inputs("cpu", dtype)):
        sample = sample.transform(lambda t: t.detach().to(device) if torch.is_tensor(t) else t)
        with using:
            ours = NAMES[name](sample.input, *sample.args, **sample.kwargs)
        expected = info.op(sample.input, *sample.args, **sample.kwargs)
        assert not ours.requires_grad
        torch.testing.assert_close(ours, expected)


@EVERY_OP
def test_opinfo_error_samples_are_refused(name, using):
    """What torch refuses we refuse; the type may be the more telling ValueError or TypeError."""
    info = torch_samples.operator(name)
    errors = list(info.error_inputs_func(info, "cpu")) if info.error_inputs_func else []
    errors = [(e.sample_input.input, e.sample_input.args, e.sample_input.kwargs) for e in errors]
    errors += [
        (torch.randn(2, 3), ((2,),), {}),
        (torch.randn(2, 3), ((),), {}),
        (torch.randn(2, 3), ((3,), torch.ones(2)), {}),
        (torch.randn(2), ((2, 2),), {}),
    ]
    for x, args, kwargs in errors:
        with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)):
            info.op(x, *args, **kwargs)
        with using, pytest.raises((TypeError, ValueError)):
            NAMES[name](x, *args, **kwargs)
