"""Dropout with p = 1: nothing is kept, nothing leaks, and every gradient of what was dropped is zero."""

from __future__ import annotations

import pytest
import torch
from oracle_activation import ACTIVATIONS

import fusednorm

INF = float("inf")


def poisoned(*shape: int, device: str) -> torch.Tensor:
    """Values among which NaN and Inf are: none may reach a result."""
    x = torch.randn(shape, device=device)
    x.view(-1)[:3] = torch.tensor([float("nan"), INF, -INF])
    return x.requires_grad_()


def assert_zero(*tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        assert tensor is not None and torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize("name", ["dropout_p", "drop_path_p"])
@pytest.mark.parametrize("function", ["add_layer_norm", "add_rms_norm"])
def test_the_branch_of_a_residual_norm(function, name, using, device):
    residual = torch.randn(3, 8, device=device, requires_grad=True)
    branch = [poisoned(3, 8, device=device), poisoned(8, device=device), poisoned(8, device=device)]
    weight = torch.rand(8, device=device)
    parts = {"x_bias": branch[1], "layer_scale": branch[2], name: 1.0}
    with using:
        normed, z = getattr(fusednorm, function)(branch[0], residual, 8, weight, **parts)
        gradients = torch.autograd.grad((normed * torch.randn_like(normed)).sum(), (residual, *branch))
        bare = getattr(fusednorm, function)(torch.zeros_like(residual), residual, 8, weight)[0]
    assert torch.equal(z, residual)
    assert torch.equal(normed, bare)
    assert gradients[0].abs().max() > 0.0
    assert_zero(*gradients[1:])


@pytest.mark.parametrize("function", ["add_layer_norm", "add_rms_norm"])
def test_the_first_layer_of_a_stream(function, using, device):
    x = poisoned(3, 8, device=device)
    with using:
        normed, z = getattr(fusednorm, function)(x, None, 8, dropout_p=1)
    assert_zero(normed, z)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation(activation, using, device):
    x, bias = poisoned(3, 8, device=device), poisoned(8, device=device)
    with using:
        y = fusednorm.bias_act_dropout(x, bias, activation, 1.0)
        gradients = torch.autograd.grad(y, (x, bias), torch.randn_like(y))
    assert_zero(y, *gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_activation_keeps_the_dtype_of_x(dtype, using, device):
    x, bias = torch.ones(2, 4, device=device, dtype=dtype), torch.ones(4, device=device)
    with using:
        y = fusednorm.bias_act_dropout(x, bias, "relu", 1)
    assert y.dtype == dtype


def test_attention(using, device):
    q, k, v = (poisoned(1, 2, 5, 8, device=device) for _ in range(3))
    with using:
        out = fusednorm.scaled_dot_product_attention(q, k, v, dropout_p=1.0)
        gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert_zero(out, *gradients)


def test_the_log_sum_exp_of_attention_is_that_before_dropout(using, device):
    q, k, v = (torch.randn(1, 2, 5, 8, device=device, requires_grad=True) for _ in range(3))
    with using:
        out, lse = fusednorm.scaled_dot_product_attention(q, k, v, dropout_p=1.0, return_lse=True)
        expected = fusednorm.scaled_dot_product_attention(q, k, v, return_lse=True)[1]
        dlse = torch.randn_like(lse)
        got = torch.autograd.grad((out.sum() + (lse * dlse).sum()), (q, k))
        wanted = torch.autograd.grad((expected * dlse).sum(), (q, k))
    assert_zero(out)
    assert torch.equal(lse, expected)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_packed_attention(using, device):
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    q = poisoned(5, 2, 8, device=device)
    with using:
        out = fusednorm.varlen_attention(q, q, q, bounds, bounds, 3, 3, 1.0)
    assert_zero(out, torch.autograd.grad(out, q, torch.randn_like(out))[0])


def test_dropout_mask_keeps_nothing(device):
    mask = fusednorm.dropout_mask((3, 8), 1.0, 1, device)
    assert mask.dtype == torch.bool and mask.shape == (3, 8) and not mask.any()


@pytest.mark.parametrize("mode", ["torch.func", "compiled"])
def test_under_a_transform_and_compiled(mode):
    x, residual = torch.randn(3, 8), torch.randn(3, 8)

    def loss(x, residual):
        return fusednorm.add_layer_norm(x, residual, 8, dropout_p=1.0)[1].square().sum()

    if mode == "torch.func":
        dx, dresidual = torch.func.grad(loss, argnums=(0, 1))(x, residual)
    else:
        x.requires_grad_(), residual.requires_grad_()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        dx, dresidual = torch.autograd.grad(compiled(x, residual), (x, residual))
    assert_zero(dx)
    torch.testing.assert_close(dresidual, 2.0 * residual.detach())


def test_a_module_keeps_the_residual():
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(fusednorm.AddLayerNorm(16, dropout_p=1.0)(x, x)[1], x)


def test_explain_says_so():
    x = torch.randn(1, 2, 5, 8)
    for function, *args in (
        (fusednorm.bias_act_dropout, x, None, "relu", 1.0),
        (fusednorm.scaled_dot_product_attention, x, x, x, None, 1.0),
    ):
        said = fusednorm.explain(function, *args)
        assert said == f"{function.__name__}: torch, zeros, because everything is dropped"
