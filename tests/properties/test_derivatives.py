"""Derivatives beyond the first, of every operator by every provider, against those of the float64 formula."""

from __future__ import annotations

import pytest
import torch
from operators import Operator, dtype_of
from torch import Tensor
from torch.autograd import forward_ad

# By dtype: a derivative of second order adds some ten products of order one, each a few roundings off.
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}


def wide(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.double() for name, leaf in leaves.items()}


def assert_close(ours, exact, dtype: torch.dtype) -> None:
    torch.testing.assert_close(ours, exact, check_dtype=False, **CLOSE[dtype])


def assert_exact(run, operator: Operator, leaves: dict[str, Tensor], using) -> None:
    """`run` of our function is `run` of the float64 formula, of which no part is zero."""
    with using:
        ours = run(operator.ours, leaves)
    exact = run(operator.exact, wide(leaves))
    assert all(part.any() for part in exact)
    assert_close(ours, exact, dtype_of(leaves))


def weighted(run, leaves, weights: list[Tensor]) -> Tensor:
    """Bent, so that second derivatives by the cotangent's own path count too."""
    return sum((torch.sin(o) * w.to(o)).sum() for o, w in zip(run(leaves), weights, strict=True))


def drawn_like(tensors, generator) -> list[Tensor]:
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]


@pytest.mark.certifies("double backward")
def test_double_backward(operator: Operator, leaves, using, generator):
    """The gradient of a gradient's product with fixed vectors."""
    weights = drawn_like(operator.exact(wide(leaves)), generator)
    vectors = drawn_like(leaves.values(), generator)

    def product(run, leaves):
        given = [leaf.detach().requires_grad_() for leaf in leaves.values()]
        value = weighted(run, dict(zip(leaves, given)), weights)
        first = torch.autograd.grad(value, given, create_graph=True)
        return torch.autograd.grad(sum((g * v.to(g)).sum() for g, v in zip(first, vectors)), given)

    assert_exact(product, operator, leaves, using)


@pytest.mark.certifies("forward-mode", on="formulas")
@pytest.mark.parametrize("by", ["jvp", "dual numbers"])
def test_forward_mode(operator: Operator, by, leaves, no_kernel, using, generator):
    """By torch's elementary operators. A Function without a forward derivative would silently give zeros."""
    vectors = dict(zip(leaves, drawn_like(leaves.values(), generator), strict=True))

    def tangents(run, leaves):
        along = {name: vector.to(leaves[name]) for name, vector in vectors.items()}
        if by == "jvp":
            return torch.func.jvp(run, (leaves,), (along,))[1]
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(leaf, along[name]) for name, leaf in leaves.items()}
            return tuple(forward_ad.unpack_dual(output).tangent.clone() for output in run(duals))

    assert_exact(tangents, operator, leaves, using)


@pytest.mark.certifies("vmap", on="formulas")
def test_vmap_of_the_operator_and_of_its_gradient(operator: Operator, leaves, no_kernel, using, generator):
    """Over all leaves, and over the first alone, by torch's elementary operators."""
    weights = drawn_like(operator.exact(wide(leaves)), generator)

    def results(leaves):
        return operator.ours(leaves), torch.func.grad(lambda t: weighted(operator.ours, t, weights))(leaves)

    def exact(leaves):
        return operator.exact(leaves), torch.func.grad(lambda t: weighted(operator.exact, t, weights))(leaves)

    stacked = {name: torch.stack([leaf + 0.1 * i for i in range(2)]) for name, leaf in leaves.items()}
    first = next(iter(leaves))
    for names in (list(leaves), [first]):
        given = {name: stacked[name] if name in names else leaf for name, leaf in leaves.items()}
        with using:
            ours = torch.vmap(results, in_dims=({name: 0 if name in names else None for name in leaves},))(given)
        for i in range(2):
            alone = wide({name: leaf[i] if name in names else leaf for name, leaf in given.items()})
            outputs, gradients = exact(alone)
            assert_close(tuple(o[i] for o in ours[0]), outputs, dtype_of(leaves))
            assert_close({n: g[i] for n, g in ours[1].items()}, gradients, dtype_of(leaves))
