"""Forms of the CUDA kernels that are asked for by name, and rows that the backward fetches ahead, on the emulation."""

from __future__ import annotations

import pytest
import torch
from oracle import Call, check
from shapes import Shape, inputs, random_leaves

import fusednorm
from fusednorm._options import NormGradOptions, NormInputs, NormOptions, NormSaved
from fusednorm.providers.cuda import norm as cuda
from fusednorm.providers.reference import norm as reference


@pytest.fixture(autouse=True)
def on_the_emulation(cuda):
    force = torch.ops.fusednorm_cuda.force
    yield force
    for what in ("forward", "backward", "overlap"):
        force(what, [])


# (chunks, threads, rows, ranks) for rows of 64 vectors: more threads than vectors, as many, fewer by tiles
FORWARD = {
    "one_vector_a_thread": (1, 64, 1, 1),
    "idle_threads": (1, 128, 1, 1),
    "two_vectors_a_thread": (2, 32, 1, 1),
    "four_vectors_a_thread": (4, 64, 1, 1),
    "rows_side_by_side": (2, 32, 4, 1),
    "four_vectors_a_thread_and_rows_side_by_side": (4, 16, 4, 1),
    "cluster_of_two": (1, 32, 1, 2),
    "cluster_with_idle_blocks": (4, 32, 1, 8),
    "tiles": (1, 32, 1, 1),
    "tiles_of_rows_side_by_side": (2, 8, 8, 1),
    "tiles_of_a_cluster": (4, 32, 1, 2),
}


@pytest.mark.parametrize("form", FORWARD)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["bare", "dropout"])
def test_cuda_norm_forward_in_a_forced_form(form, dropout_p, on_the_emulation, generator):
    on_the_emulation("forward", list(FORWARD[form]))
    vectors = 300 if form == "tiles_of_a_cluster" else 64
    leaves = random_leaves(Shape("", (5, vectors * 8)), inputs("add_layer_norm"), torch.bfloat16, "cpu", generator)
    check(Call("add_layer_norm", options={"dropout_p": dropout_p, "seed": 3}), leaves, generator)


# (threads, rows, ranks, programs)
BACKWARD = {
    "one_program_of_many_rounds": (64, 1, 1, 1),
    "a_program_a_row": (64, 1, 1, 1000),
    "idle_threads": (128, 1, 1, 3),
    "two_rows_of_two_warps": (64, 2, 1, 2),
    "eight_rows_of_two_warps": (64, 8, 1, 0),
    "rows_with_idle_warps": (96, 5, 1, 1),
    "cluster_of_two": (32, 1, 2, 2),
    "cluster_with_idle_blocks": (32, 1, 8, 1),
    "slabs": (32, 1, 1, 2),
}


@pytest.mark.parametrize("form", BACKWARD)
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=["stream", "float32_stream"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["bare", "dropout"])
def test_cuda_norm_backward_in_a_forced_form(form, dropout_p, stream, on_the_emulation, generator):
    on_the_emulation("backward", list(BACKWARD[form]))
    names = (*inputs("add_layer_norm"), *(("x_bias",) if dropout_p else ()))
    leaves = random_leaves(Shape("", (11, 512)), names, torch.bfloat16, "cpu", generator, {"residual": stream})
    options = {"dropout_p": dropout_p, "seed": 3, "residual_dtype": stream}
    check(Call("add_layer_norm", options=options), leaves, generator)


def test_cuda_norm_adds_the_sums_of_many_programs(on_the_emulation, generator):
    on_the_emulation("backward", [8, 4, 1, 1000])
    leaves = random_leaves(Shape("", (4 * 150, 64)), inputs("add_layer_norm"), torch.bfloat16, "cpu", generator)
    check(Call("add_layer_norm"), leaves, generator)


@pytest.mark.parametrize(("rows", "processors"), [(3, 8), (40, 8), (100, 2)])
@pytest.mark.parametrize("columns", [32, 2048, 5000], ids=["lanes", "warps", "unaligned"])
def test_cuda_norm_backward_spreads_few_rows_over_the_multiprocessors(columns, rows, processors, generator):
    """Rows share a block only where enough blocks are left; what a row gets does not depend on it."""
    torch.ops.fusednorm_cuda.emulate(128, 512, 8, processors, 1)
    leaves = random_leaves(Shape("", (rows, columns)), inputs("rms_norm"), torch.bfloat16, "cpu", generator)
    check(Call("rms_norm"), leaves, generator)
    x, weight, cotangent = leaves["x"], leaves["weight"], torch.randn(rows, columns).bfloat16()
    gradients = []
    for count in (rows, 2):
        leaf = x.detach()[:count].clone().requires_grad_()
        gradients.append(torch.autograd.grad(fusednorm.rms_norm(leaf, columns, weight), leaf, cotangent[:count])[0][:2])
    assert torch.equal(*gradients)


def test_the_table_decides_again_after_an_empty_list(on_the_emulation):
    x = torch.randn(3, 512)
    on_the_emulation("forward", [1, 32, 1, 4])
    forced, _ = fusednorm.add_layer_norm(x, x, 512)
    on_the_emulation("forward", [])
    by_table, _ = fusednorm.add_layer_norm(x, x, 512)
    torch.testing.assert_close(forced, by_table)
    fusednorm.layer_norm(torch.randn(3, 33), 33)  # rows that are not aligned have one form
    assert torch.ops.fusednorm_cuda.forms(x, True).startswith("forward 4 32 4 1 1\nbackward 1 128 4 1 1\n")


REFUSED = {
    "forward: chunks, threads, rows, ranks": ("forward", [1, 32]),
    "chunks: 1, 2 or 4": ("forward", [3, 32, 1, 1]),
    "at most 128 threads": ("forward", [1, 256, 1, 1]),
    "threads: a power of two": ("forward", [1, 24, 1, 1]),
    "threads: a block of a cluster": ("backward", [16, 1, 2, 0]),
    "ranks: 1, 2, 4 or 8": ("backward", [32, 1, 3, 0]),
    "rows: 1": ("backward", [64, 2, 2, 0]),
    "forward: rows share a block": ("forward", [1, 64, 2, 1]),
    "a block has whole warps": ("backward", [8, 1, 1, 0]),
    "at most 512 threads": ("backward", [544, 1, 1, 0]),
    "forward, backward or overlap": ("sideways", []),
}


@pytest.mark.parametrize("said", REFUSED)
def test_no_form_is_forced_that_no_kernel_is_compiled_for(said, on_the_emulation):
    with pytest.raises(RuntimeError, match=said):
        on_the_emulation(*REFUSED[said])


@pytest.mark.parametrize("form", [(16, 4, 1, 0), (32, 1, 1, 0), (32, 1, 2, 0)], ids=["rows", "block", "cluster"])
def test_a_forced_backward_holds_a_row_or_takes_slabs_that_are_blocks(form, on_the_emulation):
    on_the_emulation("backward", list(form))
    x = torch.randn(3, 512, requires_grad=True)
    normed = fusednorm.layer_norm(x, 512)
    if form == (32, 1, 1, 0):
        normed.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="does not hold a row"):
            normed.sum().backward()


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
@pytest.mark.parametrize("columns", [8, 24, 520], ids=["lanes", "idle_lanes", "warps"])
def test_cuda_norm_backward_fetches_no_row_that_is_not_there(rows, columns, generator):
    """Fewer rows than are on their way at a time, and more; AddressSanitizer looks on in test_csrc_host."""
    leaves = random_leaves(Shape("", (rows, columns)), inputs("add_rms_norm"), torch.bfloat16, "cpu", generator)
    check(Call("add_rms_norm"), leaves, generator)


def test_cuda_norm_backward_of_rows_four_gigabytes_apart():
    """Past what 32 bits address: read where they lie, not fetched ahead."""
    far = torch.empty(2**31 + 16, dtype=torch.bfloat16).as_strided((2, 16), (2**31, 1))
    far.copy_(torch.randn(2, 16))
    z, weight = torch.randn(2, 16).bfloat16(), torch.randn(16).bfloat16()
    options = NormOptions(1, 1e-5, 0.0, 0.0, z.dtype, z.dtype, False, False, False)
    stats = reference.add_layer_norm_fwd(NormInputs(z, None, weight), options)[2]
    saved = NormSaved(z, stats, weight), NormGradOptions(1, 0.0, 0.0, z.dtype, z.dtype, False, False, False)
    mask = [True, False, True, False, False, False]
    ours, near = (cuda.add_layer_norm_bwd(dnormed, None, *saved, mask) for dnormed in (far, far.contiguous()))
    assert torch.equal(ours[2], near[2])
    torch.testing.assert_close(ours[0], near[0])


# --- forms that are kept for rows of some columns ---


@pytest.fixture
def keep(on_the_emulation):
    torch.ops.fusednorm_cuda.emulate(128, 512, 8, 2, 1)
    yield torch.ops.fusednorm_cuda.keep
    torch.ops.fusednorm_cuda.keep([])
    torch.ops.fusednorm_cuda.emulate(128, 512, 8, 2, 1)


def gradients(x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs and gradients of a norm, whose bits tell the order of the sums."""
    leaves = [x.clone().requires_grad_(), torch.ones(x.shape[-1], dtype=x.dtype, requires_grad=True)]
    normed = fusednorm.rms_norm(leaves[0], x.shape[-1], leaves[1])
    return [normed, *torch.autograd.grad(normed, leaves, x.sin())]


KEPT = [0, 0, 512, 4, 1, 32, 1, 4]
KEPT_BACKWARD = [0, 1, 512, 4, 32, 1, 4, 0]
KEPT_ROWS = [0, 1, 512, 4, 128, 4, 1, 0]  # rows that share a block, as long as there are enough of them


@pytest.mark.parametrize(
    "forms",
    [KEPT, KEPT_BACKWARD, KEPT + KEPT_BACKWARD, KEPT_ROWS],
    ids=["forward", "backward", "both", "rows_side_by_side"],
)
@pytest.mark.parametrize("processors", [2, 32])
def test_a_kept_form_is_what_forcing_it_gives(forms, processors, keep, on_the_emulation, generator):
    torch.ops.fusednorm_cuda.emulate(128, 512, 8, processors, 1)
    x = torch.randn(40, 512, generator=generator)
    own, others = gradients(x), [torch.randn(40, 1024), x.double(), x[:, :511]]
    own_of_others = [gradients(other) for other in others]
    for at in range(0, len(forms), 8):
        on_the_emulation("backward" if forms[at + 1] else "forward", forms[at + 4 : at + 8])
    forced = gradients(x)
    for what in ("forward", "backward"):
        on_the_emulation(what, [])
    keep(forms)
    kept = gradients(x)
    assert all(map(torch.equal, kept, forced))
    assert forms is KEPT_ROWS or not all(map(torch.equal, kept, own))  # the table has as many threads a row
    for other, before in zip(others, own_of_others, strict=True):  # rows of other columns, bytes or alignment
        assert all(map(torch.equal, gradients(other), before))
    keep([])
    assert all(map(torch.equal, gradients(x), own))


def test_a_row_in_a_kept_form_does_not_depend_on_the_others(keep, generator):
    keep(KEPT + KEPT_ROWS)
    x = torch.randn(40, 512, generator=generator)
    whole = gradients(x)
    for rows in (1, 3, 39):
        assert all(torch.equal(a[:rows], b) for a, b in zip(whole[:2], gradients(x[:rows])[:2], strict=True))


def test_a_forced_form_comes_before_a_kept_one(keep, on_the_emulation, generator):
    x = torch.randn(5, 512, generator=generator)
    on_the_emulation("forward", [4, 32, 1, 1])
    forced = gradients(x)[0]
    keep(KEPT)
    assert torch.equal(gradients(x)[0], forced)
    on_the_emulation("forward", [])
    assert not torch.equal(gradients(x)[0], forced)


KEPT_REFUSED = {
    "eight numbers a form": KEPT[:-1],
    "a device, and 0 or 1": [64, *KEPT[1:]],
    "elements of 2, 4 or 8": [0, 0, 512, 3, *KEPT[4:]],
    "whole vectors": [0, 0, 511, 4, *KEPT[4:]],
    "chunks: 1, 2 or 4": [*KEPT[:4], 3, 32, 1, 1],
    "programs: 0": [*KEPT_BACKWARD[:-1], 3],
    "rows: a power of two": [0, 1, 64, 4, 32, 3, 1, 0],
    "does not hold a row": [0, 1, 512, 4, 32, 1, 2, 0],
}


@pytest.mark.parametrize("said", KEPT_REFUSED)
def test_a_form_is_refused_when_it_is_to_be_kept(said, keep, generator):
    keep(KEPT)
    x = torch.randn(3, 512, generator=generator)
    before = gradients(x)
    with pytest.raises(RuntimeError, match=said):
        keep(KEPT_BACKWARD + KEPT_REFUSED[said])
    assert all(map(torch.equal, gradients(x), before))  # what was kept stays as it was


def test_no_cluster_is_kept_for_a_gpu_without(keep):
    torch.ops.fusednorm_cuda.emulate(128, 512, 1, 2, 1)
    with pytest.raises(RuntimeError, match="more than this GPU has"):
        keep(KEPT)
