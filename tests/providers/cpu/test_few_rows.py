"""The CPU library's product of few rows with a weight."""

import pytest
import torch
import torch.nn.functional as F

from fusednorm.providers.cpu import library
from tests.providers.cpu.test_norm import instruction_sets, on_instruction_sets, on_threads, pytestmark

__all__ = ["instruction_sets", "on_instruction_sets", "on_threads", "pytestmark"]  # which pytest finds by name
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(rows, outputs, terms, dtype=torch.float32, with_bias=True):
    sizes = ((rows, terms), (outputs, terms), (outputs,))
    x, weight, bias = (torch.randn(size).to(dtype) for size in sizes)
    return x, weight, bias if with_bias else None


def error(found, exact):
    return ((found.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [1, 3, 4, 30])
@pytest.mark.parametrize("terms", [1, 15, 16, 17, 511, 512, 513, 1100])
def test_every_size_on_every_instruction_set(dtype, outputs, terms, on_instruction_sets):
    for rows in range(1, 9):
        x, weight, bias = operands(rows, outputs, terms, dtype, with_bias=rows % 2 == 0)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        # of the terms as they stand: a sum may cancel
        size = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
        rounding = 2 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-24
        for found in on_instruction_sets(lambda a=x, w=weight, b=bias: library.few_rows(a, w, b)):
            assert found.shape == exact.shape and found.dtype is dtype
            assert ((found.double() - exact).abs() <= 1.01 * rounding).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "terms"), [(768, 256), (256, 1024), (512, 3072), (300, 4096)])
def test_the_error_is_at_most_twice_torchs(dtype, outputs, terms):
    x, weight, bias = operands(8, outputs, terms, dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    ours = [library.few_rows(x[:rows], weight, bias) for rows in (1, 2, 4, 8)]
    for found in ours:
        rows = len(found)
        assert error(found, exact[:rows]) <= 2 * error(F.linear(x[:rows], weight, bias), exact[:rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_among_others_and_over_threads(dtype, on_threads):
    x, weight, bias = operands(8, 517, 300, dtype)
    whole = library.few_rows(x, weight, bias)
    for rows in range(1, 8):
        assert torch.equal(library.few_rows(x[:rows], weight, bias), whole[:rows])
    for found in on_threads(lambda: library.few_rows(x, weight, bias)):
        assert torch.equal(found, whole)


def test_dimensions_of_x_are_kept():
    _, weight, bias = operands(1, 5, 12)
    for shape in ((12,), (1, 12), (2, 3, 12), (2, 1, 2, 12)):
        x = torch.randn(shape)
        torch.testing.assert_close(library.few_rows(x, weight, bias), F.linear(x, weight, bias))
    assert library.few_rows(torch.randn(0, 12), weight, bias).shape == (0, 5)
    assert library.few_rows(torch.randn(2, 12), torch.randn(0, 12), None).shape == (2, 0)


def test_nan_and_infinity_reach_their_own_results_alone():
    x, weight, bias = operands(3, 40, 100)
    x[1, 99], weight[7, 3], bias[11] = torch.nan, torch.inf, -torch.inf
    ours, theirs = library.few_rows(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isposinf(), theirs.isposinf())
    assert torch.equal(ours.isneginf(), theirs.isneginf())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.randn(9, 18)}, "x: expected at most 8 rows, got 9"),
        ({"x": torch.tensor(1.0)}, "x: expected at least one dimension"),
        ({"x": torch.randn(2, 17)}, "weight: its shape does not fit 17 columns of x"),
        ({"x": torch.randn(18, 2).t()}, "x: expected a contiguous tensor"),
        ({"x": torch.randn(2, 18).double()}, "x: expected float32, bfloat16 or float16"),
        ({"x": torch.randn(2, 0), "weight": torch.randn(7, 0)}, "x: expected at least one column"),
        ({"weight": torch.randn(7, 18).bfloat16()}, "weight: expected the dtype of x"),
        ({"weight": torch.randn(18, 7).t()}, "weight: expected a contiguous tensor"),
        ({"weight": torch.randn(18)}, "weight: its shape does not fit 18 columns of x"),
        ({"bias": torch.randn(6)}, "bias"),
        ({"bias": torch.randn(7).half()}, "bias: expected the dtype of x"),
        ({"bias": torch.randn(14)[::2]}, "bias: expected a contiguous tensor"),
    ],
)
def test_what_it_does_not_take(change, said):
    x, weight, bias = operands(2, 7, 18)
    given = {"x": x, "weight": weight, "bias": bias} | change
    with pytest.raises(RuntimeError, match=said):
        library.few_rows(*given.values())
