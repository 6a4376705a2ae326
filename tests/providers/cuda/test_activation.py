"""The CUDA kernels of ``bias_act_dropout``, emulated on the CPU: every form, dtype, layout and switch against float64.

`test_sanitizers.py` runs this file once more on a library built with sanitizers. A machine with small blocks lets small
rows take several warps and several slabs.
"""

from __future__ import annotations

import contextlib

import oracle_activation
import pytest
import torch
from derivatives import gradients_of
from oracle import check
from oracle_activation import ACTIVATIONS, ActivationCall
from shapes import COTANGENTS, Shape, random_leaves

from fusednorm import bias_act_dropout
from fusednorm._options import ActivationInputs, ActivationOptions
from fusednorm.dispatch import eager
from tests.activation import test_activation as general
from tests.providers.conftest import MACHINE
from tests.providers.cuda.test_norm import DTYPE, DTYPES, LAYOUTS

pytestmark = pytest.mark.usefixtures("cuda")
DROPOUT = pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 2**63 + 5}], ids=["bare", "dropout"])
BOTH = ("x", "bias")
SMALL, LARGE = (32, 32, 1, 3), MACHINE


# Vectors of 16 bytes in a row, and a tail of elements: a block of the small machine holds 32.
FORMS = {
    "one_column": (0, 1, SMALL),
    "lanes_of_a_warp": (2, 0, SMALL),
    "lanes_with_a_tail": (5, 1, SMALL),
    "whole_warp": (32, 0, SMALL),
    "two_slabs": (33, 0, SMALL),
    "slabs_with_a_tail": (70, 1, SMALL),
    "several_warps": (40, 0, LARGE),
    "several_warps_with_a_tail": (40, 1, LARGE),
    "slabs_of_several_warps": (257, 0, LARGE),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 67], ids=["row", "rows"])
@DROPOUT
def test_cuda_activation_in_every_form(options, rows, dtype, form, generator):
    vectors, tail, machine = FORMS[form]
    torch.ops.fusednorm_cuda.emulate(*machine, rows)
    shape = Shape("", (min(rows, 9) if vectors > 30 else rows, vectors * 16 // dtype.itemsize + tail))
    check(ActivationCall("silu", options=options), random_leaves(shape, BOTH, dtype, "cpu", generator), generator)


@pytest.mark.certifies("forward", "backward", op="bias_act_dropout")
@DTYPE
@DROPOUT
@pytest.mark.parametrize("names", [BOTH, ("x",)], ids=["bias", "no_bias"])
@pytest.mark.parametrize("columns", [40, 37], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cuda_activation_with_every_switch(activation, columns, names, options, dtype, generator):
    leaves = random_leaves(Shape("", (3, 5, columns)), names, dtype, "cpu", generator)
    check(ActivationCall(activation, options=options), leaves, generator)


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
@DTYPE
@pytest.mark.parametrize("columns", [40, 37], ids=["aligned", "unaligned"])
def test_cuda_activation_with_a_bias_of_another_dtype(columns, dtype, bias_dtype, generator):
    leaves = random_leaves(Shape("", (9, columns)), BOTH, dtype, "cpu", generator, {"bias": bias_dtype})
    check(ActivationCall("gelu_tanh"), leaves, generator)


@pytest.mark.certifies("forward", "backward", "strided", op="bias_act_dropout")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [shape for shape in LAYOUTS if shape.normalized_ndim == 1], ids=str)
def test_cuda_activation_at_every_layout(shape, dtype, generator):
    leaves = random_leaves(shape, BOTH, dtype, "cpu", generator)
    options = {"dropout_p": 0.2, "seed": 3}
    check(ActivationCall("gelu", shape.view, options), leaves, generator)


@pytest.mark.parametrize("layout", ["transposed", "one_value", "slice", "negative_bit"])
def test_cuda_activation_with_cotangents_of_any_layout(layout, generator):
    leaves = random_leaves(Shape("", (6, 24)), BOTH, torch.float32, "cpu", generator)
    check(ActivationCall("silu"), leaves, generator, lay=COTANGENTS[layout])


@pytest.mark.certifies("forward", op="dropout_mask")
@pytest.mark.parametrize("columns", [1, 3, 4, 65, 1030])
@DTYPE
def test_cuda_activation_drops_what_dropout_mask_drops(dtype, columns):
    general.test_the_mask_is_dropout_mask((9, columns), contextlib.nullcontext(), "cpu", dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cuda_activation_of_huge_values_and_nan(activation):
    oracle_activation.hold_to_torch_at_huge_values(activation)


@pytest.mark.parametrize("columns", [4, 5], ids=["aligned", "unaligned"])
def test_cuda_activation_of_a_column_dropped_whole(columns):
    oracle_activation.hold_to_a_column_dropped_whole(columns)


@pytest.mark.certifies("deterministic", op="bias_act_dropout")
@pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small_blocks", "large_blocks"])
@pytest.mark.parametrize("columns", [24, 137])
def test_cuda_activation_repeats_bit_for_bit_in_any_order_of_threads(columns, machine):
    x, bias = torch.randn(131, columns, requires_grad=True), torch.randn(columns, requires_grad=True)
    dy = torch.randn(131, columns)
    runs = []
    for seed in (1, 2, 3):
        torch.ops.fusednorm_cuda.emulate(*machine, seed)
        runs.append(torch.autograd.grad(bias_act_dropout(x, bias, "silu"), (x, bias), dy))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))


@pytest.mark.parametrize("wanted", BOTH)
def test_cuda_activation_gives_each_gradient_alone(wanted):
    leaves, dy = {"x": torch.randn(9, 40), "bias": torch.randn(40)}, torch.ones(9, 40).cumsum(1)
    run = ActivationCall("gelu", options={"dropout_p": 0.2, "seed": 1}).ours
    one, both = (gradients_of(needed, run, leaves, [dy]) for needed in ([wanted], BOTH))
    assert torch.equal(one[wanted], both[wanted])


def test_cuda_activation_refuses_strides_its_kernels_do_not_read():
    for x in (torch.ones(8, 4).t(), torch.ones(4, 16)[:, ::2], torch.ones(4, 1).expand(4, 8)):
        with pytest.raises(ValueError, match=r"'cuda' cannot run.*x: strides"):
            bias_act_dropout(x, None)


@pytest.mark.parametrize("mask", [[True, True], [True, False], [False, True]], ids=str)
def test_cuda_activation_op_gives_what_the_reference_gives(mask):
    """Shapes and dtypes of all outputs, those not asked for too."""
    x, bias = torch.randn(5, 24).bfloat16(), torch.randn(24)
    call = x, ActivationInputs(x, bias), ActivationOptions("relu", 0.0), mask
    results = [eager.call("bias_act_dropout_bwd", *call, provider=p) for p in ("cuda", "reference")]
    assert len({tuple((t.shape, t.dtype) for t, wanted in zip(r, mask) if wanted) for r in results}) == 1
    assert all(bool(t.numel()) == wanted for r in results for t, wanted in zip(r, mask))
