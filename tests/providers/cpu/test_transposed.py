"""The CPU library's transposed copy of a matrix."""

import pytest
import torch

from fusednorm.providers.cpu import library
from tests.providers.cpu.test_norm import instruction_sets, on_instruction_sets, on_threads, pytestmark

__all__ = ["instruction_sets", "on_instruction_sets", "on_threads", "pytestmark"]  # which pytest finds by name


@pytest.mark.parametrize("columns", [0, 1, 3, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("rows", [0, 1, 4, 15, 16, 33, 128])
def test_every_shape_on_every_instruction_set(rows, columns, on_instruction_sets):
    x = torch.randn(rows, columns)
    for found in on_instruction_sets(lambda: library.transposed(x)):
        assert found.is_contiguous() and torch.equal(found, x.t())


def test_every_bit_is_kept_over_several_threads(on_instruction_sets):
    bits = torch.randint(-(2**31), 2**31, (300, 1000), dtype=torch.int32)  # NaNs of every kind among them
    for found in on_instruction_sets(lambda: library.transposed(bits.view(torch.float32))):
        assert torch.equal(found.view(torch.int32), bits.t())


def test_a_part_of_a_storage():
    whole = torch.randn(1 + 40 * 24)
    x = whole[1:].view(40, 24)
    assert torch.equal(library.transposed(x), x.t())


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.randn(4), "x: expected two dimensions, got 1"),
        (torch.randn(2, 3, 4), "x: expected two dimensions, got 3"),
        (torch.randn(4, 4, dtype=torch.float64), "x: expected float32"),
        (torch.randn(4, 6).t(), "x: expected a contiguous matrix"),
        (torch.randn(4, 6)[:, :3], "x: expected a contiguous matrix"),
        (torch.randn(4, 1).expand(4, 6), "x: expected a contiguous matrix"),
    ],
)
def test_what_it_does_not_take(x, said):
    with pytest.raises(RuntimeError, match=said):
        library.transposed(x)
