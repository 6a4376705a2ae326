"""The native CPU kernels of bias_act_dropout beyond the budget: threads, instruction sets, 16-bit values, edges."""

from __future__ import annotations

import math

import pytest
import torch
from derivatives import gradients_of
from oracle_activation import ACTIVATIONS, NEGATIVE_TAIL, TORCHS, ActivationCall

import fusednorm
from fusednorm import bias_act_dropout, dropout, dropout_mask
from fusednorm.dispatch import crossovers as choice
from fusednorm.dispatch import rules
from tests.providers.cpu.test_norm import (
    assert_same_bits,
    instruction_sets,
    on_instruction_sets,
    on_threads,
    pytestmark,
)

__all__ = ["instruction_sets", "on_instruction_sets", "on_threads", "pytestmark"]  # which pytest finds by name

DTYPE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
DTYPE_16 = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
# (rows, columns): past the grain of two threads with an odd width; sums of several chunks; several tiles of a row
SHAPES = [(130, 385), (2100, 24), (3, 9001)]
SEED = 0x1234_5678_9ABC_DEF0


def draw(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(x: torch.Tensor, bias: torch.Tensor | None, dy: torch.Tensor, activation: str, **options) -> list[torch.Tensor]:
    """y and the gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    with fusednorm.use_provider("cpu"):
        y = bias_act_dropout(leaves[0], leaves[1] if bias is not None else None, activation, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def everything(shape: tuple[int, int], dtype: torch.dtype, activation: str, staged: bool) -> list[torch.Tensor]:
    """Rows in place, or staged because a row's elements do not lie one after another."""
    x, dy = ((3.0 * draw(*shape, seed=seed)).to(dtype) for seed in (1, 2))
    if staged:
        x = x.repeat_interleave(2, -1)[:, ::2]
    return run(x, draw(shape[1]).to(dtype), dy, activation, dropout_p=0.2, seed=SEED)


def exact(activation: str, x: torch.Tensor) -> torch.Tensor:
    """In float64, with a correct negative tail, where 1 + tanh cancels even there."""
    if activation != "gelu_tanh":
        return TORCHS["silu"](x) if activation == "silu" else ACTIVATIONS[activation](x)
    v = x.clamp(-1e3, 1e3)  # whose cube does not overflow
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))


@pytest.mark.certifies("deterministic", op="bias_act_dropout", provider="cpu")
@DTYPE
@ACTIVATION
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(shape, activation, dtype, on_threads):
    assert_same_bits(*on_threads(lambda: everything(shape, dtype, activation, staged=False)))


@pytest.mark.parametrize("staged", [False, True], ids=["in_place", "staged"])
@DTYPE
@ACTIVATION
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_do_not_depend_on_the_instruction_set(shape, activation, dtype, staged, on_instruction_sets):
    assert_same_bits(*on_instruction_sets(lambda: everything(shape, dtype, activation, staged)))


@ACTIVATION
def test_float32_bits_of_every_exponent_on_every_instruction_set(activation, on_instruction_sets):
    """Each exponent and sign with mantissas at random: subnormal results, overflow, infinities and NaN among them."""
    patterns = torch.randint(0, 1 << 23, (512, 64), generator=torch.Generator().manual_seed(1))
    x = (patterns + (torch.arange(512)[:, None] << 23)).to(torch.int32).view(torch.float32)
    results = on_instruction_sets(lambda: run(x, None, torch.ones_like(x), activation))
    assert_same_bits(*([t.nan_to_num(nan=7.0).view(torch.int32) for t in r] for r in results))  # zeros' signs too


@DTYPE
@ACTIVATION
def test_staged_rows_and_rows_in_place_agree(activation, dtype):
    """To the last bit: both compute in the same type and round once."""
    assert_same_bits(*(everything((33, 130), dtype, activation, staged) for staged in (False, True)))


@DTYPE_16
@ACTIVATION
def test_every_value_of_16_bits(activation, dtype):
    """Each finite one against float64: one rounding and a little, the gradient within twice torch's error too."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()][None]
    y, dx = run(x, None, torch.ones_like(x), activation)
    wide = x.double().requires_grad_()
    expected = exact(activation, wide)
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    eager = x.clone().requires_grad_()
    (torchs,) = torch.autograd.grad(TORCHS[activation](eager), eager, torch.ones_like(x))

    def step(t: torch.Tensor) -> torch.Tensor:
        return torch.finfo(dtype).eps * t.abs().clamp_min(torch.finfo(dtype).tiny)

    assert ((y.double() - expected).abs() <= 0.51 * step(expected)).all()
    limit = (torchs.double() - slope).abs().nan_to_num(0.0)  # NaN where the cube of torch's gelu_tanh overflows
    assert ((dx.double() - slope).abs() <= 2 * limit + 0.51 * step(slope)).all()


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
def test_the_negative_tail_is_relatively_accurate(activation):
    """Where torch's gelu has no correct digit, and is 0 from -6 on."""
    x = torch.linspace(-9.0, -1.0, 4096)[None]
    (y, _) = run(x, None, torch.ones_like(x), activation)
    expected = exact(activation, x.double())
    assert ((y.double() - expected).abs() <= NEGATIVE_TAIL[activation] * expected.abs()).all()


def test_gelus_tail_is_monotone_and_its_slope_at_zero_one_half(on_instruction_sets):
    """As far as results are normal numbers."""
    x = torch.cat([torch.linspace(-13.0, -1.0, 1 << 17), torch.tensor([-20.0, 0.0])])[None]
    for y, dx in on_instruction_sets(lambda: run(x, None, torch.ones_like(x), "gelu")):
        assert (y[0, 1:-2] <= y[0, :-3]).all()
        assert y[0, -2:].tolist() == [0.0, 0.0] and dx[0, -2:].tolist() == [0.0, 0.5]


@DTYPE
@ACTIVATION
def test_special_values_are_torchs(activation, dtype):
    """NaN and infinities go where torch's go, forward and backward, in whole vectors and in what is left of a row.

    Torch's in float64: in float32 gelu(inf) is NaN on processors where oneDNN serves it.
    """
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0])
    for columns in (7, 32, 45):
        x = special.repeat(7)[:columns].to(dtype)[None]
        y, dx = run(x, None, torch.ones_like(x), activation)
        leaf = x.double().requires_grad_()
        expected = TORCHS[activation](leaf)
        (slope,) = torch.autograd.grad(expected, leaf, torch.ones_like(leaf))
        for ours, torchs in ((y, expected.detach()), (dx, slope)):
            torch.testing.assert_close(ours, torchs.to(dtype), equal_nan=True)


@ACTIVATION
def test_infinite_and_nan_cotangents_are_passed_on(activation):
    dy = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]])
    x = torch.full((1, 4), 0.7)
    _, dx = run(x, None, dy, activation)
    assert dx[0, 0] == math.inf and dx[0, 1] == -math.inf and dx[0, 2].isnan() and dx[0, 3].isfinite()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (1, 4096), (1, 4097), (2, 8193), (70_001, 1)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_sizes_around_a_tile(shape, dropout_p):
    x, bias, dy = draw(*shape).float(), draw(shape[1], seed=4).float(), draw(*shape, seed=5).float()
    y, dx, dbias = run(x, bias, dy, "relu", dropout_p=dropout_p, seed=SEED)
    keep = dropout_mask(shape, dropout_p, SEED).float() * dropout.keep_scale(dropout_p)
    assert torch.equal(y, torch.relu(x + bias) * keep)
    expected = torch.where(x + bias > 0, dy * keep, 0.0)
    assert torch.equal(dx, expected)
    torch.testing.assert_close(dbias, expected.double().sum(0).float(), rtol=1e-5, atol=1e-4)


@DTYPE
def test_only_the_gradients_asked_for(dtype):
    leaves, dy = {"x": draw(9, 40).to(dtype), "bias": draw(40, seed=4).to(dtype)}, draw(9, 40, seed=5).to(dtype)
    with fusednorm.use_provider("cpu"):
        both, *alone = (gradients_of(w, ActivationCall("gelu").ours, leaves, [dy]) for w in (leaves, ["x"], ["bias"]))
    assert torch.equal(alone[0]["x"], both["x"]) and torch.equal(alone[1]["bias"], both["bias"])


@pytest.mark.parametrize("activation", TORCHS)
def test_the_short_way_is_the_provider(activation, monkeypatch, tmp_path, request):
    """Automatic choice where nothing was measured, and so the order of the providers decides; batch_invariant."""
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    rules.forget()
    request.addfinalizer(rules.forget)
    x, bias = draw(4, 128).float(), draw(128, seed=4).float()
    with fusednorm.use_provider("cpu"):
        expected = bias_act_dropout(x, bias, activation)
    assert torch.equal(bias_act_dropout(x, bias, activation), expected)
    assert "cpu, one fused op" in fusednorm.explain(bias_act_dropout, x, bias, activation)
    with fusednorm.batch_invariant():
        assert torch.equal(bias_act_dropout(x.requires_grad_(), bias, activation), expected)


# --- dropout_mask ---


@pytest.mark.parametrize("p", [0.0, 2.0**-33, 0.3, 1 - 2.0**-53])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, SEED])
@pytest.mark.parametrize(
    "shape", [(), (1,), (130,), (0, 5), (5, 0), (9, 3), (7, 31), (3, 4099), (2, 3, 65), (515, 40)], ids=str
)
def test_the_native_mask_is_torchs(shape, seed, p, on_instruction_sets, monkeypatch):
    """That of the library on every instruction set, and that of torch's integer operators."""
    masks = on_instruction_sets(lambda: dropout_mask(shape, p, seed, "cpu"))
    monkeypatch.setattr(dropout, "_native_serves", lambda seed: False)
    expected = dropout_mask(shape, p, seed, "cpu")
    for mask in masks:
        assert mask.dtype == torch.bool and mask.shape == expected.shape
        assert torch.equal(mask, expected)


def test_the_native_mask_does_not_depend_on_the_number_of_threads(on_threads):
    assert_same_bits(*on_threads(lambda: [dropout_mask((300, 4099), 0.3, SEED)]))


def test_masks_under_a_transform_and_a_mode_are_torchs():
    """Where kernels that read memory themselves must not be reached."""
    expected = dropout_mask((5, 33), 0.4, 9)
    x = torch.ones(4, 5, 33)
    y = torch.func.vmap(lambda t: bias_act_dropout(t, None, "relu", 0.4, seed=9))(x)
    assert torch.equal(y > 0, expected.expand(4, 5, 33))
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert dropout_mask((5, 33), 0.4, 9).shape == (5, 33)
