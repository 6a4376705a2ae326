"""The modules are torch's own to everything that handles modules."""

from __future__ import annotations

import every_module
import pytest
import torch
from drop_in import results, twins
from torch import nn

import fusednorm

FORMS = [((8,), {}), (((2, 4),), {}), (([8],), {"eps": 1e-3}), ((8, 1e-6, False), {})]
PAIRS = {
    "LayerNorm": [
        *FORMS,
        ((8,), {"bias": False}),
        ((8,), {"dtype": torch.bfloat16}),
        ((torch.Size([8]),), {"device": "meta"}),
    ],
    "RMSNorm": [*FORMS, ((8,), {"dtype": torch.float16}), ((8, None, True, "meta"), {})],
}
CASES = [(name, args, kwargs) for name, cases in PAIRS.items() for args, kwargs in cases]
EVERY_CASE = pytest.mark.parametrize(("name", "args", "kwargs"), CASES, ids=str)
OPTIONS = every_module.OPTIONS | {"layer_scale": 1e-4}
RESIDUAL = pytest.mark.parametrize("name", ["AddLayerNorm", "AddRMSNorm"])


def same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for key in first:
        assert (first[key].shape, first[key].dtype) == (second[key].shape, second[key].dtype)
        assert first[key].is_meta or torch.equal(first[key], second[key])


@EVERY_CASE
def test_constructor_state_dict_and_repr_are_torchs(name, args, kwargs):
    ours, torchs = getattr(fusednorm, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(torchs)
    same_state(ours, torchs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in torchs.named_parameters()]
    for attribute in ("normalized_shape", "eps", "elementwise_affine"):
        assert getattr(ours, attribute) == getattr(torchs, attribute)


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_torchs(name, using, device):
    theirs, ours = twins(name, 24, device=device)
    x = torch.randn(2, 5, 24, device=device, requires_grad=True)
    with using:
        got = results(ours, (x,))
    # two float32 implementations, sums of some 50 terms of order one: the budget itself is held in test_norm.py
    torch.testing.assert_close(got, results(theirs, (x,)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_nested_tensors_go_to_torchs_own_module(name):
    parts = [torch.randn(2, 6), torch.randn(3, 6)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    ours = getattr(fusednorm, name)(6)
    for got, part in zip(ours(nested).unbind(), parts, strict=True):
        torch.testing.assert_close(got, getattr(nn, name)(6)(part))


@RESIDUAL
def test_residual_module_extends_torchs(name):
    base = name.removeprefix("Add")
    plain, full = getattr(fusednorm, name)(8), getattr(fusednorm, name)(8, **OPTIONS)
    torchs = getattr(nn, base)(8)
    assert isinstance(plain, getattr(nn, base))
    same_state(plain, torchs)
    assert set(full.state_dict()) == {*torchs.state_dict(), "layer_scale", "x_bias"}
    assert torch.equal(full.layer_scale, torch.full((8,), 1e-4))
    assert torch.equal(full.x_bias, torch.zeros(8))
    assert torch.equal(full.weight, torch.zeros(8))  # zero-centred: the factor 1 + weight starts at one
    plain.load_state_dict(torchs.state_dict(), strict=True)


@RESIDUAL
def test_residual_module_repr_shows_what_was_given(name):
    said = repr(getattr(fusednorm, name)(8, **OPTIONS))
    for key in OPTIONS:
        assert key in said
    assert repr(getattr(fusednorm, name)(8)) == repr(getattr(nn, name.removeprefix("Add"))(8)).replace(
        name.removeprefix("Add"), name
    )


@RESIDUAL
def test_residual_module_calls_the_function_with_its_options(name, using, device):
    module = getattr(fusednorm, name)(8, **OPTIONS, device=device).train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(8))
    x, residual = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 8, device=device)
    function = {"AddLayerNorm": fusednorm.add_layer_norm, "AddRMSNorm": fusednorm.add_rms_norm}[name]
    options = OPTIONS | {"layer_scale": module.layer_scale, "x_bias": module.x_bias, "eps": module.eps, "seed": 3}
    parameters = {n: getattr(module, n) for n in ("weight", "bias") if getattr(module, n, None) is not None}
    with using:
        expected = function(x, residual, (8,), **parameters, **options)
        got = module(x, residual, seed=3)
        evaluated = module.eval()(x, residual)
        undropped = function(x, residual, (8,), **parameters, **options | {"dropout_p": 0.0, "drop_path_p": 0.0})
    for one, other in zip(expected + undropped, got + evaluated, strict=True):
        assert torch.equal(one, other)


@RESIDUAL
def test_residual_module_without_affine(name):
    module = getattr(fusednorm, name)((2, 4), elementwise_affine=False)
    assert not list(module.parameters())
    normed, z = module(torch.randn(3, 2, 4))
    assert normed.shape == z.shape == (3, 2, 4)


@RESIDUAL
def test_meta_construction_then_to_empty_and_reset(name):
    """How sharded training builds a model: on meta, then materialised."""
    module = getattr(fusednorm, name)(8, **OPTIONS, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    same_state(module, getattr(fusednorm, name)(8, **OPTIONS))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm"])
def test_hooks_and_dtype_changes_act_as_on_any_module(name):
    module = getattr(fusednorm, name)(8)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    module.register_forward_hook(lambda m, args, output: seen.append("post"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    output = module.to(torch.bfloat16)(torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True))
    output = output[0] if isinstance(output, tuple) else output
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert seen == ["pre", "post", "backward"]


@pytest.mark.parametrize("name", ["AddLayerNorm", "AddRMSNorm"])
def test_functional_call_and_ensembles(name, using):
    """torch.func.stack_module_state and vmap over several modules."""
    modules = [getattr(fusednorm, name)(8, layer_scale=float(i + 1)) for i in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(4, 8)
    with using:
        run = lambda p, b: torch.func.functional_call(modules[0], (p, b), (x,))[1]  # noqa: E731
        stacked = torch.vmap(run)(parameters, buffers)
        for one, module in zip(stacked, modules, strict=True):
            torch.testing.assert_close(one, module(x)[1])
