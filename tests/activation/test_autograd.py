"""``bias_act_dropout``'s derivatives of every order and kind, checkpointing, autocast."""

from __future__ import annotations

import pytest
import torch
from derivatives import assert_gradients, gradients_of, kept_and_recomputed, of_every_kind
from oracle_activation import ActivationCall
from shapes import Shape, random_leaves

from fusednorm import bias_act_dropout
from tests.activation.test_activation import ACTIVATION, BOTH, DROPOUT, ODD, values

OP = "bias_act_dropout_fwd"


# --- gradients: which, and of which order ---


@ACTIVATION
def test_each_subset_of_gradients(activation, using, device, generator):
    leaves = random_leaves(ODD, BOTH, torch.float64, device, generator)
    dy = torch.randn(ODD.base, generator=generator, dtype=torch.float64).to(device)
    run = ActivationCall(activation, options={"dropout_p": 0.2, "seed": 11}).ours
    with using:
        both = gradients_of(BOTH, run, leaves, [dy])
        for name in BOTH:
            # float64, whose rounding is 1e-16: alone or with the other, it may be summed in another order
            (alone,) = gradients_of([name], run, leaves, [dy]).values()
            torch.testing.assert_close(alone, both[name], rtol=1e-12, atol=1e-12)


def test_nothing_is_recorded_without_a_gradient(using, device):
    x = torch.ones(3, 8, device=device, requires_grad=True)
    with using:
        with torch.no_grad():
            y = bias_act_dropout(x, x[0], "gelu", 0.1)
        with torch.inference_mode():
            other = bias_act_dropout(x, x[0], "gelu")
    assert not y.requires_grad and not other.requires_grad


def test_a_kernels_function_keeps_its_inputs_only(provider, using, device):
    if provider in ("automatic", "torch"):
        pytest.skip("no Function of ours runs: what torch's own operators keep is torch's affair")
    x = torch.ones(3, 8, device=device, requires_grad=True)
    bias = torch.ones(8, device=device, requires_grad=True)
    kept = []
    with using, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bias_act_dropout(x, bias, "gelu", 0.5, seed=torch.tensor([3], device=device))
    assert [t.data_ptr() for t in kept[:2]] == [x.data_ptr(), bias.data_ptr()]
    assert [t.dtype for t in kept[2:]] == [torch.int64] and kept[2].numel() == 1


def test_one_tensor_as_x_and_bias(using, device, generator):
    given = values(12, generator=generator, device=device, dtype=torch.float64)
    x = given.clone().requires_grad_()
    two = [given.clone().requires_grad_() for _ in range(2)]
    with using:
        (dx,) = torch.autograd.grad(bias_act_dropout(x, x, "silu").sum(), x)
        expected = torch.autograd.grad(bias_act_dropout(*two, "silu").sum(), two)
    torch.testing.assert_close(dx, sum(expected))


# float64 rounds at 1e-16; a derivative adds tens of terms of order one
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


def problem(activation, options, device, generator):
    leaves = random_leaves(Shape("few_odd", (3, 7)), BOTH, torch.float64, device, generator)
    return ActivationCall(activation, options=options), leaves


@pytest.mark.certifies("backward", "double backward")
@DROPOUT
@ACTIVATION
def test_gradcheck_and_gradgradcheck(activation, options, using, device, generator):
    call, leaves = problem(activation, options, device, generator)
    with using:
        assert_gradients(call.ours, leaves)


@DROPOUT
@ACTIVATION
def test_torch_func(activation, options, using, device, generator):
    """grad, jvp, the Hessian by forward over reverse, and gradients of each sample by vmap."""
    call, leaves = problem(activation, options, device, generator)
    vectors = [torch.randn(3, 7, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]
    with using:
        ours = of_every_kind(call.ours, leaves, BOTH, *vectors)
    exact = of_every_kind(lambda t: call.exact(t, torch.float64), leaves, BOTH, *vectors)
    torch.testing.assert_close(ours, exact, **FLOAT64)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpoint_recomputes_the_same_mask(use_reentrant, using, device, generator):
    x, dy = (values(6, 32, generator=generator, device=device) for _ in range(2))
    leaves = x.requires_grad_(), values(32, generator=generator, device=device).requires_grad_()
    with using:
        plain, again = kept_and_recomputed(
            lambda *args: bias_act_dropout(*args, "gelu", 0.5), leaves, [dy], use_reentrant
        )
    assert (plain[0] == 0).any()
    for expected, got in zip(plain, again, strict=True):
        assert torch.equal(expected, got)


# --- autocast ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_alone(dtype, using, device):
    x, bias = torch.ones(3, 8, device=device, dtype=dtype), torch.ones(8, device=device)
    with using, torch.autocast(device, dtype=torch.bfloat16):
        assert bias_act_dropout(x, bias, "gelu").dtype == dtype
