"""Derivatives of every order and kind: double backward, torch.func, forward-mode AD, checkpointing."""

from __future__ import annotations

import pytest
import torch
from derivatives import assert_gradients, kept_and_recomputed
from oracle import Call
from shapes import FUSED, PLAIN, Shape, inputs, random_leaves
from torch.autograd import forward_ad

import fusednorm

# float64 rounds at 1e-16; each order of derivative divides by the small deviations of tiny rows some 10 to 100 times
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}
THIRD_ORDER = {"rtol": 1e-8, "atol": 1e-8}

BOTH = pytest.mark.parametrize("function", PLAIN + FUSED)
SHAPE = Shape("few_odd", (3, 7))
EVERYTHING = {"dropout_p": 0.3, "drop_path_p": 0.25, "seed": 17}
VARIANTS = {
    "plain": ((), {}),
    "everything": (("x_bias", "layer_scale"), EVERYTHING),
    "memory_efficient": ((), {"memory_efficient": True}),
    "memory_efficient_everything": (("x_bias", "layer_scale"), EVERYTHING | {"memory_efficient": True}),
    "zero_centered": ((), {"zero_centered_weight": True}),
}
CASES = [(function, "plain") for function in PLAIN] + [(f, variant) for f in FUSED for variant in VARIANTS]
EVERY_CASE = pytest.mark.parametrize(("function", "variant"), CASES, ids=["-".join(case) for case in CASES])


def problem(function, variant, device, generator, dtype=torch.float64, shape=SHAPE):
    names, options = VARIANTS[variant]
    leaves = random_leaves(shape, (*inputs(function), *names), dtype, device, generator)
    return Call(function, shape.normalized_ndim, options=options), leaves


def scalar(run, cotangents):
    """leaves -> a number: the outputs weighted by fixed random cotangents, passed through a non-linearity.

    Without it second derivatives by the cotangent's own path would be left out.
    """

    def value(leaves):
        return sum((torch.sin(o) * c).sum() for o, c in zip(run(leaves), cotangents, strict=True))

    return value


def cotangents_of(call, leaves, generator):
    return [torch.randn(o.shape, generator=generator, dtype=o.dtype).to(o) for o in call.eager(leaves)]


@pytest.mark.certifies("backward", "double backward")
@EVERY_CASE
def test_gradcheck_and_gradgradcheck(function, variant, using, device, generator):
    call, leaves = problem(function, variant, device, generator)
    with using:
        assert_gradients(call.ours, leaves, check_undefined_grad=False, second={"fast_mode": True})


def hessian_vector_product(run, leaves, cotangents, vectors):
    fresh = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    first = torch.autograd.grad(scalar(run, cotangents)(fresh), list(fresh.values()), create_graph=True)
    inner = sum((gradient * vector).sum() for gradient, vector in zip(first, vectors.values(), strict=True))
    return torch.autograd.grad(inner, list(fresh.values()))


def gradient(run, leaves, cotangents, vectors):
    return torch.func.grad(scalar(run, cotangents))(leaves)


def jvp(run, leaves, cotangents, vectors):
    """A Function without a forward derivative would give zeros here, silently."""
    outputs, tangents = torch.func.jvp(run, (leaves,), (vectors,))
    assert any(tangent.abs().max() > 0.01 for tangent in tangents)
    return outputs, tangents


def dual_numbers(run, leaves, cotangents, vectors):
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(leaf, vectors[name]) for name, leaf in leaves.items()}
        return [forward_ad.unpack_dual(output).tangent.clone() for output in run(duals)]


def per_sample_gradients(run, leaves, cotangents, vectors):
    value, batch = scalar(run, cotangents), torch.stack([leaves["x"] + i for i in range(3)])
    return torch.vmap(lambda x: torch.func.grad(value)(leaves | {"x": x}))(batch)


@pytest.mark.parametrize(
    "derivative",
    [hessian_vector_product, gradient, jvp, dual_numbers, per_sample_gradients],
    ids=lambda derivative: derivative.__name__,
)
@EVERY_CASE
def test_derivative_is_the_oracles(function, variant, derivative, using, device, generator):
    call, leaves = problem(function, variant, device, generator)
    cotangents = cotangents_of(call, leaves, generator)
    vectors = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t) for n, t in leaves.items()}
    with using:
        ours = derivative(call.ours, leaves, cotangents, vectors)
    exact = derivative(lambda t: call.exact(t, torch.float64), leaves, cotangents, vectors)
    torch.testing.assert_close(ours, exact, **FLOAT64)


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian"])
@BOTH
def test_jacobians_and_the_hessian_by_forward_over_reverse(function, transform, using, device, generator):
    """Of torch.layer_norm itself the Hessian is wrong (pytorch#175754, pytorch#196700)."""
    call, leaves = problem(function, "plain", device, generator, shape=Shape("tiny", (2, 3)))
    cotangents = cotangents_of(call, leaves, generator)

    def derivative(run):
        return getattr(torch.func, transform)(scalar(run, cotangents) if transform == "hessian" else run)(leaves)

    with using:
        ours = derivative(call.ours)
    exact = derivative(lambda t: call.exact(t, torch.float64))
    torch.testing.assert_close(ours, exact, **(THIRD_ORDER if transform == "hessian" else FLOAT64))


@pytest.mark.certifies("vmap", on="formulas")
@BOTH
@pytest.mark.parametrize("batched", ["x", "weight", "everything"])
def test_vmap_is_a_loop(function, batched, using, device, generator):
    call, leaves = problem(function, "plain", device, generator)
    names = list(leaves) if batched == "everything" else [batched]
    size = 4
    stacked = {
        name: torch.stack([leaf + i * 0.1 for i in range(size)]) if name in names else leaf
        for name, leaf in leaves.items()
    }
    in_dims = ({name: 0 if name in names else None for name in leaves},)
    with using:
        ours = torch.vmap(call.ours, in_dims=in_dims)(stacked)
        loop = [call.ours({n: t[i] if n in names else t for n, t in stacked.items()}) for i in range(size)]
    for index, output in enumerate(ours):
        torch.testing.assert_close(output, torch.stack([one[index] for one in loop]), **FLOAT64)


@EVERY_CASE
def test_third_derivative(function, variant, provider, using, device, generator):
    torchs = provider == "torch" or (provider == "automatic" and device == "cpu" and "memory" not in variant)
    if torchs and "rms" not in function:
        pytest.skip("torch.layer_norm serves, whose third derivative is wrong (pytorch#175754)")
    call, leaves = problem(function, variant, device, generator, shape=Shape("tiny", (2, 5)))
    cotangents = cotangents_of(call, leaves, generator)

    def third(run):
        x = leaves["x"].detach().clone().requires_grad_()
        derivative = scalar(run, cotangents)(leaves | {"x": x})
        for _ in range(3):
            (derivative,) = torch.autograd.grad(derivative, x, create_graph=True)
            derivative = (derivative * derivative.detach().cos()).sum()
        return derivative.detach()

    with using:
        ours = third(call.ours)
    torch.testing.assert_close(ours, third(lambda t: call.exact(t, torch.float64)), **THIRD_ORDER)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["keep_z", "keep_normed"])
@pytest.mark.parametrize("function", FUSED)
def test_checkpoint_recomputes_the_same_mask(function, memory_efficient, use_reentrant, using, device):
    """The default seed comes from torch's generator, which checkpointing restores."""
    module = {"add_layer_norm": fusednorm.AddLayerNorm, "add_rms_norm": fusednorm.AddRMSNorm}[function](
        32, dropout_p=0.5, drop_path_p=0.3, memory_efficient=memory_efficient, device=device
    )
    x, residual = (torch.randn(6, 32, device=device, requires_grad=True) for _ in range(2))
    cotangents = [torch.randn(6, 32, device=device) for _ in range(2)]
    with using:
        plain, recomputed = kept_and_recomputed(
            module, (x, residual), cotangents, use_reentrant, [*module.parameters()]
        )
    assert (plain[1] == residual).any()  # something was dropped
    for expected, got in zip(plain, recomputed, strict=True):
        assert torch.equal(expected, got)
