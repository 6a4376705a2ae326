"""The fast path's norms with bias and dropout before them give what the long way gives, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm import dispatch
from fusednorm.dispatch import fastpath

_missing = fastpath.load()[1]
pytestmark = pytest.mark.skipif(bool(_missing), reason=f"no fast path: {_missing}")

NAMES = ("x", "residual", "weight", "bias", "x_bias")
EPILOGUES = {
    "bias": {"x_bias": True},
    "dropout": {"dropout_p": 0.3, "seed": 7},
    "dropout by a negative seed": {"dropout_p": 0.3, "seed": -7},
    "dropout by a seed past 64 bits": {"dropout_p": 0.3, "seed": 2**64 + 7},
    "both": {"x_bias": True, "dropout_p": 0.5, "seed": 2**63 + 5},
    "both without residual": {"x_bias": True, "dropout_p": 0.5, "seed": 1, "residual": False},
    "both of an RMSNorm": {"x_bias": True, "dropout_p": 0.1, "seed": 1, "rms": True},
    "nothing": {"dropout_p": 0.0, "seed": 3},
}


@pytest.fixture(autouse=True)
def native():
    with fusednorm.use_provider("cpu"):
        yield


def leaves_of(epilogue, shape=(6, 33), dtype=torch.float32, of_bias=None):
    """Of those that the epilogue has, in the order of NAMES."""
    left_out = {"x_bias": "x_bias" not in epilogue, "residual": "residual" in epilogue, "bias": "rms" in epilogue}
    drawn = {}
    for name in NAMES:
        size = shape if name in ("x", "residual") else shape[-1:]
        if not left_out.get(name, False):
            drawn[name] = torch.randn(size).to(of_bias if name == "x_bias" and of_bias else dtype).requires_grad_()
    return drawn


def call(epilogue, leaves, **options):
    given = {name: epilogue[name] for name in ("dropout_p", "seed") if name in epilogue} | options
    parameters = {name: leaves.get(name) for name in ("weight", "x_bias")}
    if epilogue.get("rms"):
        return fusednorm.add_rms_norm(leaves["x"], leaves.get("residual"), leaves["x"].shape[-1], **parameters, **given)
    parameters["bias"] = leaves.get("bias")
    return fusednorm.add_layer_norm(leaves["x"], leaves.get("residual"), leaves["x"].shape[-1], **parameters, **given)


def gradients(outputs, leaves, used, cotangents):
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    chosen = [i for i in used if outputs[i].requires_grad]
    found = torch.autograd.grad(
        [outputs[i] for i in chosen], wanted, [cotangents[i] for i in chosen], allow_unused=True
    )
    return dict(zip([name for name, leaf in leaves.items() if leaf.requires_grad], found, strict=True))


def same(a, b):
    assert (a is None) == (b is None)
    if a is not None:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b)


def check(epilogue, leaves, monkeypatch, used=(0, 1), cotangents=None, **options):
    cotangents = cotangents or [torch.randn_like(leaves["x"]) for _ in range(2)]
    state = torch.get_rng_state()
    outputs = call(epilogue, leaves, **options)
    assert "FusedNormBackward" in {output.grad_fn.name() for output in outputs if output.grad_fn}
    found, drawn = gradients(outputs, leaves, used, cotangents), torch.get_rng_state()
    torch.set_rng_state(state)
    with dispatch.settings.without_fastpath():
        expected = call(epilogue, leaves, **options)
        assert "FusedNormBackward" not in {output.grad_fn.name() for output in expected if output.grad_fn}
        wanted = gradients(expected, leaves, used, cotangents)
    assert torch.equal(drawn, torch.get_rng_state())
    for a, b in zip(outputs, expected, strict=True):
        same(a, b)
    assert found.keys() == wanted.keys()
    for name in found:
        same(found[name], wanted[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 33), (2, 3, 16), (7,), (0, 16), (4, 0), (64, 300)], ids=str)
@pytest.mark.parametrize("name", EPILOGUES)
def test_fastpath_with_an_epilogue_gives_the_bits_of_the_long_way(name, shape, dtype, monkeypatch):
    for used in ((0, 1), (0,), (1,)):
        check(EPILOGUES[name], leaves_of(EPILOGUES[name], shape, dtype), monkeypatch, used)


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both outputs", "normed", "residual_out"])
@pytest.mark.parametrize("name", ["bias", "dropout", "both"])
def test_fastpath_with_an_epilogue_for_any_subset_of_gradients(name, used, monkeypatch):
    base = leaves_of(EPILOGUES[name])
    for count in range(1, len(base) + 1):
        for subset in itertools.combinations(base, count):
            leaves = {leaf: t.detach().requires_grad_(leaf in subset) for leaf, t in base.items()}
            if used == (1,) and not {"x", "residual", "x_bias"}.intersection(subset):
                continue  # torch says that residual_out does not require a gradient
            check(EPILOGUES[name], leaves, monkeypatch, used)


def test_fastpath_with_a_bias_of_another_dtype(monkeypatch):
    epilogue = EPILOGUES["both"]
    check(epilogue, leaves_of(epilogue, dtype=torch.bfloat16, of_bias=torch.float32), monkeypatch)


def test_fastpath_draws_the_seed_that_the_long_way_draws(monkeypatch):
    epilogue = {"dropout_p": 0.5}
    check(epilogue, leaves_of(epilogue), monkeypatch)
    torch.manual_seed(3)
    first = call(epilogue, leaves := leaves_of(epilogue))[1]
    assert not torch.equal(first, call(epilogue, leaves)[1])


def test_fastpath_takes_a_seed_in_a_tensor_and_notices_where_it_was_changed(monkeypatch):
    leaves = leaves_of({}, (6, 33))
    seed = torch.tensor(2**40)
    check({"dropout_p": 0.5}, leaves, monkeypatch, seed=seed)
    outputs = call({"dropout_p": 0.5}, leaves, seed=seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


def test_fastpath_drops_what_dropout_mask_says():
    x, p, seed = torch.randn(64, 300), 0.3, 11
    _, z = call({"dropout_p": p, "seed": seed}, {"x": x})
    mask = fusednorm.dropout_mask(x.shape, p, seed)
    assert torch.equal(z != 0, mask)
    assert torch.equal(z, torch.where(mask, x * torch.tensor(1 / (1 - p), dtype=torch.float32), 0.0))


@pytest.mark.parametrize("name", ["bias", "both", "both of an RMSNorm"])
def test_fastpath_with_an_epilogue_derivatives_of_second_order_and_batched(name):
    leaves = leaves_of(EPILOGUES[name], (3, 5), torch.float64)

    def function(*tensors):
        return call(EPILOGUES[name], dict(zip(leaves, tensors, strict=True)))

    inputs = tuple(leaves.values())
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


def test_fastpath_with_an_epilogue_through_hooks_on_saved_tensors_and_checkpoints():
    epilogue = EPILOGUES["both"]
    leaves, cotangents = leaves_of(epilogue), [torch.randn(6, 33) for _ in range(2)]
    expected = gradients(call(epilogue, leaves), leaves, (0, 1), cotangents)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        outputs = call(epilogue, leaves)
    assert len(packed) == 6  # z, statistics, weight, bias, x_bias, seed: the mask is not among them
    for found in (outputs, checkpoint(call, epilogue, leaves, use_reentrant=False)):
        for name, gradient in gradients(found, leaves, (0, 1), cotangents).items():
            same(gradient, expected[name])


def test_fastpath_with_a_drawn_seed_under_checkpoint():
    leaves = leaves_of({"x_bias": True})
    _, z = checkpoint(call, {"dropout_p": 0.5}, leaves, use_reentrant=False)
    gradient = torch.autograd.grad(z, leaves["x"], torch.ones_like(z))[0]
    kept = z.detach() != leaves["residual"].detach()
    assert torch.equal(gradient != 0, kept)  # the mask of the recomputed forward is the first one's


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's tracing looks at z's
@pytest.mark.parametrize("name", ["bias", "dropout", "both"])
def test_fastpath_with_an_epilogue_under_compiled_autograd(name):
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()
    epilogue = EPILOGUES[name]
    leaves, cotangents = leaves_of(epilogue), [torch.randn(6, 33) for _ in range(2)]
    for used in ((0, 1), (1,)):
        expected = gradients(call(epilogue, leaves), leaves, used, cotangents)
        for _ in range(2):
            outputs = call(epilogue, leaves)
            with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
                found = gradients(outputs, leaves, used, cotangents)
            for leaf, gradient in found.items():
                same(gradient, expected[leaf])


def test_layers_with_dropout_take_the_fastpath():
    layer = fusednorm.AddLayerNorm(16, dropout_p=0.5)
    x = torch.randn(4, 16, requires_grad=True)
    assert layer(x, x)[0].grad_fn.name() == "FusedNormBackward"
    assert layer.eval()(x, x)[0].grad_fn.name() == "FusedNormBackward"


def taken(x_bias=None, dropout_p=0.5, seed=None):
    x = torch.ones(4, 8)
    return dispatch.settings.current.fastpath.add_norm(x, x, 8, None, None, 1e-5, x_bias, dropout_p, seed, False, False)


def test_fastpath_takes_every_form_of_a_plain_epilogue():
    assert taken() is not None and taken(dropout_p=0) is not None and taken(dropout_p=0.0, seed=3) is not None
    assert taken(seed=torch.tensor([[3]]), x_bias=torch.ones(8)) is not None


@pytest.mark.parametrize(
    "arguments",
    [
        {"x_bias": torch.randn(4)},
        {"x_bias": torch.ones(8, dtype=torch.int64)},
        {"dropout_p": 1.0},
        {"dropout_p": 1},
        {"dropout_p": 10**400},
        {"dropout_p": -0.1},
        {"dropout_p": float("nan")},
        {"dropout_p": True},
        {"dropout_p": "0.1"},
        {"seed": 1.0},
        {"seed": True},
        {"seed": torch.tensor([1, 2])},
        {"seed": torch.tensor([1.0])},
        {"seed": torch.tensor([1], dtype=torch.int32)},
        {"seed": torch.empty(1, dtype=torch.int64, device="meta")},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_fastpath_leaves_other_epilogues_to_the_long_way(arguments):
    assert taken(**arguments) is None
