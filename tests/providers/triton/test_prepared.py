"""What the provider prepares for a signature serves each call of it, wherever its tensors lie. Nothing is launched."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

import fusednorm
from fusednorm._options import NormInputs, NormOptions
from fusednorm.providers.triton import host as triton_host
from fusednorm.providers.triton import norm as triton_norm

pytestmark = pytest.mark.usefixtures("triton")


def at(offset, *shape, grad=True):
    """A tensor that starts so many elements after a multiple of 16 bytes."""
    return torch.ones(math.prod(shape) + offset)[offset:].view(shape).requires_grad_(grad)


@pytest.mark.parametrize(
    ("moved", "forward", "backward"),
    [("x", False, True), ("residual", False, True), ("weight", False, False), ("cotangent", True, False)],
)
def test_addresses_are_looked_at_in_each_call(launches, moved, forward, backward):
    """Sizes and strides are the same in all calls, so that they have one plan."""
    seen = []
    for offset in (0, 1, 0):
        shapes = {"x": (3, 64), "residual": (3, 64), "weight": (64,), "cotangent": (3, 64)}
        given = {name: at(offset * (name == moved), *shape, grad=name == "x") for name, shape in shapes.items()}
        cotangent = given.pop("cotangent")
        x = given["x"]
        normed, _ = fusednorm.add_layer_norm(normalized_shape=64, **given)
        torch.autograd.grad(normed, x, cotangent)
        seen.append([launch.variant.aligned for launch in launches])
        launches.clear()
    assert seen == [[True, True], [forward, backward], [True, True]]


@pytest.mark.parametrize("moved", ["x", "cotangent"])
def test_addresses_of_an_activation_are_looked_at_in_each_call(launches, moved):
    seen = []
    for offset in (0, 1, 0):
        x, cotangent = (at(offset * (name == moved), 3, 64, grad=name == "x") for name in ("x", "cotangent"))
        torch.autograd.grad(fusednorm.bias_act_dropout(x, None, "gelu"), x, cotangent)
        seen.append([launch.variant.aligned for launch in launches])
        launches.clear()
    assert seen == [[True, True], [moved != "x", False], [True, True]]


@pytest.mark.parametrize("moved", ["q", "v", "cotangent"])
def test_attention_copies_what_starts_elsewhere_in_this_call_alone(launches, moved):
    seen = []
    for offset in (0, 1, 0):
        names = ("q", "k", "v", "cotangent")
        *qkv, cotangent = (at(offset * (name == moved), 1, 2, 16, 16, grad=name != "cotangent") for name in names)
        out = fusednorm.scaled_dot_product_attention(*qkv)
        torch.autograd.grad(out, qkv, cotangent)
        addresses = {t.data_ptr() for t in (*qkv, cotangent)}
        seen.append([len(addresses & {t.data_ptr() for t in launch.pointers if t is not None}) for launch in launches])
        assert all(t.data_ptr() % 16 == 0 for launch in launches for t in launch.pointers if t is not None)
        launches.clear()
    there = [3, *[4] * (len(seen[0]) - 1)]  # the forward takes no cotangent
    assert seen == [there, [n - (moved != "cotangent" or n == 4) for n in there], there]


def test_attention_looks_at_the_precision_of_products_in_each_call(launches):
    q, before = torch.ones(1, 2, 16, 16), torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            fusednorm.scaled_dot_product_attention(q, q, q)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    asked = [{"ieee", "tf32"} & {c for c in launch.variant.constants if isinstance(c, str)} for launch in launches]
    assert asked == [{"ieee"}, {"tf32"}, {"ieee"}]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("function", ["norm", "attention"])
def test_a_signature_is_prepared_once_and_no_tensor_is_held(launches, function, compiled, monkeypatch):
    kept, held = {}, []
    monkeypatch.setattr(triton_host, "_prepared", kept)

    def call(x, weight):
        if function == "norm":
            result, z = fusednorm.add_layer_norm(x, None, 16, weight, dropout_p=0.5)
            return result + z
        return fusednorm.scaled_dot_product_attention(x, x, x)

    called = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call

    def step():
        x, weight = torch.ones(1, 2, 16, 16, requires_grad=True), torch.ones(16, requires_grad=True)
        result = called(x, weight)
        result.sum().backward()
        held.extend(map(weakref.ref, (x, weight, result)))
        return list(kept.items())

    first = step()
    assert len(first) == 2 and step() == first
    launches.clear()
    assert not [reference for reference in held if reference() is not None]


def test_what_is_prepared_differs_with_all_that_kernels_are_told(launches, monkeypatch):
    """The operator's function finds what it prepared without a plan."""
    kept = {}
    monkeypatch.setattr(triton_host, "_prepared", kept)
    x = torch.ones(4, 16)
    inputs = [
        *(NormInputs(x), NormInputs(x, x), NormInputs(x, None, x[0]), NormInputs(x, None, None, x[0])),
        *(NormInputs(x.double()), NormInputs(x[:3]), NormInputs(torch.ones(16, 4).t())),
        NormInputs(torch.ones(4, 16, dtype=torch.complex64).conj().imag),
    ]
    options = NormOptions(1, 1e-5, 0.0, 0.0, torch.float32, torch.float32, False, False, True)
    for _ in range(2):
        for given in inputs:
            triton_norm.add_layer_norm_fwd(given, options)
        triton_norm.add_layer_norm_fwd(inputs[0], options._replace(rms=True))
    assert len(kept) == len(inputs) + 1
