"""The provider ``torch``: torch's own operators for every function, on request and where no kernel of ours serves."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from fresh import python
from oracle_activation import TORCHS

import fusednorm
from fusednorm import _once

N = 33


def leaves(dtype, *shapes):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def same_to_the_last_bit(ours, eager, tensors):
    """Of two functions of the same leaves, under the same random state."""
    results = []
    for function in (ours, eager):
        torch.manual_seed(5)
        outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, tensors, cotangents)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_norms_are_torchs(torchs, dtype):
    tensors = leaves(dtype, (4, N), (N,), (N,))
    same_to_the_last_bit(
        lambda x, w, b: fusednorm.layer_norm(x, N, w, b), lambda x, w, b: F.layer_norm(x, (N,), w, b), tensors
    )
    same_to_the_last_bit(lambda x, w: fusednorm.rms_norm(x, N, w), lambda x, w: F.rms_norm(x, (N,), w), tensors[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_residual_norms_are_what_eager_code_computes(torchs, p, dtype):
    """With ``F.dropout`` itself, where no seed was given."""

    def ours(x, residual, weight, bias, x_bias, scale):
        epilogue = {"x_bias": x_bias, "layer_scale": scale, "dropout_p": p}
        return fusednorm.add_layer_norm(x, residual, N, weight, bias, **epilogue)

    def eager(x, residual, weight, bias, x_bias, scale):
        z = residual + F.dropout(x + x_bias, p) * scale
        return F.layer_norm(z, (N,), weight, bias), z

    same_to_the_last_bit(ours, eager, leaves(dtype, (4, N), (4, N), (N,), (N,), (N,), (N,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", TORCHS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_activations_are_torchs(torchs, p, activation, dtype):
    function = TORCHS[activation]
    same_to_the_last_bit(
        lambda x, b: fusednorm.bias_act_dropout(x, b, activation, p),
        lambda x, b: F.dropout(function(x + b), p),
        leaves(dtype, (4, N), (N,)),
    )


def test_a_seed_gives_the_documented_masks(torchs):
    x = torch.ones(6, N)
    _, z = fusednorm.add_layer_norm(x, None, N, dropout_p=0.4, seed=3)
    assert torch.equal(z != 0, fusednorm.dropout_mask((6, N), 0.4, 3))
    y = fusednorm.bias_act_dropout(x, None, "relu", 0.4, seed=3)
    assert torch.equal(y != 0, fusednorm.dropout_mask((6, N), 0.4, 3))


def test_drop_path_without_a_seed_drops_whole_samples_by_torchs_generator(torchs):
    x = torch.ones(400, 3, 4)
    x[:, 0, 0] = torch.inf
    torch.manual_seed(1)
    z = fusednorm.add_layer_norm(x, None, 4, drop_path_p=0.25)[1]
    kept = z[:, 1, 1] != 0
    assert 0.6 < kept.float().mean() < 0.9
    assert torch.equal(z[~kept], torch.zeros_like(z[~kept]))  # what is dropped is 0, whatever was there
    torch.testing.assert_close(z[kept], x[kept] / 0.75)
    torch.manual_seed(1)
    assert torch.equal(fusednorm.add_layer_norm(x, None, 4, drop_path_p=0.25)[1], z)


def test_automatic_choice_names_it_and_never_the_reference(without_kernels):
    x, b = torch.randn(4, N), torch.randn(N)
    for function, *args in (
        (fusednorm.layer_norm, x, N),
        (fusednorm.rms_norm, x, N),
        (fusednorm.add_layer_norm, x, x, N),
        (fusednorm.bias_act_dropout, x, b, "gelu", 0.1),
    ):
        said = fusednorm.explain(function, *args)
        assert said.startswith(f"{function.__name__}: torch, torch's own operators"), said


def test_the_reference_serves_what_torch_cannot_without_kernels(without_kernels):
    """To rebuild z from `normed`, which no operator of torch's does."""
    x, weight = torch.randn(4, N), torch.ones(N)
    said = fusednorm.explain(fusednorm.add_layer_norm, x, x, N, weight, memory_efficient=True)
    assert said.startswith("add_layer_norm: reference, one fused op each way") and "torch is not used: " in said
    with fusednorm.use_provider("torch"):
        said = fusednorm.explain(fusednorm.add_layer_norm, x, x, N, weight, memory_efficient=True)
    assert said == "add_layer_norm: torch, torch's own operators"


def test_on_request_z_is_kept_and_that_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(_once, "_said", set())
    x, weight = torch.randn(4, N, requires_grad=True), torch.ones(N)
    with fusednorm.use_provider("torch"), caplog.at_level(logging.WARNING, logger="fusednorm"):
        for _ in range(2):
            normed, _ = fusednorm.add_layer_norm(x, x, N, weight, memory_efficient=True)
    assert normed.grad_fn.name() == "NativeLayerNormBackward0"
    (record,) = [record for record in caplog.records if "memory_efficient" in record.getMessage()]
    assert "torch's own operators were asked for" in record.getMessage()


def test_nested_requests_decide_as_everywhere():
    x = torch.randn(2, N)
    with fusednorm.use_provider("reference"):
        with fusednorm.use_provider("torch"):
            assert fusednorm.explain(fusednorm.layer_norm, x, N).startswith("layer_norm: torch")
        assert fusednorm.explain(fusednorm.layer_norm, x, N).startswith("layer_norm: reference")


# --- FUSEDNORM_PROVIDER ---


def test_the_environment_names_the_provider_of_the_process():
    program = """
import torch, fusednorm
from fusednorm import _once, dispatch
x = torch.randn(4, 8, requires_grad=True)
print(fusednorm.explain(fusednorm.add_layer_norm, x, x, 8).splitlines()[0])
print(fusednorm.add_layer_norm(x, x, 8)[0].grad_fn.name(), fusednorm.bias_act_dropout(x, x[0]).grad_fn.name())
with fusednorm.use_provider("reference"):
    print(dispatch.requested())
print(dispatch.requested(), dispatch.settings.current.fastpath)
"""
    out = python("-c", program, FUSEDNORM_PROVIDER="torch")
    expected = ["add_layer_norm: torch, torch's own operators", "NativeLayerNormBackward0 ReluBackward0"]
    assert out.splitlines() == [*expected, "reference", "torch None"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trition", "FUSEDNORM_PROVIDER: no provider is called 'trition'; did you mean 'triton'?"),
        ("cuda", "provider 'cuda' cannot run add_layer_norm_fwd: "),
        ("triton", "leave FUSEDNORM_PROVIDER=triton out for automatic choice"),
    ],
)
def test_an_unusable_name_in_the_environment_is_named_at_the_first_call(name, said):
    program = """
import torch, fusednorm
print("imported", fusednorm.available_providers()[-1])
for function in (fusednorm.layer_norm, fusednorm.rms_norm):
    try:
        function(torch.randn(4, 8), 8)
    except ValueError as fault:
        print(fault)
"""
    first, *faults = python("-c", program, FUSEDNORM_PROVIDER=name).splitlines()
    assert first == "imported reference" and len(faults) == 2 and all(said in fault for fault in faults), faults


# --- the pure-Python install ---

MISSING = """
import warnings
import torch
from fusednorm.providers.cpu import library as cpu
cpu.LIBRARY = cpu.LIBRARY.with_name("absent.so")
import fusednorm
from fusednorm import _once
x = torch.randn(4, 8)

def left_to_torch_in_any_case():
    fusednorm.available_providers(), fusednorm.layer_norm(x, 8), fusednorm.bias_act_dropout(x, None)
    fusednorm.add_layer_norm(x, None, 8)
    torch.compile(fusednorm.add_layer_norm, backend="eager")(x, x, 8)

def rms_norm(): fusednorm.rms_norm(x, 8)
def add_layer_norm(): fusednorm.add_layer_norm(x, x, 8)
def module(): fusednorm.AddRMSNorm(8, dropout_p=0.5)(x, x)
def activation(): fusednorm.bias_act_dropout(x, x[0])
def dropped(): fusednorm.bias_act_dropout(x, x[0], "gelu", 0.5)
for call in (left_to_torch_in_any_case, rms_norm, add_layer_norm, module, activation, dropped):
    _once._said.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(), call()
    said = [(w.filename == "<string>", w.category.__name__, str(w.message)) for w in caught]
    print(call.__name__, len(said), *said)
"""


def test_a_missing_library_is_told_once_at_the_call_that_it_would_have_served():
    silent, *told = python("-c", MISSING).splitlines()
    assert silent == "left_to_torch_in_any_case 0" and len(told) == 5, (silent, told)
    for line in told:
        assert " 1 (True, 'UserWarning', " in line, line
        assert "python setup.py build_ext --inplace" in line and "FUSEDNORM_PROVIDER=torch" in line


def test_who_asks_for_torch_is_told_nothing():
    said = python("-c", MISSING, FUSEDNORM_PROVIDER="torch").splitlines()
    assert [line.split()[1] for line in said] == ["0"] * 6, said
