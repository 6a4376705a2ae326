"""The CUDA kernels, emulated on the CPU: every form, dtype, layout and epilogue against float64.

`test_sanitizers.py` runs this file once more on a library built with sanitizers. A machine with small blocks lets small
rows reach the forms of wide ones: warps, blocks, clusters, tiles and slabs.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from derivatives import gradients_of
from oracle import DTYPES, Call, check
from shapes import COTANGENTS, FUSED, PLAIN, Shape, inputs, named, random_leaves

import fusednorm
from fusednorm._options import NormGradOptions, NormInputs, NormOptions, NormSaved
from fusednorm.dispatch import eager
from fusednorm.providers.cuda import norm as cuda
from fusednorm.providers.reference import norm as reference
from tests.norm import test_norm as general
from tests.providers.conftest import MACHINE

pytestmark = pytest.mark.usefixtures("cuda")

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
MACHINES = {
    "large_blocks": MACHINE,
    "clusters_of_small_blocks": (32, 32, 8, 2),
    "small_blocks_without_clusters": (32, 32, 1, 3),
}


def emulate(machine: str, seed: int = 1) -> None:
    torch.ops.fusednorm_cuda.emulate(*MACHINES[machine], seed)


# Vectors of 16 bytes in a row, and a tail of elements: a warp of the forward holds 32, 64 and 128 of them in 1, 2 and 4
# a lane; with 32 threads a block for each vector a thread, a block holds 512 (256 where rows are not aligned), one of
# the backward 32; clusters 8 times as many.
WIDTHS = {
    "one_column": (0, 1),
    "lanes_of_a_warp": (2, 0),
    "lanes_with_a_tail": (5, 1),
    "whole_warp": (32, 0),
    "cluster_of_two_backward": (33, 0),
    "unaligned_cluster_backward": (40, 1),
    "two_vectors_a_lane": (63, 0),
    "four_vectors_a_lane": (127, 0),
    "several_warps": (260, 0),
    "unaligned_cluster_both": (257, 1),
    "aligned_cluster_both": (513, 0),
}


@pytest.mark.certifies("forward", "backward")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("function", "rows"), [("add_layer_norm", 1), ("add_layer_norm", 19), ("rms_norm", 19)], ids=["row", "rows", "rms"]
)
def test_cuda_norm_in_every_form(function, dtype, machine, width, rows, generator):
    vectors, tail = WIDTHS[width]
    emulate(machine, seed=rows)
    shape = Shape("", (min(rows, 5) if vectors > 100 else rows, vectors * 16 // dtype.itemsize + tail))
    check(Call(function), random_leaves(shape, inputs(function), dtype, "cpu", generator), generator)


@pytest.mark.parametrize("columns", [8 * 512 * 4 + 4, 8 * 256 * 4 + 1], ids=["aligned", "unaligned"])
def test_cuda_norm_of_rows_wider_than_a_cluster(columns, generator):
    """Tiles over all blocks of the cluster forward, slabs backward."""
    emulate("clusters_of_small_blocks")
    leaves = random_leaves(Shape("", (2, columns)), inputs("add_layer_norm"), torch.float32, "cpu", generator)
    check(Call("add_layer_norm"), leaves, generator)


@pytest.mark.certifies("forward", "backward")
@DTYPE
@pytest.mark.parametrize("columns", [40, 37], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("epilogue", general.EPILOGUES)
@pytest.mark.parametrize("function", FUSED)
def test_cuda_norm_with_every_epilogue(function, epilogue, columns, dtype, generator):
    shape = Shape("", (3, 5, columns))
    general.test_add_norm_epilogue(function, epilogue, shape, True, dtype, contextlib.nullcontext(), "cpu", generator)


@pytest.mark.parametrize("width", [(257, 1), (513, 0)], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["keep_z", "keep_normed"])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=["float32_stream", "bfloat16_stream"])
def test_cuda_norm_of_wide_rows_with_epilogue(stream, memory_efficient, machine, width, generator):
    emulate(machine)
    options = {"dropout_p": 0.2, "drop_path_p": 0.3, "seed": 5, "memory_efficient": memory_efficient}
    names = (*inputs("add_layer_norm"), "x_bias", "layer_scale")
    shape = Shape("", (3, width[0] * 8 + width[1]))
    leaves = random_leaves(shape, names, torch.bfloat16, "cpu", generator, {"residual": stream})
    check(Call("add_layer_norm", options=options), leaves, generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "names", [("x", "residual", "weight", "bias"), ("x", "weight", "bias", "x_bias")], ids=["add", "first"]
)
@pytest.mark.parametrize("residual", [torch.float32, None], ids=["float32_residual", "16_bit_residual"])
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["keep_z", "keep_normed"])
@pytest.mark.parametrize("columns", [40, 37], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["bare", "dropout"])
def test_cuda_norm_beside_a_float32_stream(dropout_p, columns, memory_efficient, residual, names, dtype, generator):
    """A residual of the rows' dtype has a gradient of its own only where something stands between x and z."""
    options = {"residual_dtype": torch.float32, "memory_efficient": memory_efficient}
    options |= {"dropout_p": dropout_p, "seed": 3}
    leaves = random_leaves(Shape("", (9, columns)), names, dtype, "cpu", generator, {"residual": residual or dtype})
    call = Call("add_layer_norm", options=options)
    check(call, leaves, generator)
    check(call, leaves, generator, used=(True, False))


@pytest.mark.parametrize("width", [257, 513], ids=["four_vectors", "cluster"])
def test_cuda_norm_of_wide_rows_into_a_float32_stream(width, generator):
    emulate("clusters_of_small_blocks")
    leaves = random_leaves(Shape("", (3, width * 8)), inputs("add_rms_norm"), torch.bfloat16, "cpu", generator)
    options = {"residual_dtype": torch.float32, "dropout_p": 0.2, "seed": 5}
    check(Call("add_rms_norm", options=options), leaves, generator)


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["keep_z", "keep_normed"])
@pytest.mark.parametrize("columns", [40, 37], ids=["aligned", "unaligned"])
def test_cuda_norm_with_parameters_of_another_dtype(columns, memory_efficient, dtype, parameter_dtype, generator):
    parameters = dict.fromkeys(("weight", "bias", "x_bias", "layer_scale"), parameter_dtype)
    names = ("x", "residual", *parameters)
    leaves = random_leaves(Shape("", (9, columns)), names, dtype, "cpu", generator, parameters)
    check(Call("add_layer_norm", options={"memory_efficient": memory_efficient}), leaves, generator)


LAYOUTS = [
    *named("no_lead_dimension", "permuted_lead", "rows_step_2", "slice_of_fused_projection", "expanded_rows"),
    *named("expanded_middle", "no_rows", "no_columns"),
    Shape("normalized_2d", (3, 4, 6), normalized_ndim=2),
    Shape("two_row_strides_unaligned", (3, 4, 17), lambda leaf: leaf.transpose(0, 1)),
    Shape("rows_off_the_boundary", (5, 3 * 24), lambda leaf: leaf[:, 25:49]),
    Shape("one_column_of_many", (5, 3), lambda leaf: leaf[:, 1:2]),
]


@pytest.mark.certifies("forward", "backward", "strided")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
@pytest.mark.parametrize("function", ["layer_norm", "add_rms_norm"])
def test_cuda_norm_at_every_layout(function, shape, dtype, generator):
    leaves = random_leaves(shape, inputs(function), dtype, "cpu", generator)
    check(Call(function, shape.normalized_ndim, shape.view), leaves, generator)


@pytest.mark.parametrize("layout", ["transposed", "one_value", "slice", "negative_bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_norm_with_cotangents_of_any_layout(dtype, layout, generator):
    leaves = random_leaves(Shape("", (6, 24)), inputs("add_layer_norm"), dtype, "cpu", generator)
    check(Call("add_layer_norm"), leaves, generator, lay=COTANGENTS[layout])


@pytest.mark.parametrize("wanted", range(6))
def test_cuda_norm_gives_each_gradient_alone(wanted, generator):
    names = ("x", "residual", "weight", "bias", "x_bias", "layer_scale")
    leaves = random_leaves(Shape("", (9, 40)), names, torch.float64, "cpu", generator)
    run, name = Call("add_layer_norm", options={"dropout_p": 0.2, "seed": 11}).ours, names[wanted]
    cotangents = [torch.ones(9, 40).double().cumsum(1), torch.ones(9, 40).double()]
    one, every = (gradients_of(needed, run, leaves, cotangents) for needed in ([name], names))
    assert torch.equal(one[name], every[name])


@pytest.mark.certifies("forward", op="dropout_mask")
@pytest.mark.parametrize("columns", [1, 3, 4, 65, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_cuda_dropout_is_dropout_mask(dtype, columns):
    _, z = fusednorm.add_layer_norm(torch.ones(9, columns, dtype=dtype), None, columns, dropout_p=0.4, seed=-3)
    assert torch.equal(z != 0, fusednorm.dropout_mask((9, columns), 0.4, -3))


@pytest.mark.certifies("deterministic", op="add_layer_norm")
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("columns", [72, 1028])
def test_cuda_norm_repeats_bit_for_bit_in_any_order_of_threads(columns, machine):
    x, weight = torch.randn(37, columns, requires_grad=True), torch.randn(columns, requires_grad=True)
    cotangent = torch.randn(37, columns)
    runs = []
    for seed in (1, 2, 3):
        emulate(machine, seed)
        normed, _ = fusednorm.add_layer_norm(x, x.detach(), columns, weight)
        runs.append((normed, *torch.autograd.grad(normed, (x, weight), cotangent)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("columns", [24, 25, 1028])
def test_cuda_norm_of_a_row_does_not_depend_on_the_others(columns):
    x, cotangent = torch.randn(33, columns), torch.randn(33, columns)
    results = []
    for rows in (33, 5):
        leaf = x[:rows].clone().requires_grad_()
        normed, _ = fusednorm.add_layer_norm(leaf, leaf.detach(), columns)
        results.append((normed[:5].detach(), torch.autograd.grad(normed, leaf, cotangent[:rows])[0][:5]))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("value", [100.0, 1e25], ids=["moderate", "whose_square_overflows"])
@pytest.mark.parametrize("columns", [768, 1000, 1024, 2048 * 4])
@pytest.mark.parametrize("machine", MACHINES)
def test_cuda_norm_of_a_constant_row_is_zero(machine, columns, value):
    """The mean of equal numbers is that number, to the last bit."""
    emulate(machine)
    assert not fusednorm.layer_norm(torch.full((2, columns), value), columns).any()


def test_cuda_norm_of_finite_numbers_near_the_largest_is_finite():
    x = torch.full((2, 3000), 3e38)
    assert not fusednorm.layer_norm(x, 3000).any()


REFUSED = {
    "x: strides": lambda: fusednorm.layer_norm(torch.ones(8, 4).t(), 8),
    "x: strides (16, 2)": lambda: fusednorm.layer_norm(torch.ones(4, 16)[:, ::2], 8),
    "x: strides (1, 0)": lambda: fusednorm.layer_norm(torch.ones(4, 1).expand(4, 8), 8),
    "residual: strides": lambda: fusednorm.add_layer_norm(torch.ones(4, 8), torch.ones(8, 4).t(), 8),
    "x: strides (4, 24, 96, 1)": lambda: fusednorm.layer_norm(torch.ones(2, 4, 6, 4).transpose(0, 2), 4),
    "dtypes": lambda: fusednorm.add_layer_norm(torch.ones(4, 8), torch.ones(4, 8).bfloat16(), 8),
    "dtypes ": lambda: fusednorm.add_layer_norm(torch.ones(4, 8).half(), torch.ones(4, 8).bfloat16(), 8),
    "dtypes  ": lambda: fusednorm.add_layer_norm(
        torch.ones(4, 8).half(), torch.ones(4, 8), 8, residual_dtype=torch.float16
    ),
    "several dimensions": lambda: fusednorm.add_layer_norm(torch.ones(2, 3, 4), None, (3, 4), dropout_p=0.1),
}


@pytest.mark.parametrize("said", REFUSED)
def test_cuda_refuses_what_its_kernels_do_not_read(said):
    with pytest.raises(ValueError, match=rf"'cuda' cannot run.*{said.strip().split(' (')[0]}"):
        REFUSED[said]()


@pytest.mark.parametrize("function", PLAIN)
def test_cuda_op_gives_what_the_reference_gives(function):
    """Shapes and dtypes of all outputs, those not asked for too."""
    rms = function == "rms_norm"
    x, weight = torch.randn(5, 24), torch.randn(24)
    forward = NormInputs(x, x, weight), NormOptions(1, 1e-5, 0.0, 0.0, x.dtype, x.dtype, rms, False, True)
    ours, expected = (eager.call("add_layer_norm_fwd", *forward, provider=p) for p in ("cuda", "reference"))
    assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in expected]
    options = NormGradOptions(1, 0.0, 0.0, x.dtype, x.dtype, rms, False, False)
    backward = x, None, NormSaved(expected[1], expected[2], weight), options, [True, False, True, False, False, False]
    ours, expected = cuda.add_layer_norm_bwd(*backward), reference.add_layer_norm_bwd(*backward)
    assert [t.shape for t in ours] == [t.shape for t in expected]
