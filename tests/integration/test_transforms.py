"""Derivatives of every order and kind: double backward, torch.func, forward-mode AD, checkpointing."""

from __future__ import annotations

import pytest
import torch
from oracle import Call
from shapes import FUSED, PLAIN, Shape, inputs, random_leaves
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

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


@EVERY_CASE
def test_gradcheck_and_gradgradcheck(function, variant, using, device, generator):
    call, leaves = problem(function, variant, device, generator)
    names = list(leaves)

    def run(*values):
        return call.ours(dict(zip(names, values, strict=True)))

    values = tuple(leaf.requires_grad_() for leaf in leaves.values())
    with using:
        assert torch.autograd.gradcheck(run, values, check_undefined_grad=False)
        assert torch.autograd.gradgradcheck(run, values, check_undefined_grad=False, fast_mode=True)


@EVERY_CASE
def test_hessian_vector_product_is_the_oracles(function, variant, using, device, generator):
    call, leaves = problem(function, variant, device, generator)
    cotangents = cotangents_of(call, leaves, generator)
    vectors = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves.values()]
    vectors = [vector.to(device) for vector in vectors]

    def products(run):
        fresh = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        first = torch.autograd.grad(scalar(run, cotangents)(fresh), list(fresh.values()), create_graph=True)
        inner = sum((gradient * vector).sum() for gradient, vector in zip(first, vectors, strict=True))
        return torch.autograd.grad(inner, list(fresh.values()))

    with using:
        ours = products(call.ours)
    for got, expected in zip(ours, products(lambda t: call.exact(t, torch.float64)), strict=True):
        torch.testing.assert_close(got, expected, **FLOAT64)


@EVERY_CASE
def test_torch_func_grad_is_the_oracles(function, variant, using, device, generator):
    call, leaves = problem(function, variant, device, generator)
    cotangents = cotangents_of(call, leaves, generator)
    with using:
        ours = torch.func.grad(scalar(call.ours, cotangents))(leaves)
    exact = torch.func.grad(scalar(lambda t: call.exact(t, torch.float64), cotangents))(leaves)
    torch.testing.assert_close(ours, exact, **FLOAT64)


@EVERY_CASE
def test_jvp_is_the_oracles(function, variant, using, device, generator):
    """A Function without a forward derivative would give zeros here, silently."""
    call, leaves = problem(function, variant, device, generator)
    tangents = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t) for n, t in leaves.items()}
    with using:
        ours = torch.func.jvp(call.ours, (leaves,), (tangents,))
    exact = torch.func.jvp(lambda t: call.exact(t, torch.float64), (leaves,), (tangents,))
    torch.testing.assert_close(ours, exact, **FLOAT64)
    assert any(tangent.abs().max() > 0.01 for tangent in ours[1])


@EVERY_CASE
def test_forward_mode_dual_numbers(function, variant, using, device, generator):
    call, leaves = problem(function, variant, device, generator)
    tangents = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t) for n, t in leaves.items()}

    def run(function):
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(leaf, tangents[name]) for name, leaf in leaves.items()}
            return [forward_ad.unpack_dual(output).tangent.clone() for output in function(duals)]

    with using:
        ours = run(call.ours)
    torch.testing.assert_close(ours, run(lambda t: call.exact(t, torch.float64)), **FLOAT64)


@BOTH
def test_hessian_by_forward_over_reverse(function, using, device, generator):
    """torch.layer_norm itself is wrong here (pytorch#175754, pytorch#196700)."""
    call, leaves = problem(function, "plain", device, generator, shape=Shape("tiny", (2, 3)))
    cotangents = cotangents_of(call, leaves, generator)
    with using:
        ours = torch.func.hessian(scalar(call.ours, cotangents))(leaves)
    exact = torch.func.hessian(scalar(lambda t: call.exact(t, torch.float64), cotangents))(leaves)
    torch.testing.assert_close(ours, exact, **THIRD_ORDER)


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
def test_per_sample_gradients_by_vmap_of_grad(function, variant, using, device, generator):
    call, leaves = problem(function, variant, device, generator)
    cotangents = cotangents_of(call, leaves, generator)
    batch = torch.stack([leaves["x"] + i for i in range(3)])

    def per_sample(run):
        value = scalar(run, cotangents)
        return torch.vmap(lambda x: torch.func.grad(value)(leaves | {"x": x}))(batch)

    with using:
        ours = per_sample(call.ours)
    exact = per_sample(lambda t: call.exact(t, torch.float64))
    torch.testing.assert_close(ours, exact, **FLOAT64)


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd"])
@BOTH
def test_jacobians(function, transform, using, device, generator):
    call, leaves = problem(function, "plain", device, generator, shape=Shape("tiny", (2, 3)))
    jacobian = getattr(torch.func, transform)
    with using:
        ours = jacobian(call.ours)(leaves)
    exact = jacobian(lambda t: call.exact(t, torch.float64))(leaves)
    torch.testing.assert_close(ours, exact, **FLOAT64)


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
    x = torch.randn(6, 32, device=device, requires_grad=True)
    residual = torch.randn(6, 32, device=device, requires_grad=True)
    cotangents = [torch.randn(6, 32, device=device) for _ in range(2)]
    leaves = (x, residual, *module.parameters())

    def run(with_checkpoint: bool):
        torch.manual_seed(3)
        wrapped = (lambda *a: checkpoint(module, *a, use_reentrant=use_reentrant)) if with_checkpoint else module
        outputs = wrapped(x, residual)
        torch.rand(5, device=device)  # the generator moves on between forward and backward
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(outputs, cotangents)
        return [output.detach() for output in outputs], [leaf.grad.clone() for leaf in leaves]

    with using:
        plain, recomputed = run(False), run(True)
    assert (plain[0][1] == residual).any()  # something was dropped
    for expected, got in zip(plain[0] + plain[1], recomputed[0] + recomputed[1], strict=True):
        assert torch.equal(expected, got)


def test_backward_twice_with_retain_graph(using, device, generator):
    call, leaves = problem("add_layer_norm", "everything", device, generator)
    fresh = [leaf.requires_grad_() for leaf in leaves.values()]
    with using:
        outputs = call.ours(leaves)
        cotangents = [torch.randn_like(output) for output in outputs]
        first = torch.autograd.grad(outputs, fresh, cotangents, retain_graph=True)
        second = torch.autograd.grad(outputs, fresh, cotangents)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
