"""The Triton kernels in the interpreter: every form of tile, every epilogue, against float64.

The interpreter runs a program at a time in Python, so each shape here is the smallest that reaches its code path.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import Call, check
from shapes import FUSED, PLAIN, Shape, inputs, named, random_leaves

import fusednorm
from fusednorm.providers.triton import norm_config as table
from fusednorm.providers.triton import strides as triton_layout

pytestmark = pytest.mark.usefixtures("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    *named("one_element", "odd_width_masked_lanes", "three_lead_dimensions", "transposed", "permuted_lead"),
    *named("last_dimension_step_2", "slice_of_fused_projection", "expanded_rows", "no_rows", "no_columns"),
    Shape("narrow_several_rows_a_program", (37, 8)),
    Shape("one_row", (1, 24)),
    Shape("one_aligned_tile", (3, 1024)),
    Shape("four_chunks_padded", (5, 1000)),
    Shape("more_rows_than_programs", (131, 40)),
    Shape("normalized_2d", (3, 4, 6), normalized_ndim=2),
]
EPILOGUES = {
    "bare": ((), {}),
    "dropout": (("x_bias",), {"dropout_p": 0.3, "seed": 11}),
    "everything": (("x_bias", "layer_scale"), {"dropout_p": 0.2, "drop_path_p": 0.3, "seed": 2**63 + 5}),
    "zero_centered": ((), {"zero_centered_weight": True}),
    "memory_efficient": ((), {"memory_efficient": True}),
    "float32_stream": ((), {"residual_dtype": torch.float32}),
}


@pytest.mark.certifies("forward", "backward", "strided")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("function", PLAIN + FUSED)
def test_triton_norm_at_every_layout(function, shape, dtype, generator):
    leaves = random_leaves(shape, inputs(function), dtype, "cpu", generator)
    check(Call(function, shape.normalized_ndim, shape.view), leaves, generator)


@pytest.mark.certifies("forward", "backward")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("function", FUSED)
def test_triton_norm_with_every_epilogue(function, epilogue, dtype, generator):
    extra, options = EPILOGUES[epilogue]
    leaves = random_leaves(Shape("", (3, 5, 36)), (*inputs(function), *extra), dtype, "cpu", generator)
    check(Call(function, options=options), leaves, generator)


@pytest.mark.certifies("forward", "backward")
@pytest.mark.parametrize("width", [203, 256], ids=["odd", "aligned"])
@pytest.mark.parametrize("epilogue", ["bare", "everything", "memory_efficient"])
@pytest.mark.parametrize("function", PLAIN + FUSED)
def test_triton_norm_of_rows_wider_than_registers(function, epilogue, width, tiny_tiles, generator):
    extra, options = EPILOGUES[epilogue] if function.startswith("add_") else ((), {})
    leaves = random_leaves(Shape("", (5, width)), (*inputs(function), *extra), torch.bfloat16, "cpu", generator)
    check(Call(function, options=options), leaves, generator)


@pytest.mark.parametrize("value", [100.0, 1e25], ids=["moderate", "whose_square_overflows"])
@pytest.mark.parametrize("columns", [1000, 1024, 768])
def test_triton_norm_of_a_constant_row_is_zero(columns, value):
    """The mean of equal numbers is that number, to the last bit."""
    assert not fusednorm.layer_norm(torch.full((2, columns), value), columns).any()


def test_triton_norm_of_a_constant_wide_row_is_zero(tiny_tiles):
    assert not fusednorm.layer_norm(torch.full((2, 203), 1e25), 203).any()


@pytest.mark.certifies("forward", op="dropout_mask")
@pytest.mark.parametrize("columns", [1, 3, 4, 65, 1030])
def test_triton_dropout_is_dropout_mask(columns):
    _, z = fusednorm.add_layer_norm(torch.ones(9, columns), None, columns, dropout_p=0.4, seed=-3)
    assert torch.equal(z != 0, fusednorm.dropout_mask((9, columns), 0.4, -3))


def test_triton_backward_repeats_bit_for_bit():
    x, weight = torch.randn(67, 72, requires_grad=True), torch.randn(72, requires_grad=True)
    cotangent = torch.randn(67, 72)
    runs = [
        torch.autograd.grad(fusednorm.add_layer_norm(x, x.detach(), 72, weight)[0], (x, weight), cotangent)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_triton_variants_do_not_depend_on_the_row_count(launches):
    """What names a compiled variant is the same for any number of rows: nothing is compiled anew."""
    weight = torch.ones(64, requires_grad=True)
    for rows in (1, 16, 17, 4096):
        x = torch.zeros(rows, 64, requires_grad=True)
        normed, z = fusednorm.add_layer_norm(x, x.detach(), 64, weight)
        torch.autograd.grad((normed, z), (x, weight), (torch.zeros(rows, 64), torch.zeros(rows, 64)))
    assert len({launch.compiled for launch in launches}) == 3  # forward, backward, and the sum of its partials


def test_one_value_expanded_over_the_columns_costs_the_others_no_alignment():
    x = torch.randn(6, 64)
    rows = triton_layout.Rows((torch.ones(()).expand(6, 64), x), 1, 64)
    assert rows.layout(True).kind == 0 and rows.copied == [True, False]
    rows = triton_layout.Rows((torch.randn(64).expand(6, 64), x), 1, 64)  # one row for all is read where it lies
    assert rows.layout(True).kind == 0 and rows.copied is None and rows.strides[0] == (0, 0, 1)


def test_triton_refuses_dropout_over_several_dimensions():
    with pytest.raises(ValueError, match=r"dropout_p.*flatten"):
        fusednorm.add_layer_norm(torch.ones(2, 3, 4), None, (3, 4), dropout_p=0.1)


def test_table_counts_on_no_more_warps_than_the_smallest_multiprocessor_has(monkeypatch):
    """48 on compute capability 8.6, 8.9 and 12.0, where registers alone would let more programs fit."""
    monkeypatch.setattr(table, "_BACKWARD_REGISTERS", ((4, 4),) * 4)
    configs = {table.backward(n, load, small) for n in range(64, 20000, 64) for load in range(4) for small in (0, 1)}
    questions = [(n, *switches) for n in range(64, 40000, 64) for switches in itertools.product((0, 1), repeat=4)]
    configs |= {table.forward(*question) for question in questions}
    assert max(config.warps * config.per_sm for config in configs) <= 48
    assert any(config.per_sm > 1 and config.warps > 4 for config in configs)
