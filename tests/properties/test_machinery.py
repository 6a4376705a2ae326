"""PyTorch's machinery around an operator: torch.compile, autocast, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from operators import OPERATORS, Operator, dtype_of

import fusednorm
from fusednorm import dispatch
from tests.properties.test_layouts import CLOSE, results


@pytest.mark.certifies("compile")
def test_compiled_in_one_graph(operator: Operator, leaves, using):
    """Outputs and gradients are those of the call that is not compiled."""
    torch._dynamo.reset()
    names = list(leaves)

    def run(*given):
        return operator.ours(dict(zip(names, given)))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = []
    with using:
        for function in (compiled, run):
            given = [leaf.detach().requires_grad_() for leaf in leaves.values()]
            outputs = function(*given)
            gradients = torch.autograd.grad(sum(o.sin().sum() for o in outputs), given)
            found.append([*(o.detach() for o in outputs), *gradients])
    torch.testing.assert_close(*found, **CLOSE[dtype_of(leaves)])


@pytest.mark.certifies("autocast")
def test_autocast(operator: Operator, leaves, using, device, generator):
    """The dtype that torch's own function has, or x's; gradients in each leaf's own; values of the float64 formula."""
    low = torch.bfloat16
    given = operator.leaves(torch.float32, device, generator)
    if operator.name.startswith(("add_", "modulation")):  # the branch comes from a product, which autocast made narrow
        given["x"] = given["x"].to(low)
    given = {name: leaf.requires_grad_() for name, leaf in given.items()}
    first = next(iter(given.values()))
    with using, torch.autocast(device, dtype=low):
        outputs = operator.ours(given)
        gradients = torch.autograd.grad(sum(o.float().square().sum() for o in outputs), list(given.values()))
        expected = first.dtype if operator.twin is None else operator.twin(first).dtype
    assert outputs[0].dtype == expected
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in given.values()]
    exact = operator.exact({name: leaf.double() for name, leaf in given.items()})
    wanted = torch.autograd.grad(sum(o.square().sum() for o in exact), list(given.values()))
    # bfloat16 rounds at 2^-9: operands, weights of a softmax and results, of order one; gradients add some ten of them
    torch.testing.assert_close([o.double() for o in outputs], list(exact), rtol=2e-2, atol=2e-2)
    for ours, right in zip(gradients, wanted, strict=True):
        assert (ours.double() - right.double()).abs().max() <= 5e-2 * max(1.0, right.abs().max().item())


@pytest.mark.gpu
@pytest.mark.certifies("CUDA graph")
@pytest.mark.parametrize(
    ("operator", "provider"),
    [
        pytest.param(operator, provider, id=f"{name}-{provider}")
        for name, operator in OPERATORS.items()
        for provider in dispatch.PROVIDERS
        if provider != "cpu" and (name, provider) != ("varlen_attention", "torch")
    ],
)
def test_a_cuda_graph_replays_new_values(operator: Operator, provider, generator):
    """Forward and backward, captured once and replayed on other values, give the bits of the call itself."""
    reason = dispatch.unavailable_reason(provider)
    if reason is not None:
        pytest.skip(f"provider {provider}: {reason}")
    dtype = operator.widest(provider)
    static = operator.leaves(dtype, "cuda", generator)
    fresh = operator.leaves(dtype, "cuda", generator)
    with fusednorm.use_provider(provider):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results(operator, static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results(operator, static)
        for name, leaf in static.items():
            leaf.copy_(fresh[name])
        graph.replay()
        torch.cuda.synchronize()
        expected = results(operator, fresh)
    assert all(map(torch.equal, captured, expected))
