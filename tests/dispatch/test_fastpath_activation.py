"""The fast path's bias_act_dropout gives the bits of the long way, and takes no call that needs that way."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle_activation import ACTIVATIONS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import dispatch
from fusednorm.dispatch import fastpath

_missing = fastpath.load()[1]
pytestmark = pytest.mark.skipif(bool(_missing), reason=f"no fast path: {_missing}")

DROPOUT = pytest.mark.parametrize(
    "options",
    [{}, {"dropout_p": 0.3, "seed": -7}, {"dropout_p": 0.5, "seed": 2**64 + 3}],
    ids=["bare", "dropout", "half"],
)
NODE = "FusedBiasActBackward"


@pytest.fixture
def native():
    with fusednorm.use_provider("cpu"):
        yield


def leaves_of(shape=(6, 33), dtype=torch.float32, of_bias=None, bias=True):
    x = torch.randn(shape).to(dtype).requires_grad_()
    return [x, torch.randn(shape[-1:]).to(of_bias or dtype).requires_grad_()] if bias else [x]


def same(a, b):
    assert (a is None) == (b is None)
    if a is not None:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b)


def run(leaves, activation, options, cotangent):
    x, bias = leaves if len(leaves) == 2 else (*leaves, None)
    y = fusednorm.bias_act_dropout(x, bias, activation, **options)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return y, torch.autograd.grad(y, wanted, cotangent)


def check(leaves, activation, options, monkeypatch, node=NODE, cotangent=None):
    cotangent = torch.randn_like(leaves[0]) if cotangent is None else cotangent
    state = torch.get_rng_state()
    y, found = run(leaves, activation, options, cotangent)
    assert (y.grad_fn.name() == NODE) == (node == NODE)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    with dispatch.settings.without_fastpath():
        expected, wanted = run(leaves, activation, options, cotangent)
        assert expected.grad_fn.name() != NODE
    assert torch.equal(drawn, torch.get_rng_state())
    for a, b in zip((y, *found), (expected, *wanted), strict=True):
        same(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 33), (2, 3, 16), (7,), (0, 16), (4, 0), (64, 300)], ids=str)
@DROPOUT
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fastpath_gives_the_bits_of_the_long_way(activation, options, shape, dtype, native, monkeypatch):
    check(leaves_of(shape, dtype), activation, options, monkeypatch)


@DROPOUT
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fastpath_gives_the_bits_of_the_long_way_by_automatic_choice(activation, dtype, options, monkeypatch):
    """Whoever serves the call: the kernels, or torch's own operators."""
    for shape, bias in itertools.product([(4, 64), (64, 1024), (4, 8192)], [True, False]):
        leaves = leaves_of(shape, dtype, bias=bias)
        with dispatch.settings.without_fastpath():
            outputs = run(leaves, activation, options, torch.ones_like(leaves[0]))
        node = outputs[0].grad_fn.name()
        check(leaves, activation, options, monkeypatch, NODE if node == "BiasActDropoutFunctionBackward" else node)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fastpath_for_any_subset_of_gradients(activation, native, monkeypatch):
    for wanted in ([True, False], [False, True]):
        leaves = [leaf.detach().requires_grad_(want) for leaf, want in zip(leaves_of(), wanted)]
        check(leaves, activation, {"dropout_p": 0.3, "seed": 1}, monkeypatch)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "bias of another dtype", "no bias"])
def test_fastpath_for_layouts(layout, native, monkeypatch):
    x, bias = (leaf.detach() for leaf in leaves_of((6, 8)))
    if layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "expanded":
        x = x[:1].expand(6, 8)
    elif layout == "sliced":
        x, bias = torch.randn(6, 17)[:, 1::2], torch.randn(16)[::2]
    elif layout == "bias of another dtype":
        x = x.bfloat16()
    leaves = [x.requires_grad_()] if layout == "no bias" else [x.requires_grad_(), bias.requires_grad_()]
    cotangent = torch.randn(1, 8, dtype=x.dtype).expand(6, 8)
    check(leaves, "gelu", {"dropout_p": 0.5, "seed": 4}, monkeypatch, cotangent=cotangent)


def test_fastpath_draws_the_seed_that_the_long_way_draws(native, monkeypatch):
    check(leaves_of(), "silu", {"dropout_p": 0.5}, monkeypatch)


def test_fastpath_takes_a_seed_in_a_tensor_and_notices_where_it_was_changed(native, monkeypatch):
    leaves, seed = leaves_of(), torch.tensor([2**40])
    check(leaves, "relu", {"dropout_p": 0.5, "seed": seed}, monkeypatch)
    y = fusednorm.bias_act_dropout(*leaves, "relu", 0.5, seed=seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fastpath_drops_what_dropout_mask_says(native):
    x, p, seed = torch.rand(64, 300) + 0.5, 0.3, 11
    y = fusednorm.bias_act_dropout(x, None, "relu", p, seed=seed)
    assert torch.equal(y != 0, fusednorm.dropout_mask(x.shape, p, seed))


def taken(x=None, bias=None, activation="relu", dropout_p=0.0, seed=None, by_shape=False):
    x = torch.randn(4, 8) if x is None else x
    bias = torch.ones(8) if bias is None else bias
    return dispatch.settings.current.fastpath.bias_act_dropout(x, bias, activation, dropout_p, seed, by_shape)


class _Subclass(torch.Tensor):
    pass


class _Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": torch.randn(4, 8).as_subclass(_Subclass)},
        {"x": torch.randn(4, 8, device="meta")},
        {"x": torch.ones(4, 8, dtype=torch.int64)},
        {"x": torch.randn(())},
        {"x": 1.0},
        {"bias": torch.randn(4)},
        {"bias": torch.randn(1, 8)},
        {"bias": 1.0},
        {"activation": "tanh"},
        {"activation": "RELU"},
        {"activation": None},
        {"activation": "relu\0"},
        {"dropout_p": 1.0},
        {"dropout_p": True},
        {"dropout_p": float("nan")},
        {"seed": 1.5},
        {"seed": torch.tensor([1, 2])},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_fastpath_leaves_other_arguments_to_the_long_way(arguments, native):
    assert taken() is not None
    assert taken(**arguments) is None


@pytest.mark.parametrize("context", [lambda: torch.autocast("cpu"), _Dispatches], ids=["autocast", "dispatch mode"])
def test_fastpath_leaves_calls_that_somebody_watches_to_the_long_way(context, native):
    with context():
        assert taken() is None


def test_fastpath_leaves_transforms_to_the_long_way(native):
    seen = []
    torch.vmap(lambda t: seen.append(taken(t)) or t)(torch.randn(3, 4, 8))
    torch.func.grad(lambda t: seen.append(taken(t)) or t.sum())(torch.randn(4, 8))
    assert seen == [None, None]


# --- its node ---


@DROPOUT
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
def test_fastpath_derivatives_of_second_order_and_batched(activation, options, native):
    def function(x, bias):
        return fusednorm.bias_act_dropout(x, bias, activation, **options)

    inputs = tuple(leaves_of((3, 5), torch.float64))
    assert function(*inputs).grad_fn.name() == NODE
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


def test_fastpath_graph_is_freed_after_one_backward_and_notices_changes(native):
    x, bias = leaves_of()
    y = fusednorm.bias_act_dropout(x, bias, "gelu")
    torch.autograd.grad(y, x, torch.ones_like(y))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(y, x, torch.ones_like(y))
    y = fusednorm.bias_act_dropout(x, bias, "gelu")
    with torch.no_grad():
        bias.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fastpath_keeps_through_hooks_on_saved_tensors_and_checkpoints(native):
    leaves, options, cotangent = leaves_of(), {"dropout_p": 0.5, "seed": 1}, torch.randn(6, 33)
    expected = run(leaves, "gelu", options, cotangent)[1]
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y = fusednorm.bias_act_dropout(*leaves, "gelu", **options)
    assert len(packed) == 3  # x, the bias, the seed: the mask is not among them
    again = checkpoint(fusednorm.bias_act_dropout, *leaves, "gelu", **options, use_reentrant=False)
    for found in (y, again):
        for a, b in zip(torch.autograd.grad(found, leaves, cotangent), expected, strict=True):
            same(a, b)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5, "seed": 1}], ids=["bare", "dropout"])
def test_fastpath_under_compiled_autograd(options, native):
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()
    leaves, cotangent = leaves_of(), torch.randn(6, 33)
    expected = run(leaves, "silu", options, cotangent)[1]
    for _ in range(2):
        y = fusednorm.bias_act_dropout(*leaves, "silu", **options)
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
            found = torch.autograd.grad(y, leaves, cotangent)
        for a, b in zip(found, expected, strict=True):
            same(a, b)


def test_fastpath_shows_in_the_profiler(native):
    leaves = leaves_of()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fusednorm.bias_act_dropout(*leaves, "gelu", 0.1).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"fusednorm_cpu::bias_act_dropout_fwd", "fusednorm_cpu::bias_act_dropout_bwd"} <= names
