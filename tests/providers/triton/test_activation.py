"""The Triton kernels of ``bias_act_dropout`` in the interpreter: every layout and switch, against float64.

The interpreter runs a program at a time in Python, so each shape here is the smallest that reaches its code path.
"""

from __future__ import annotations

import contextlib

import oracle_activation
import pytest
import torch
from oracle import check
from oracle_activation import ACTIVATIONS, ActivationCall
from shapes import Shape, named, random_leaves

from fusednorm import bias_act_dropout
from fusednorm.providers.triton import activation as triton_activation
from tests.activation import test_activation as general

pytestmark = pytest.mark.usefixtures("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DROPOUT = pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 2**63 + 5}], ids=["bare", "dropout"])
BOTH = ("x", "bias")
SHAPES = [
    *named("one_element", "odd_width_masked_lanes", "no_lead_dimension", "three_lead_dimensions", "transposed"),
    *named("permuted_lead", "last_dimension_step_2", "slice_of_fused_projection", "expanded_rows"),
    *named("no_rows", "no_columns"),
    Shape("narrow_several_rows_a_program", (37, 8)),
    Shape("one_aligned_tile", (3, 1024)),
    Shape("several_tiles_a_row_padded", (3, 1304)),
    Shape("odd_tiles_a_row", (3, 1101)),
    Shape("more_row_groups_than_programs", (277, 40)),
]


@pytest.mark.certifies("forward", "backward", "strided", op="bias_act_dropout")
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@DROPOUT
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_activation_at_every_layout(shape, options, dtype, generator):
    leaves = random_leaves(shape, BOTH, dtype, "cpu", generator)
    check(ActivationCall("gelu_tanh", shape.view, options), leaves, generator)


@pytest.mark.certifies("forward", "backward", op="bias_act_dropout")
@pytest.mark.parametrize("names", [BOTH, ("x",)], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@DROPOUT
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_activation_with_every_switch(activation, options, dtype, names, generator):
    leaves = random_leaves(Shape("", (3, 5, 36)), names, dtype, "cpu", generator)
    check(ActivationCall(activation, options=options), leaves, generator)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64], ids=str)
def test_triton_activation_of_mixed_dtypes(bias_dtype, generator):
    leaves = random_leaves(Shape("", (9, 40)), BOTH, torch.bfloat16, "cpu", generator, {"bias": bias_dtype})
    check(ActivationCall("gelu"), leaves, generator)


@pytest.mark.certifies("forward", op="dropout_mask")
@pytest.mark.parametrize("columns", [1, 3, 4, 65, 1030])
def test_triton_activation_drops_what_dropout_mask_drops(columns):
    general.test_the_mask_is_dropout_mask((9, columns), contextlib.nullcontext(), "cpu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_activation_of_huge_values_and_nan(activation):
    oracle_activation.hold_to_torch_at_huge_values(activation)


def test_triton_activation_of_a_column_dropped_whole():
    oracle_activation.hold_to_a_column_dropped_whole(4)


def test_triton_activation_backward_repeats_bit_for_bit():
    x, bias = torch.randn(131, 72, requires_grad=True), torch.randn(72, requires_grad=True)
    dy = torch.randn(131, 72)
    runs = [torch.autograd.grad(bias_act_dropout(x, bias, "silu"), (x, bias), dy) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_triton_activation_variants_do_not_depend_on_the_row_count(launches):
    bias = torch.ones(64, requires_grad=True)
    for rows in (1, 16, 17, 4096):
        x = torch.zeros(rows, 64, requires_grad=True)
        y = bias_act_dropout(x, bias, "gelu", 0.1)
        torch.autograd.grad(y, (x, bias), torch.zeros(rows, 64))
    assert len({launch.compiled for launch in launches}) == 3  # forward, backward, and the sum of its partials


@pytest.mark.parametrize("wanted", [("x",), ("bias",)], ids=str)
def test_triton_activation_launches_only_what_is_wanted(wanted, launches):
    """No gradient of the bias: no partials, and nothing to sum. None of x: it is not written."""
    leaves = {"x": torch.zeros(8, 64), "bias": torch.ones(64)}
    for name in wanted:
        leaves[name].requires_grad_()
    y = bias_act_dropout(**leaves)
    torch.autograd.grad(y, [leaves[name] for name in wanted], torch.zeros(8, 64))
    (backward, *sums) = [launch for launch in launches if "fwd" not in launch.kernel]
    assert [dtype is not None for dtype in backward.dtypes[4:]] == ["x" in wanted, "bias" in wanted]
    assert bool(sums) == ("bias" in wanted)


def test_triton_activation_keeps_to_the_grids_limit(launches):
    x = torch.zeros(1, 1).expand(4_000_000, 1)
    bias_act_dropout(x, None)
    assert launches[0].grid == (1, 65535)


def test_triton_activation_of_more_groups_than_programs(monkeypatch, generator):
    monkeypatch.setattr(triton_activation, "_MOST_GROUPS", 2)
    leaves = random_leaves(Shape("", (131, 40)), BOTH, torch.float32, "cpu", generator)
    check(ActivationCall("relu", options={"dropout_p": 0.2, "seed": 5}), leaves, generator)
