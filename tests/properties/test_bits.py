"""What results depend on: not on the run, the other samples of a batch, or what is not a number elsewhere."""

from __future__ import annotations

import pytest
import torch
from operators import DROPPED, OPERATORS, Operator
from torch import Tensor

import fusednorm
from tests.properties.test_layouts import results

SAMPLES = 5
BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)


def of_samples(operator: Operator, leaves: dict[str, Tensor], which: slice) -> dict[str, Tensor]:
    return {name: leaf[which] if name in operator.rows else leaf for name, leaf in leaves.items()}


@pytest.fixture
def many(operator: Operator, leaves, provider, device, generator) -> dict[str, Tensor]:
    return operator.leaves(operator.widest(provider), device, generator, samples=SAMPLES)


@pytest.fixture
def ours_masks(operator: Operator, provider) -> None:
    """Skips what is promised of attention by our kernels alone."""
    if provider == "torch" and operator.attention:
        pytest.skip("in torch's attention 0 * NaN is NaN: what is masked out may reach results")


@pytest.mark.certifies("deterministic")
def test_two_runs_have_the_same_bits(operator: Operator, many, ordinary_memory, using):
    """Outputs and every gradient, where torch is not told to be deterministic."""
    with using:
        first, second = results(operator, many), results(operator, many)
    assert all(map(torch.equal, first, second))


@pytest.mark.certifies("batch-invariant")
@pytest.mark.parametrize("which", [slice(0, 1), slice(2, 4), slice(4, 5)], ids=["first", "two", "last"])
def test_a_sample_has_the_same_bits_in_any_batch(operator: Operator, which, many, using, provider):
    """Outputs and the gradients of the samples themselves; those of parameters are sums over the batch."""
    if provider == "torch" and operator.attention:
        pytest.skip("torch's attention may divide its work by the batch; fusednorm.batch_invariant() leaves it out")

    def run(leaves: dict[str, Tensor]) -> list[Tensor]:
        given = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        found = operator.ours(given)
        return [*found, *torch.autograd.grad(sum(o.square().sum() for o in found), [given[n] for n in operator.rows])]

    with using:
        whole, part = run(many), run(of_samples(operator, many, which))
    assert len(part) > len(operator.rows)
    assert all(torch.equal(all_samples[which], found) for all_samples, found in zip(whole, part, strict=True))


@BAD
@pytest.mark.certifies("NaN safety")
def test_what_is_no_number_stays_in_its_sample(operator: Operator, bad, many, ours_masks, using):
    """The other samples' outputs and gradients have the bits that they have beside a sample of zeros."""
    others, found = torch.arange(SAMPLES) != 2, []
    for value in (bad, 0.0):
        leaves = {name: leaf.clone() for name, leaf in many.items()}
        for name in operator.rows:
            leaves[name][2] = value
        given = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        with using:
            outputs = operator.ours(given)
            total = sum(o[others].square().sum() for o in outputs)
            gradients = torch.autograd.grad(total, [given[name] for name in operator.rows])
        found.append([t[others] for t in (*outputs, *gradients)])
    for ours, expected in zip(*found, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, expected)


@BAD
@pytest.mark.certifies("NaN safety")
@pytest.mark.parametrize(
    "operator", [o for o in OPERATORS.values() if o.attention or o.dropped], ids=lambda operator: operator.name
)
def test_what_is_dropped_or_masked_reaches_nothing(operator: Operator, bad, many, ours_masks, using):
    """What dropout drops of x, in no result; the last key and value of causal attention, in no earlier query."""
    found = []
    for value in (bad, 0.0):
        given = {name: leaf.clone() for name, leaf in many.items()}
        if operator.attention:
            positions = given["q"].shape.index(5)
            for name in "kv":
                given[name].select(positions, 4).fill_(value)
        else:
            kept = fusednorm.dropout_mask(given["x"].shape, device=given["x"].device, p=0.5, seed=DROPPED["seed"])
            given["x"] = torch.where(kept, given["x"], value)
        given = {name: leaf.requires_grad_() for name, leaf in given.items()}
        with using:
            outputs = (operator.dropped or operator.ours)(given)
            if operator.attention:
                outputs = (outputs[0].narrow(positions, 0, 4),)
            first = next(iter(given))
            results = [*outputs, torch.autograd.grad(sum(o.square().sum() for o in outputs), given[first])[0]]
        found.append([t.narrow(positions, 0, 4) for t in results] if operator.attention else results)
    for ours, expected in zip(*found, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, expected)  # a softmax made again may be summed in another order
