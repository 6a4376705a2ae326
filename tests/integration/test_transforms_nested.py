"""Derivatives of derivatives by torch.func: every order of forward and reverse mode, two and three deep."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import Call
from oracle_activation import ACTIVATIONS, ActivationCall
from oracle_attention import AttentionCall, draw
from shapes import FUSED, PLAIN, inputs
from torch.autograd import forward_ad

from fusednorm import scaled_dot_product_attention, varlen_attention

JACOBIANS = {"f": torch.func.jacfwd, "r": torch.func.jacrev}
NESTED = ["".join(word) for depth in (2, 3) for word in itertools.product("fr", repeat=depth)]
EVERY_NESTING = pytest.mark.parametrize("nesting", NESTED)
THREE_DEEP = ("causal", "dropout", "additive_mask")  # the other masks are no other products
# float64 rounds at 1e-16; three derivatives of a softmax or a norm of few elements multiply that a thousandfold
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
KEYS = 5
SEEN = torch.arange(KEYS) != 2
ATTENTION = {
    "bare": ({}, None),
    "causal": ({"is_causal": True}, None),
    "window_softcap": ({"window": (2, 1), "softcap": 2.0}, None),
    "dropout": ({"dropout_p": 0.3, "seed": 5}, None),
    "key_mask": ({"key_mask": SEEN[None]}, None),
    "bool_mask": ({}, SEEN.expand(4, KEYS)),
    "additive_mask": ({"is_causal": True}, torch.where(SEEN, 0.5, -torch.inf).expand(4, KEYS)),
    "grouped": ({"enable_gqa": True}, None),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """No provider: elementary operators serve every transform."""
    return request.param


def nested(nesting: str, function):
    """The outermost transform is the word's first letter."""
    for letter in reversed(nesting):
        function = JACOBIANS[letter](function)
    return function


def curve(generator, device, shapes: dict[str, tuple[int, ...]]):
    """A number -> leaves, each element its own sine of it."""
    phases = {n: draw(generator, device, torch.float64, shape, shape) for n, shape in shapes.items()}
    return lambda t: {n: torch.sin(speed * t + phase) for n, (speed, phase) in phases.items()}


def value_along(run, leaves_at, generator, device):
    """A number -> a number: the outputs, weighted and bent."""
    start = torch.tensor(0.7, dtype=torch.float64, device=device)
    weights = draw(generator, device, torch.float64, *[o.shape for o in run(leaves_at(start))])
    return lambda t: sum((torch.sin(o) * w).sum() for o, w in zip(run(leaves_at(t)), weights, strict=True)), start


def check(nesting, ours, exact, leaves_at, generator, device):
    state = generator.get_state()
    expected, start = value_along(exact, leaves_at, generator, device)
    generator.set_state(state)
    got, _ = value_along(ours, leaves_at, generator, device)
    found = nested(nesting, got)(start)
    torch.testing.assert_close(found, nested(nesting, expected)(start), **CLOSE)


@pytest.mark.parametrize(
    ("name", "nesting"), [(n, w) for n in ATTENTION for w in NESTED if len(w) == 2 or n in THREE_DEEP]
)
def test_attention(nesting, name, device, generator):
    options, mask = ATTENTION[name]
    options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    call = AttentionCall(options, None if mask is None else mask.to(device))
    heads = 4 if name == "grouped" else 2
    leaves_at = curve(generator, device, {"q": (1, heads, 4, 3), "k": (1, 2, KEYS, 3), "v": (1, 2, KEYS, 3)})
    check(nesting, call.ours, lambda t: call.explicit(t, torch.float64), leaves_at, generator, device)


@EVERY_NESTING
def test_varlen_attention(nesting, device, generator):
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    alone = AttentionCall({"is_causal": True})

    def ours(t):
        return (varlen_attention(t["q"], t["k"], t["v"], bounds, bounds, 3, 3, is_causal=True),)

    def exact(t):
        parts = [{n: x[piece].transpose(0, 1)[None] for n, x in t.items()} for piece in (slice(0, 2), slice(2, 5))]
        return (torch.cat([alone.explicit(part, torch.float64)[0][0].transpose(0, 1) for part in parts]),)

    check(nesting, ours, exact, curve(generator, device, dict.fromkeys("qkv", (5, 2, 3))), generator, device)


@pytest.mark.parametrize("function", PLAIN + FUSED)
@EVERY_NESTING
def test_norms(nesting, function, device, generator):
    options = {"dropout_p": 0.3, "drop_path_p": 0.25, "seed": 17} if function in FUSED else {}
    call = Call(function, 1, options=options)
    shapes = {name: (3, 5) if name in ("x", "residual") else (5,) for name in inputs(function)}
    leaves_at = curve(generator, device, shapes)
    check(nesting, call.ours, lambda t: call.exact(t, torch.float64), leaves_at, generator, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@EVERY_NESTING
def test_activations(nesting, activation, device, generator):
    call = ActivationCall(activation, options={"dropout_p": 0.3, "seed": 17})
    leaves_at = curve(generator, device, {"x": (3, 5), "bias": (5,)})
    check(nesting, call.ours, lambda t: call.exact(t, torch.float64), leaves_at, generator, device)


def test_attention_of_one_tensor_in_every_role(device):
    """Against numbers found by central differences."""

    def value(t):
        x = torch.stack([t, t * t, torch.sin(t), torch.cos(t)]).reshape(1, 1, 2, 2)
        return scaled_dot_product_attention(x, x, x, is_causal=True).square().sum()

    start, step = torch.tensor(0.7, dtype=torch.float64, device=device), 1e-3
    around = [value(start + n * step) for n in range(-2, 3)]
    second = torch.func.jacfwd(torch.func.jacfwd(value))(start)
    third = torch.func.jacfwd(torch.func.jacfwd(torch.func.jacrev(value)))(start)
    torch.testing.assert_close(second, (around[1] - 2 * around[2] + around[3]) / step**2, rtol=1e-5, atol=0)
    differences = (around[4] - 2 * around[3] + 2 * around[1] - around[0]) / (2 * step**3)
    torch.testing.assert_close(third, differences, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_what_is_masked_reaches_no_second_forward_derivative(bad, device, generator):
    """Keys, values and their tangents past what a causal query sees."""
    q, k, v, speed = draw(generator, device, torch.float64, *[(1, 2, 6, 3)] * 4)
    hidden = torch.zeros(6, 3, dtype=torch.bool, device=device)
    hidden[4:] = True

    def run(t, fill):
        keys, values = (torch.where(hidden, (1 + t) * fill, x + t * speed) for x in (k, v))
        return scaled_dot_product_attention(q + t * speed, keys, values, is_causal=True)[:, :, :4]

    start = torch.tensor(0.3, dtype=torch.float64, device=device)
    got, expected = (torch.func.jacfwd(torch.func.jacfwd(run))(start, f) for f in (bad, 0.0))
    torch.testing.assert_close(got, expected, **CLOSE)
    assert expected.abs().max() > 0.1


def test_vmap_of_a_forward_derivative_over_some_operands(device, generator):
    """The products' own rule for vmap: batched and not, in every role."""
    q, k, v, tangent = draw(generator, device, torch.float64, *[(3, 2, 5, 4)] * 4)

    def derivative(q, k, v, tangent):
        def run(t):
            return scaled_dot_product_attention(q + t * tangent, k, v + t * tangent, is_causal=True)

        return torch.func.jacfwd(torch.func.jacfwd(run))(torch.zeros((), dtype=torch.float64, device=device))

    for bits in itertools.product([None, 0], repeat=4):
        if bits == (None,) * 4:
            continue
        given = [t if bit == 0 else t[0] for t, bit in zip((q, k, v, tangent), bits, strict=True)]
        got = torch.vmap(derivative, in_dims=bits)(*given)
        for n in range(3):
            one = derivative(*[t[n] if bit == 0 else t for t, bit in zip(given, bits, strict=True)])
            torch.testing.assert_close(got[n], one, **CLOSE)


def test_dual_numbers_below_a_transform(device, generator):
    """A forward derivative by ``torch.autograd.forward_ad`` of a gradient by ``torch.func``."""
    q, k, v, tangent = draw(generator, device, torch.float64, *[(1, 1, 4, 3)] * 4)
    call = AttentionCall({"is_causal": True})

    def derivative(run):
        def value(q):
            return torch.sin(run({"q": q, "k": k, "v": v})[0]).sum()

        with forward_ad.dual_level():
            gradient = torch.func.grad(value)(forward_ad.make_dual(q, tangent))
            return forward_ad.unpack_dual(gradient).tangent.clone()

    got = derivative(call.ours)
    torch.testing.assert_close(got, derivative(lambda t: call.explicit(t, torch.float64)), **CLOSE)
