"""torch.compile: one graph, few compilations, the same results and gradients."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch
from shapes import FUSED, PLAIN
from torch._dynamo.testing import CompileCounterWithBackend

import fusednorm
from fusednorm import _autocast, dispatch
from tests.helpers.dispatching import unavailable

# A compiler may add in another order: about 100 float32 terms of order one, half an ulp each.
REORDERED = {"rtol": 1e-5, "atol": 1e-5}

BOTH = pytest.mark.parametrize("function", PLAIN + FUSED)
VARIANTS = {
    "plain": {},
    "dropout": {"dropout_p": 0.5, "drop_path_p": 0.5},
    "wider_stream": {"residual_dtype": torch.float64},
    "memory_efficient": {"memory_efficient": True},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu_dropout": {"activation": "relu", "dropout_p": 0.5},
}
CASES = [(f, "plain") for f in PLAIN]
CASES += [("add_layer_norm", v) for v in ("plain", "dropout", "memory_efficient")]
CASES += [("add_rms_norm", "wider_stream"), ("bias_act_dropout", "gelu_tanh"), ("bias_act_dropout", "relu_dropout")]
EVERY_CASE = pytest.mark.parametrize(("function", "variant"), CASES, ids=["-".join(case) for case in CASES])
ROWS = [33, 1, 64, 0, 1000]
# Providers' graphs differ by a name in an op; automatic choice has torch's own operators in its graphs too.
BY_TWO_PROVIDERS = pytest.mark.quick_on("automatic", "reference")


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
        if function == "bias_act_dropout":
            return (public(x, weight, **options, **extra),)
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


@pytest.mark.certifies("compile")
@BY_TWO_PROVIDERS
@EVERY_CASE
def test_fullgraph_dynamic_over_row_counts(function, variant, provider, using, device):
    """Results and gradients at every row count; 0 and 1 may be specialised, the rest shares one graph.

    Graphs of automatic choice and of torch's operators go through AOTAutograd, and one of each function by every other
    provider. The rest is no other graph for it: an op for each direction, and a name among their arguments.
    """
    aot = provider in ("automatic", "torch") or variant in ("dropout", "relu_dropout")
    counter = CompileCounterWithBackend("aot_eager" if aot else "eager")
    run = caller(function, VARIANTS[variant])
    with using:
        compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
        # compiled code keeps z whatever memory_efficient says: a look at the weights would break the graph
        run = caller(function, {k: v for k, v in VARIANTS[variant].items() if k != "memory_efficient"})
        with_gradients(compiled, 10, device)
        first = counter.frame_count
        for rows in ROWS[:2] if "dropout" in variant else ROWS:  # the masks make the graph a slow one to trace
            expected, ours = with_gradients(run, rows, device), with_gradients(compiled, rows, device)
            torch.testing.assert_close(ours, expected, **REORDERED)
    again = counter.frame_count - first
    assert again <= 2, f"{again} more compilations for {len(ROWS)} row counts"
    if not aot:
        op = "bias_act_dropout" if function == "bias_act_dropout" else "add_layer_norm"
        found = [(str(node.target), node.args[-1]) for node in ops_of(counter.graphs[0])]
        assert found == [(f"fusednorm.{op}_fwd", provider), (f"fusednorm.{op}_bwd", provider)]


def ops_of(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The calls of the package's ops, those in the parts of an autograd Function too."""
    parts = [part.graph for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    return [node for part in parts for node in part.nodes if str(node.target).startswith("fusednorm.")]


@BY_TWO_PROVIDERS
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


@pytest.mark.quick_on("automatic", "cpu")
@pytest.mark.parametrize("function", ["layer_norm", "add_layer_norm"])
def test_first_call_of_the_process_may_be_the_compiled_one(function, using, device, monkeypatch):
    """Nothing is left to be imported or looked up while Dynamo traces."""
    monkeypatch.setattr(dispatch.registry, "_reasons", {})
    for cache in ("_modules", "_serving", "functions"):
        monkeypatch.setattr(dispatch.registry, cache, {})
    for name in ("torch", "cpu", "cuda"):  # by the package itself
        dispatch.get(name)
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


@BY_TWO_PROVIDERS
@pytest.mark.parametrize("function", [*FUSED, "bias_act_dropout"])
def test_default_seed_draws_anew_in_every_compiled_call(function, using, device):
    """A seed drawn while tracing would freeze the mask."""
    public = getattr(fusednorm, function)

    def drop(x):
        return public(x, None, (64,), dropout_p=0.5)[1] if function in FUSED else public(x, None, dropout_p=0.5)

    with using:
        compiled = torch.compile(drop, fullgraph=True, backend="aot_eager")
        x = torch.ones(16, 64, device=device)
        first, second = compiled(x), compiled(x)
        torch.manual_seed(9)
        one = compiled(x)
        torch.manual_seed(9)
        other = compiled(x)
    assert not torch.equal(first, second)
    assert torch.equal(one, other)
    assert 0.3 < (first != 0).float().mean() < 0.7


@BY_TWO_PROVIDERS
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


def _layer(kind):
    options = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "dropout": 0.1, "batch_first": True}
    return getattr(fusednorm, kind)(**options)


def _attention(x, **options):
    q = x.unflatten(-1, (2, 8)).transpose(1, 2)
    return fusednorm.scaled_dot_product_attention(q, q, q, **options)


ONE_GRAPH = {
    "TransformerEncoderLayer": lambda: _layer("TransformerEncoderLayer"),
    "TransformerDecoderLayer": lambda: (lambda layer: lambda x: layer(x, x))(_layer("TransformerDecoderLayer")),
    "add_layer_norm": lambda: lambda x: fusednorm.add_layer_norm(x, x, 16, dropout_p=0.1),
    "add_rms_norm": lambda: lambda x: fusednorm.add_rms_norm(x, x, 16, drop_path_p=0.1),
    "bias_act_dropout": lambda: lambda x: fusednorm.bias_act_dropout(x, None, "gelu", 0.1),
    "dropout_mask": lambda: lambda x: x * fusednorm.dropout_mask(x.shape, 0.1, 5),
    "MultiheadAttention_with_weights": lambda: (lambda module: lambda x: module(x, x, x, need_weights=True))(
        fusednorm.MultiheadAttention(16, 2, 0.1, batch_first=True)
    ),
    "attention_with_dropout": lambda: lambda x: _attention(x, dropout_p=0.1),
    "attention_with_window": lambda: lambda x: _attention(x, window=(2, 0), softcap=3.0, return_lse=True),
}


# Of the cases without the library those that differ most: layers, a mask of bits, attention that it would have served.
PURE = ("TransformerEncoderLayer", "dropout_mask", "attention_with_dropout")
CASES_OF_A_LIBRARY = [("native", case) for case in ONE_GRAPH] + [
    pytest.param("pure_python", case, marks=[] if case in PURE else [pytest.mark.slow]) for case in ONE_GRAPH
]


@pytest.mark.parametrize(("library", "case"), CASES_OF_A_LIBRARY)
def test_one_graph(case, library):
    """As torch.nn's own layers: a number read from a tensor, or a look at a device, would break the graph."""
    if library == "native" and dispatch.unavailable_reason("cpu") is not None:
        pytest.skip("the native library is not built")
    with unavailable("cpu") if library == "pure_python" else contextlib.nullcontext():
        explained = torch._dynamo.explain(ONE_GRAPH[case]())(torch.randn(2, 5, 16))
    reasons = [str(b.reason).splitlines()[0] for b in explained.break_reasons]
    assert (explained.graph_count, reasons) == (1, [])


@pytest.mark.parametrize("bias", [False, True])
def test_encoder_layer_trains_compiled(bias):
    torch.manual_seed(0)
    layer = fusednorm.TransformerEncoderLayer(16, 2, 32, 0.5, batch_first=True, bias=bias)
    x, dout = torch.randn(2, 2, 5, 16)  # what is summed after a norm would have gradients near 0
    x.requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)

    def gradients(run):
        torch.manual_seed(3)
        return torch.autograd.grad(run(x), [x, *layer.parameters()], dout)

    # the same operators; where the graph adds in another order, sums of ten rows differ by a few roundings
    torch.testing.assert_close(gradients(compiled), gradients(layer), rtol=1e-5, atol=1e-6)
    assert not torch.equal(compiled(x), compiled(x))
    layer.eval()
    torch.testing.assert_close(compiled(x), layer(x))


def test_attention_weights_are_collected_in_a_compiled_function():
    module = fusednorm.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)

    def collect(x):
        with fusednorm.attention_weights(module) as kept:
            out = module(x, x, x, need_weights=False)[0]
        return out, kept[""]

    compiled = torch.compile(collect, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        out, kept = compiled(x)
        expected = module(x, x, x, average_attn_weights=False)
        assert len(kept) == 1
        torch.testing.assert_close((out, kept[0]), expected)
    assert not module._kept_weights
    assert len(collect(x)[1]) == 1


@pytest.mark.parametrize("function", PLAIN)
def test_autocast_gives_the_dtype_of_eager_without_a_warning(function):
    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return getattr(fusednorm, function)(x, (24,))

    _autocast._ask_torch.cache_clear()  # as in a new process
    x = torch.randn(4, 24)
    compiled = torch.compile(run, fullgraph=True, backend="eager")(x)
    assert compiled.dtype is run(x).dtype
