"""Dropout by counter: one seed gives one mask, on every provider, at every shape."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from oracle import Call, keep_mask, keep_scale, philox4x32
from shapes import FUSED

import fusednorm
from fusednorm import dropout

# philox4x32, 7 rounds, from Random123's kat_vectors: counter, key, words
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]
SEEDS = [0, 1, -1, 42, -(2**63), 2**63 - 1, 2**63, 2**64 - 1, 2**32, 2**32 - 1, 0x1234_5678_9ABC_DEF0]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS, ids=["zeros", "ones", "pi"])
def test_oracle_philox_gives_the_published_words(counter, key, words):
    assert tuple(int(word) for word in philox4x32(counter, key)) == words


def bisected_word(seed: int, row: int, column: int) -> int:
    """The package's random word, found from outside: an element is kept iff word >= floor(p 2^32)."""
    low, high = 0, 2**32  # kept at p = low / 2^32, dropped at high / 2^32
    while high - low > 1:
        middle = (low + high) // 2
        kept = bool(fusednorm.dropout_mask((row + 1, column + 1), middle / 2**32, seed, "cpu")[row, column])
        low, high = (middle, high) if kept else (low, middle)
    return low


@pytest.mark.parametrize("column", range(4))
def test_mask_threshold_is_exact_to_the_last_bit(column):
    """Words of the published zero vector, read back through `dropout_mask` alone."""
    assert bisected_word(0, 0, column) == VECTORS[0][2][column]


@pytest.mark.parametrize("seed", SEEDS)
def test_mask_is_the_oracles_for_every_seed(seed):
    mask = fusednorm.dropout_mask((9, 23), 0.37, seed, "cpu")
    assert mask.dtype == torch.bool
    assert torch.equal(mask, keep_mask(9, 23, 0.37, seed))


@pytest.mark.parametrize("seed", SEEDS[:6])
def test_mask_of_a_tensor_seed_is_that_of_the_int(seed):
    tensor = torch.tensor([seed], dtype=torch.int64)
    expected = fusednorm.dropout_mask((4, 9), 0.5, seed, "cpu")
    assert torch.equal(fusednorm.dropout_mask((4, 9), 0.5, tensor, "cpu"), expected)
    assert torch.equal(fusednorm.dropout_mask((4, 9), 0.5, tensor[0], "cpu"), expected)  # 0-d


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3), (1,), (7,), (2, 3, 5), (1, 1), (6, 1)], ids=str)
def test_mask_of_every_shape(shape):
    mask = fusednorm.dropout_mask(shape, 0.5, 3, "cpu")
    assert mask.shape == shape
    assert torch.equal(mask, keep_mask(math.prod(shape[:-1]), shape[-1], 0.5, 3).reshape(shape))


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("shape", [(2**40, 0), (0, 2**60), (2**40, 0, 3)], ids=str)
def test_mask_of_no_elements_counts_no_rows(shape, native, monkeypatch):
    if not native:
        monkeypatch.setattr(dropout, "_native_serves", lambda seed: False)
    mask = fusednorm.dropout_mask(shape, 0.5, seed=1)
    assert mask.shape == shape and mask.dtype == torch.bool


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_keep_rate_and_independence(p):
    """Within five standard deviations: a chance of one in a million, and the seed is fixed besides."""
    rows, columns = 400, 500
    mask = fusednorm.dropout_mask((rows, columns), p, 2024, "cpu")
    assert torch.equal(mask, keep_mask(rows, columns, p, 2024))
    mask = mask.double()
    keep, deviation = 1 - p, math.sqrt(p * (1 - p))
    assert abs(mask.mean().item() - keep) < 5 * deviation / math.sqrt(rows * columns)
    centred = mask - keep
    for lag_rows, lag_columns in ((0, 1), (0, 4), (1, 0), (1, 1)):
        product = centred[: rows - lag_rows, : columns - lag_columns] * centred[lag_rows:, lag_columns:]
        bound = 5 * deviation**2 / math.sqrt(product.numel()) + 5 / product.numel()
        assert abs(product.mean().item()) < bound, (lag_rows, lag_columns)


@pytest.mark.parametrize("p", [0.0, 2.0**-33])
def test_p_below_one_step_of_the_threshold_keeps_everything(p):
    """floor(p 2^32) = 0."""
    assert fusednorm.dropout_mask((50, 50), p, 1, "cpu").all()


def test_p_just_below_one_drops_everything():
    """floor((1 - 2^-53) 2^32) = 2^32 - 1: only the largest word of all would be kept."""
    assert not fusednorm.dropout_mask((50, 50), 1 - 2.0**-53, 1, "cpu").any()


@pytest.mark.parametrize("with_path", [False, True], ids=["dropout", "dropout_and_drop_path"])
@pytest.mark.parametrize("shape", [(6, 37), (3, 4, 20), (19,)], ids=str)
@pytest.mark.parametrize("function", FUSED)
def test_add_norm_applies_exactly_the_mask(function, shape, with_path, using, device):
    """Read off residual_out: x is all ones, so what is kept equals the scale and the rest is exactly zero.

    Dropout goes by p alone, as in torch's scaled_dot_product_attention: without gradients too.
    """
    p, path_p, seed = 0.3, (0.4 if with_path else 0.0), -77
    with using, torch.no_grad():
        _, z = getattr(fusednorm, function)(
            torch.ones(shape, device=device), None, shape[-1:], dropout_p=p, drop_path_p=path_p, seed=seed
        )
    expected = fusednorm.dropout_mask(shape, p, seed, device).float() * keep_scale(p)
    if with_path:
        samples = shape[0] if len(shape) > 1 else 1
        path = keep_mask(samples, 1, path_p, seed, stream=1).to(device) * keep_scale(path_p)
        expected = expected * path.float().reshape(-1, *[1] * (len(shape) - 1))
    assert torch.equal(z != 0, expected != 0)
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=0)  # the order of two float32 products


def norm(function: str, device: str, **seed) -> torch.Tensor:
    x = torch.linspace(-3.0, 3.0, 5 * 64, device=device).view(5, 64)
    return getattr(fusednorm, function)(x, x, (64,), dropout_p=0.5, **seed)[1]


def activation(device: str, **seed) -> torch.Tensor:
    return fusednorm.bias_act_dropout(torch.ones(8, 64, device=device), None, dropout_p=0.5, **seed)


def attention(device: str, **seed) -> torch.Tensor:
    x = torch.ones(2, 2, 16, 8, device=device)
    x[..., 0] = torch.arange(16, device=device)
    return fusednorm.scaled_dot_product_attention(x, x, x, dropout_p=0.5, **seed)


DROPPING = {**{name: functools.partial(norm, name) for name in FUSED}, "activation": activation, "attention": attention}


@pytest.mark.parametrize("drop", DROPPING.values(), ids=DROPPING)
def test_an_int_and_a_tensor_seed_are_alike(drop, using, device):
    with using:
        runs = [drop(device, seed=s) for s in (-5, torch.tensor([-5], device=device), torch.tensor(-5, device=device))]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("drop", DROPPING.values(), ids=DROPPING)
def test_default_seed_comes_from_torchs_generator(drop, using, device):
    with using:
        torch.manual_seed(5)
        first, second = drop(device), drop(device)
        torch.manual_seed(5)
        again = drop(device)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("function", FUSED)
def test_no_dropout_leaves_torchs_generator_alone(function, using):
    x = torch.randn(5, 64)
    state = torch.get_rng_state()
    with using:
        getattr(fusednorm, function)(x, x, (64,))
        getattr(fusednorm, function)(x, x, (64,), dropout_p=0.5, drop_path_p=0.5, seed=3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("p", [1 - 2.0**-53, 1 - 2.0**-24, 0.999999])
def test_add_norm_near_p_one_is_finite(p, using, device, generator):
    """Everything is dropped: z is the residual, and the gradient of x is zero and not infinity times zero."""
    leaves = {name: torch.randn(4, 24, generator=generator).to(device).requires_grad_() for name in ("x", "residual")}
    with using:
        outputs = Call("add_layer_norm", options={"dropout_p": p, "seed": 1}).ours(leaves)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])
    kept = fusednorm.dropout_mask((4, 24), p, 1, device)
    assert torch.equal(outputs[1][~kept], leaves["residual"][~kept])
    assert not gradients[0][~kept].any()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.certifies("NaN safety", op="add_layer_norm")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_dropped_never_contributes(poison, using, device):
    """Where a NaN or an infinity is dropped, z is the residual."""
    mask = fusednorm.dropout_mask((4, 24), 0.5, 8, device)
    x = torch.where(mask, torch.ones((), device=device), torch.full((), poison, device=device))
    with using:
        normed, z = fusednorm.add_layer_norm(x, torch.ones_like(x), (24,), dropout_p=0.5, seed=8)
    assert normed.isfinite().all()
    assert z.isfinite().all()


def test_modules_drop_in_training_only(using, device):
    module = fusednorm.AddLayerNorm(64, dropout_p=0.5, drop_path_p=0.5, device=device)
    x = torch.randn(3, 4, 64, device=device)
    with using:
        module.eval()
        assert torch.equal(module(x)[1], x)
        module.train()
        one, other = module(x, seed=4)[1], module(x, seed=4)[1]
        assert torch.equal(one, other)
        assert not torch.equal(one, x)
        expected = fusednorm.add_layer_norm(
            x, None, (64,), module.weight, module.bias, dropout_p=0.5, drop_path_p=0.5, seed=4
        )
        assert torch.equal(module(x, seed=4)[0], expected[0])
