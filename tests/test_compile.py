"""torch.compile: one graph, few compilations, the same results and gradients."""

from __future__ import annotations

import shutil

import pytest
import torch
from shapes import FUSED, PLAIN
from torch._dynamo.testing import CompileCounterWithBackend

import fusednorm
from fusednorm import providers

# A compiler may add in another order: about 100 float32 terms of order one, half an ulp each.
REORDERED = {"rtol": 1e-5, "atol": 1e-5}

BOTH = pytest.mark.parametrize("function", PLAIN + FUSED)
VARIANTS = {
    "plain": {},
    "dropout": {"dropout_p": 0.5, "drop_path_p": 0.5},
    "wider_stream": {"residual_dtype": torch.float64},
    "memory_efficient": {"memory_efficient": True},
}
CASES = [(f, "plain") for f in PLAIN]
CASES += [("add_layer_norm", v) for v in ("plain", "dropout", "memory_efficient")]
CASES += [("add_rms_norm", "wider_stream")]
EVERY_CASE = pytest.mark.parametrize(("function", "variant"), CASES, ids=["-".join(case) for case in CASES])
ROWS = [33, 1, 64, 0, 1000]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def caller(function: str, options: dict):
    public = getattr(fusednorm, function)

    def run(x, residual, weight, seed):
        if function in PLAIN:
            return (public(x, (24,), weight),)
        extra = {"seed": seed} if options.get("dropout_p") else {}
        return public(x, residual, (24,), weight, **options, **extra)

    return run


def with_gradients(run, rows: int, device: str):
    generator = torch.Generator().manual_seed(rows)

    def values(*shape):
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    leaves = (values(rows, 24), values(rows, 24), values(24))
    outputs = run(*leaves, torch.tensor([rows], device=device))
    cotangents = [torch.randn(rows, 24, generator=generator).to(o) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return [output.detach() for output in outputs], gradients


@EVERY_CASE
def test_fullgraph_dynamic_over_row_counts(function, variant, using, device):
    """Results and gradients at every row count; 0 and 1 may be specialised, the rest shares one graph."""
    counter = CompileCounterWithBackend("aot_eager")
    run = caller(function, VARIANTS[variant])
    with using:
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
        # compiled code keeps z whatever memory_efficient says: a look at the weights would break the graph
        run = caller(function, {k: v for k, v in VARIANTS[variant].items() if k != "memory_efficient"})
        with_gradients(compiled, 10, device)
        first = counter.frame_count
        for rows in ROWS[:2] if variant == "dropout" else ROWS:  # the masks make the graph a slow one to trace
            expected, ours = with_gradients(run, rows, device), with_gradients(compiled, rows, device)
            torch.testing.assert_close(ours, expected, **REORDERED)
    again = counter.frame_count - first
    assert again <= 2, f"{again} more compilations for {len(ROWS)} row counts"


@pytest.mark.parametrize("function", ["layer_norm", "add_rms_norm"])
def test_marking_nothing_dynamic_settles_after_two_sizes(function, using, device):
    """dynamic=None, torch.compile's default: the second size generalises, the others reuse it."""
    counter = CompileCounterWithBackend("aot_eager")
    run = caller(function, {})
    with using:
        compiled = torch.compile(run, fullgraph=True, backend=counter)
        with_gradients(compiled, 7, device)
        with_gradients(compiled, 33, device)
        settled = counter.frame_count
        for rows in (64, 100, 5, 48):
            with_gradients(compiled, rows, device)
    assert counter.frame_count == settled


@pytest.mark.parametrize("function", ["layer_norm", "add_layer_norm"])
def test_first_call_of_the_process_may_be_the_compiled_one(function, using, device, monkeypatch):
    """Nothing is left to be imported or looked up while Dynamo traces."""
    monkeypatch.setattr(providers, "_reasons", {})
    for cache in ("_modules", "_serving", "_functions"):
        monkeypatch.setattr(providers, cache, {})
    for name in ("torch", "cpu", "cuda"):  # by the package itself
        providers.get(name)
    with using:
        compiled = torch.compile(caller(function, {}), fullgraph=True, backend="aot_eager")
        with_gradients(compiled, 7, device)


def test_the_chosen_provider_is_guarded():
    """A compiled function called inside another ``use_provider`` block is not served from the old graph."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(caller("add_layer_norm", {}), fullgraph=True, backend=counter)
    with_gradients(compiled, 7, "cpu")
    automatic = counter.frame_count
    with fusednorm.use_provider("reference"):
        with_gradients(compiled, 7, "cpu")
    both = counter.frame_count
    assert both > automatic
    with_gradients(compiled, 7, "cpu")
    assert counter.frame_count == both


@pytest.mark.parametrize("function", FUSED)
def test_default_seed_draws_anew_in_every_compiled_call(function, using, device):
    """A seed drawn while tracing would freeze the mask."""
    public = getattr(fusednorm, function)
    with using:
        compiled = torch.compile(
            lambda x: public(x, None, (64,), dropout_p=0.5)[1], fullgraph=True, backend="aot_eager"
        )
        x = torch.ones(16, 64, device=device)
        first, second = compiled(x), compiled(x)
        torch.manual_seed(9)
        one = compiled(x)
        torch.manual_seed(9)
        other = compiled(x)
    assert not torch.equal(first, second)
    assert torch.equal(one, other)
    assert 0.3 < (first != 0).float().mean() < 0.7


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm"])
def test_compiled_module_trains_like_the_eager_one(kind, using, device):
    torch.manual_seed(0)
    module = getattr(fusednorm, kind)(24, device=device)
    x = torch.randn(5, 24, device=device)

    def step(run):
        module.zero_grad()
        outputs = run(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        (outputs[0].sin().sum() + outputs[-1].cos().sum()).backward()
        return [p.grad.clone() for p in module.parameters()]

    with using:
        expected = step(module)
        ours = step(torch.compile(module, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(ours, expected, **REORDERED)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler for inductor")
def test_inductor_smoke():
    """Both routes in one graph: torch's own operators, and the op that inductor must not look into."""

    def run(x, residual, weight, seed):
        normed, z = fusednorm.add_layer_norm(x, residual, (24,), weight, layer_scale=weight)
        return fusednorm.add_rms_norm(normed, z, (24,), weight, memory_efficient=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for rows in (4, 9):
        ours, expected = with_gradients(compiled, rows, "cpu"), with_gradients(run, rows, "cpu")
        torch.testing.assert_close(ours, expected, **REORDERED)
