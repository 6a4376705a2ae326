"""``bias_act_dropout`` over the provider table: against float64, masks, the edges of the range, choice, errors."""

from __future__ import annotations

import math
import re
import types

import pytest
import torch
from oracle import DTYPES, check
from oracle_activation import ACTIVATIONS, TORCHS, ActivationCall, hold_to_torch_at_huge_values
from shapes import COTANGENTS, EMPTY_SHAPES, SHAPES, Shape, random_leaves

import fusednorm
from fusednorm import bias_act_dropout, dispatch, dropout_mask
from tests.helpers.dispatching import plant, unavailable

OP = "bias_act_dropout_fwd"

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
DROPOUT = pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 2**63 + 5}], ids=["bare", "dropout"])
LAYOUTS = [shape for shape in SHAPES if shape.normalized_ndim == 1 and not shape.name.startswith("wide_row")]
WIDE = next(shape for shape in SHAPES if shape.name.startswith("wide_row"))
EMPTY = [shape for shape in EMPTY_SHAPES if shape.normalized_ndim == 1]
ODD = Shape("odd_width_masked_lanes", (9, 37))
BOTH = ("x", "bias")


def values(*shape: int, generator: torch.Generator, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.certifies("forward", "backward")
@DTYPE
@DROPOUT
@pytest.mark.parametrize("names", [BOTH, ("x",)], ids=["bias", "no_bias"])
@ACTIVATION
def test_every_activation(activation, names, options, dtype, using, device, generator):
    leaves = random_leaves(ODD, names, dtype, device, generator)
    with using:
        check(ActivationCall(activation, options=options), leaves, generator)


@pytest.mark.certifies("forward", "backward", "strided", "empty")
@DTYPE
@DROPOUT
@pytest.mark.parametrize("shape", LAYOUTS + EMPTY, ids=str)
def test_every_layout(shape, options, dtype, using, device, interpreted, generator):
    """Masks are by logical position, whatever the strides; a bias over no rows has a gradient of zeros."""
    shape = shape.narrowed(interpreted)
    leaves = random_leaves(shape, BOTH, dtype, device, generator)
    with using:
        check(ActivationCall("gelu", shape.view, options), leaves, generator)


@DROPOUT
def test_a_wide_row(options, using, device, interpreted, generator):
    """In one dtype: its mask takes torch and the oracle a second each."""
    shape = WIDE.narrowed(interpreted)
    leaves = random_leaves(shape, BOTH, torch.bfloat16, device, generator)
    with using:
        check(ActivationCall("silu", shape.view, options), leaves, generator)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@DTYPE
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
def test_every_mixture_of_dtypes(activation, dtype, bias_dtype, using, device, generator):
    options = {"dropout_p": 0.2, "seed": -1}
    leaves = random_leaves(ODD, BOTH, dtype, device, generator, {"bias": bias_dtype})
    with using:
        check(ActivationCall(activation, options=options), leaves, generator)
        y = bias_act_dropout(leaves["x"], leaves["bias"], activation)
    assert y.dtype == dtype


@pytest.mark.parametrize("layout", ["expanded", "transposed", "step_2"])
@ACTIVATION
def test_strided_cotangents(activation, layout, using, device, generator):
    leaves = random_leaves(Shape("", (6, 24)), BOTH, torch.float32, device, generator)
    call = ActivationCall(activation, options={"dropout_p": 0.3, "seed": 5})
    with using:
        check(call, leaves, generator, lay=COTANGENTS[layout])


# --- the mask ---


@pytest.mark.parametrize("shape", [(1, 1), (9, 3), (5, 64), (2, 3, 65), (130,)], ids=str)
def test_the_mask_is_dropout_mask(shape, using, device, dtype=torch.float32):
    x = torch.ones(shape, device=device, dtype=dtype, requires_grad=True)
    with using:
        y = bias_act_dropout(x, None, "relu", 0.4, seed=-3)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    mask = dropout_mask(shape, 0.4, -3, device)
    scale = torch.tensor(1 / 0.6, device=device)
    for result in (y, dx):
        assert torch.equal(result, (mask * scale).to(dtype))


@pytest.mark.certifies("NaN safety")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "create_graph"])
@ACTIVATION
def test_what_is_dropped_does_not_contribute(activation, create_graph, bad, using, device, generator):
    """NaN and Inf there, in x and in the cotangent: zeros, and no trace in the bias' gradient."""
    mask = dropout_mask((7, 12), 0.5, 4, device)
    x, dy = (values(7, 12, generator=generator, device=device) for _ in range(2))
    bias = values(12, generator=generator, device=device)
    results = []
    with using:
        for at_dropped in (bad, 0.0):
            leaves = [torch.where(mask, x, at_dropped).requires_grad_(), bias.clone().requires_grad_()]
            y = bias_act_dropout(*leaves, activation, 0.5, seed=4)
            cotangent = torch.where(mask, dy, at_dropped)
            gradients = torch.autograd.grad(y, leaves, cotangent, create_graph=create_graph)
            assert not y[~mask].any() and not gradients[0][~mask].any()
            results.append([y.detach(), *(g.detach() for g in gradients)])
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


# --- values at the edge of their range ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@ACTIVATION
def test_infinite_and_huge_values_are_finite_where_torchs_are(activation, dtype, using, device):
    with using:
        hold_to_torch_at_huge_values(activation, (math.inf, 1e38, 1e20, 3e4, 200.0, 90.0, 0.0), dtype, device)


@ACTIVATION
def test_nan_is_passed_on(activation, using, device):
    x = torch.tensor([float("nan"), 1.0], device=device)
    with using:
        y = bias_act_dropout(x, x, activation)
    assert y.isnan().tolist() == [True, False]


def test_relus_gradient_at_zero_is_zero(using, device):
    x = torch.tensor([0.0, -0.0, 1.0, -1.0], device=device, requires_grad=True)
    with using:
        (dx,) = torch.autograd.grad(bias_act_dropout(x, None), x, torch.full((4,), 3.0, device=device))
    assert dx.tolist() == [0.0, 0.0, 3.0, 0.0]


# --- who serves a call ---


def test_explain(provider, using, device):
    with using:
        said = fusednorm.explain(bias_act_dropout, torch.randn(3, 8, device=device), None, "silu", 0.1)
    served = re.match(r"bias_act_dropout: (\w+), (.+)", said)
    assert served is not None, said
    if provider != "automatic":
        assert served[1] == provider and ("torch's own" if provider == "torch" else "fused") in served[2]
    elif device == "cpu" and dispatch.unavailable_reason("cpu") is not None:
        assert served[1] == "torch" and "torch's own operators" in served[2]


def test_automatic_choice_without_the_native_library_is_torchs_result_to_the_last_bit(generator):
    x, bias = torch.randn(5, 33, generator=generator), torch.randn(33, generator=generator)
    with unavailable("cpu"):
        for activation, function in TORCHS.items():
            assert torch.equal(bias_act_dropout(x, bias, activation), function(x + bias))
            assert torch.equal(bias_act_dropout(x, None, activation), function(x))
            with dispatch.recording():  # the way that a call goes which is looked at
                assert torch.equal(bias_act_dropout(x, bias, activation), function(x + bias))


def test_a_provider_without_the_op_says_so(monkeypatch):
    """One that has the norms only: asked for by name it refuses, else it is passed over."""
    module = types.ModuleType("fusednorm_test_norms_only")
    module.unavailable_reason, module.refusal = (lambda: None), (lambda op, *args: None)
    module.add_layer_norm_fwd = lambda *args: None
    plant(monkeypatch, "norms", module)
    x = torch.ones(2, 4)
    with fusednorm.use_provider("norms"), pytest.raises(ValueError, match=r"'norms'.*it has no bias_act_dropout"):
        bias_act_dropout(x, None)
    assert "norms is not used: it has no bias_act_dropout" in fusednorm.explain(bias_act_dropout, x, None)
    assert torch.equal(
        bias_act_dropout(x, None, dropout_p=0.1, seed=1), bias_act_dropout(x, None, dropout_p=0.1, seed=1)
    )


# --- errors ---

X, BIAS, ALIGNED = torch.ones(4, 6), torch.ones(6), torch.ones(3, 64)
ERRORS = {
    "activation": (ValueError, (X, BIAS, "swish"), f"activation.*{', '.join(map(repr, TORCHS))}.*'swish'"),
    "activation_near": (ValueError, (X, BIAS, "gelu-tanh"), r"activation.*'gelu-tanh'; did you mean 'gelu_tanh'\?"),
    "activation_type": (ValueError, (X, BIAS, torch.relu), r"activation.*'relu'.*built-in method relu"),
    "bias_shape": (ValueError, (X, torch.ones(4)), r"bias.*\(6,\).*\(4,\).*reshape"),
    "bias_broadcasts": (ValueError, (X, torch.ones(1)), r"bias.*\(6,\).*\(1,\)"),
    "bias_is_a_matrix": (ValueError, (X, X), r"bias.*\(6,\).*\(4, 6\)"),
    "bias_dtype": (TypeError, (X, BIAS.int()), r"bias.*float32.*torch.int32"),
    "bias_device": (ValueError, (X, BIAS.to("meta")), r"bias.*meta.*cpu.*\.to\(device\)"),
    "bias_type": (TypeError, (X, 1.0), r"bias.*float"),
    "probability": (ValueError, (X, BIAS, "relu", 1.5), r"dropout_p.*\[0, 1\].*1\.5"),
    "probability_type": (TypeError, (X, BIAS, "relu", "a lot"), r"dropout_p.*str"),
    "x_integer": (TypeError, (X.int(), None), r"x.*float32.*torch.int32.*convert"),
    "x_integer_with_bias": (TypeError, (X.int(), BIAS), r"x.*float32.*torch.int32"),
    "x_0d": (ValueError, (torch.tensor(1.0), None), r"x.*one dimension.*\(1,\)"),
    "x_nested": (TypeError, (torch.nested.nested_tensor([X], layout=torch.jagged), None), r"x.*nested.*padded"),
    "x_sparse": (TypeError, (X.to_sparse(), None), r"x.*sparse.*to_dense"),
    "x_type": (TypeError, ([1.0], None), r"x.*list"),
    # rows of whole vectors, which the native library takes by a shorter way
    "aligned_bias_is_a_matrix": (ValueError, (ALIGNED, torch.ones(1, 64)), "bias"),
    "aligned_bias_short": (ValueError, (ALIGNED, torch.ones(63)), "bias"),
    "aligned_bias_integer": (TypeError, (ALIGNED, torch.ones(64).int()), "bias"),
    "aligned_bias_meta": (ValueError, (ALIGNED, torch.ones(64, device="meta")), "bias"),
    "aligned_x_integer": (TypeError, (ALIGNED.int(), torch.ones(64)), "x"),
    "aligned_x_sparse": (TypeError, (ALIGNED.to_sparse(), torch.ones(64)), "x"),
    "x_0d_with_bias": (ValueError, (torch.ones(()), torch.ones(1)), "x"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_names_argument_value_and_remedy(case, using):
    error, args, said = ERRORS[case]
    with using, pytest.raises(error, match=said):
        bias_act_dropout(*args)


@pytest.mark.parametrize("seed", [1.5, torch.ones(1), torch.ones(2, dtype=torch.int64)], ids=["float", "dtype", "two"])
def test_seed_of_another_kind(seed, using):
    with using, pytest.raises(TypeError, match=r"seed.*one-element int64"):
        bias_act_dropout(X, BIAS, dropout_p=0.5, seed=seed)
