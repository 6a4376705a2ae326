"""The CUDA norms with a weight, a bias or a layer scale for each sample, emulated on the CPU, against float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from oracle import DTYPES, Call, check
from shapes import Shape, random_leaves
from torch import Tensor

import fusednorm
from fusednorm._options import NormGradOptions, NormInputs, NormOptions, NormSaved
from fusednorm.providers.cuda import library
from fusednorm.providers.cuda import norm as cuda
from fusednorm.providers.reference import norm as reference
from tests.providers.cuda.test_norm import DTYPE, MACHINES, WIDTHS, emulate

pytestmark = pytest.mark.usefixtures("cuda")

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
MODULATIONS = ("gate", "scale", "shift")
GIVEN = ("x", "residual", "weight", "bias", *MODULATIONS)
# How a modulation lies: its leaf for B samples of N columns, and what is passed of it as the one of number k.
LAYOUTS: dict[str, tuple[Callable[..., tuple[int, ...]], Callable[..., Tensor]]] = {
    "slices": (lambda b, n: (b, 6 * n), lambda leaf, n, k: leaf[:, k * n : (k + 1) * n]),
    "slices_of_three_dimensions": (lambda b, n: (b, 1, 6 * n), lambda leaf, n, k: leaf[..., k * n : (k + 1) * n]),
    "contiguous": (lambda b, n: (b, n), lambda leaf, n, k: leaf),
    "one_for_all": (lambda b, n: (1, n), lambda leaf, n, k: leaf.expand(3 * len(leaf), n)),
    "step_2": (lambda b, n: (b, 2 * n), lambda leaf, n, k: leaf[:, ::2]),
    "transposed": (lambda b, n: (n, b), lambda leaf, n, k: leaf.t()),
    "off_the_boundary": (lambda b, n: (b, n + 1), lambda leaf, n, k: leaf[:, 1:]),
}


@dataclass(frozen=True)
class Modulated(Call):
    """A norm whose leaves gate, scale and shift are modulations, each as `layout` says."""

    layout: str = "slices"

    def given(self, leaves: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        view, n = LAYOUTS[self.layout][1], leaves["x"].shape[-1]
        return {**leaves, **{name: view(leaves[name], n, k) for k, name in enumerate(MODULATIONS) if name in leaves}}


def leaves_of(
    lead: tuple[int, ...],
    columns: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    names: tuple[str, ...] = GIVEN,
    layout: str = "slices",
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    others = tuple(name for name in names if name not in MODULATIONS)
    leaves = random_leaves(Shape("", (*lead, columns)), others, dtype, "cpu", generator, dict(dtypes or {}))
    for name in MODULATIONS:
        if name in names:
            size = LAYOUTS[layout][0](lead[0] // 3 if layout == "one_for_all" else lead[0], columns)
            values = torch.randn(size, generator=generator, dtype=torch.float64) * 0.3 + (name == "gate")
            leaves[name] = values.to((dtypes or {}).get(name, dtype))
    return leaves


def holds(function: str, leaves: dict[str, Tensor], generator: torch.Generator, layout="slices", **options) -> None:
    check(Modulated(function, options=options, layout=layout), leaves, generator)


@pytest.mark.parametrize("width", [w for w in WIDTHS if w not in ("lanes_of_a_warp", "two_vectors_a_lane")])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_cuda_sample_norm_in_every_form(dtype, machine, width, generator):
    vectors, tail = WIDTHS[width]
    emulate(machine)
    leaves = leaves_of((3, 2 if vectors > 100 else 5), vectors * 16 // dtype.itemsize + tail, dtype, generator)
    holds("add_layer_norm", leaves, generator)


@pytest.mark.parametrize("columns", [8 * 512 * 4 + 4, 8 * 256 * 4 + 1], ids=["aligned", "unaligned"])
def test_cuda_sample_norm_of_rows_wider_than_a_cluster(columns, generator):
    """Tiles over all blocks of the cluster forward, slabs backward."""
    emulate("clusters_of_small_blocks")
    holds("add_layer_norm", leaves_of((2, 2), columns, F32, generator), generator)


# (samples, rows of each): a block has several rows where they are narrow
LEADS = {"three_of_five": (3, 5), "a_row_each": (11, 1), "rows_of_many_blocks": (2, 37), "one": (1, 7), "flat": (9,)}


@pytest.mark.certifies("forward", "backward", op="modulation")
@DTYPE
@pytest.mark.parametrize("columns", [40, 37], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("function", ["add_layer_norm", "add_rms_norm"])
def test_cuda_sample_norm_of_every_dtype(function, lead, columns, dtype, generator):
    names = GIVEN if function == "add_layer_norm" else tuple(n for n in GIVEN if n != "bias")
    holds(function, leaves_of(LEADS[lead], columns, dtype, generator, names), generator)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("modulation", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [40, 37], ids=["aligned", "unaligned"])
def test_cuda_sample_norm_at_every_layout_of_the_modulation(columns, modulation, layout, generator):
    dtypes = dict.fromkeys(MODULATIONS, modulation)
    leaves = leaves_of((3, 2, 3), columns, BF16, generator, layout=layout, dtypes=dtypes)
    holds("add_layer_norm", leaves, generator, layout)


@pytest.mark.parametrize("residual", [F32, BF16], ids=["float32_residual", "16_bit_residual"])
@pytest.mark.parametrize("modulation", [F32, BF16], ids=["float32_modulation", "16_bit_modulation"])
@pytest.mark.parametrize("columns", [520, 515], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("machine", MACHINES)
def test_cuda_sample_norm_beside_a_float32_stream(machine, columns, modulation, residual, generator):
    emulate(machine)
    dtypes = {"residual": residual, **dict.fromkeys((*MODULATIONS, "weight"), modulation)}
    leaves = leaves_of((3, 3), columns, BF16, generator, dtypes=dtypes)
    holds("add_layer_norm", leaves, generator, residual_dtype=F32)


BESIDE = {
    "gate_beside_weight": ("weight", "bias", "gate"),
    "gate_and_layer_scale": ("weight", "layer_scale", "gate"),
    "scale_beside_layer_scale": ("layer_scale", "scale"),
    "shift_beside_weight": ("weight", "shift"),
    "scale_beside_x_bias": ("x_bias", "scale", "shift"),
    "scale_and_weight": ("weight", "scale"),
    "everything": ("weight", "bias", "x_bias", "layer_scale", *MODULATIONS),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("columns", [40, 1033], ids=["aligned", "unaligned_cluster"])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2, "drop_path_p": 0.3, "seed": 5}], ids=["bare", "dropped"])
@pytest.mark.parametrize("function", ["add_layer_norm", "add_rms_norm"])
def test_cuda_sample_norm_beside_shared_parameters(function, options, columns, beside, generator):
    emulate("clusters_of_small_blocks")
    names = tuple(n for n in BESIDE[beside] if n != "bias" or function == "add_layer_norm")
    leaves = leaves_of((4, 3), columns, F32, generator, ("x", "residual", *names))
    holds(function, leaves, generator, **options)


def test_cuda_sample_norm_of_strided_rows(generator):
    leaves = leaves_of((3, 4), 24, F32, generator, ("x", "residual", *MODULATIONS))
    leaves["x"] = torch.randn(4, 3, 48, generator=generator)
    view = lambda leaf: leaf.transpose(0, 1)[..., 24:] if leaf.shape[-1] == 48 else leaf  # noqa: E731
    call = partial(fusednorm.add_layer_norm, normalized_shape=24)
    results = []
    for x in (view(leaves["x"]), view(leaves["x"]).contiguous()):
        given = {k: leaves[k][:, i * 24 : (i + 1) * 24] for i, k in enumerate(MODULATIONS)}
        given = {k: m.detach().requires_grad_() for k, m in given.items()}
        x = x.detach().requires_grad_()
        normed, z = call(x, leaves["residual"], **given)
        results.append((normed, z, *torch.autograd.grad((normed, z), (x, *given.values()), (normed.sin(), z.cos()))))
    assert all(torch.equal(a, b) for a, b in zip(*results))


# --- the operators themselves, beside the reference ---


def saved_for(
    lead: tuple[int, ...], n: int, dtype: torch.dtype, draw: random.Random, **options: Any
) -> tuple[NormInputs, NormOptions]:
    """A forward with every parameter, each shared or with a vector for each sample."""
    values = torch.Generator().manual_seed(draw.randrange(2**31))

    def parameter(samples: bool) -> Tensor:
        size = [lead[0], *[1] * draw.randrange(len(lead))] if samples else []
        parameter = torch.randn([*size, n], generator=values, dtype=torch.float64).clamp(-3, 3) * 0.2 + 1
        return parameter.to(draw.choice((dtype, torch.float64 if dtype is torch.float64 else F32)))

    rows = [torch.randn(*lead, n, generator=values).to(dtype) for _ in range(2)]
    weight, bias, layer_scale = (parameter(draw.random() < 0.7) for _ in range(3))
    inputs = NormInputs(*rows, weight, bias, parameter(False), layer_scale, torch.tensor([draw.randrange(2**40)]))
    chosen = {"dropout_p": 0.0, "drop_path_p": 0.0, "rms": False, **options}
    p, path_p, rms = (chosen[name] for name in ("dropout_p", "drop_path_p", "rms"))
    return inputs, NormOptions(1, 1e-5, p, path_p, dtype, dtype, rms, draw.random() < 0.3, True)


def both(inputs: NormInputs, options: NormOptions, saved_is_normed: bool, mask: list[bool]) -> list[list[Tensor]]:
    """Forward and backward by the kernels, and by the reference in float64 on what the kernels saved."""
    wide = NormInputs(*(t.double() if t is not None and t.is_floating_point() else t for t in inputs))
    ours = cuda.add_layer_norm_fwd(inputs, options)
    exact = reference.add_layer_norm_fwd(wide, options._replace(normed_dtype=F64, residual_dtype=F64))
    normed, z, stats = ours
    dnormed, dz = torch.randn_like(normed), torch.randn_like(z)
    grad_options = NormGradOptions(1, *options[2:6], *options[6:8], saved_is_normed)
    rows = normed if saved_is_normed else z
    saved = NormSaved(rows, stats, inputs.weight, inputs.bias, inputs.x, *inputs[4:])
    wide_saved = NormSaved(rows.double(), stats.double(), wide.weight, wide.bias, wide.x, *wide[4:])
    gradients = cuda.add_layer_norm_bwd(dnormed, dz, saved, grad_options, mask)
    expected = reference.add_layer_norm_bwd(
        dnormed.double(), dz.double(), wide_saved, grad_options._replace(x_dtype=F64, residual_dtype=F64), mask
    )
    given = (inputs.x, inputs.residual, *inputs[2:6])
    for gradient, like, wanted in zip(gradients, given, mask):
        if wanted:
            assert (gradient.shape, gradient.dtype) == (like.shape, like.dtype)
    pick = lambda results: [g for g, wanted in zip(results, mask) if wanted]  # noqa: E731
    return [[normed, z, *pick(gradients)], [exact[0], exact[1], *pick(expected)]]


EVERY = [True] * 6


def assert_close(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Within some roundings of the largest: of the rows' dtype, and of a chain of twenty in the one computed in."""
    for number, (a, b) in enumerate(zip(ours, exact, strict=True)):
        computed = torch.finfo(F64 if dtype is F64 else F32).eps
        bound = (
            torch.finfo(a.dtype).eps + (torch.finfo(dtype).eps if number < 2 else 0) + 20 * computed
        ) * b.abs().max()
        assert (a.double() - b).abs().max() <= bound, number


@DTYPE
@pytest.mark.parametrize("columns", [40, 37], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_cuda_sample_norm_from_saved_normed(rms, columns, dtype):
    inputs, options = saved_for((3, 5), columns, dtype, random.Random(columns), rms=rms)
    parameter = torch.rand(2, 3, 1, columns).to(dtype) + 0.5
    inputs = inputs._replace(weight=parameter[0], bias=parameter[1])
    assert_close(*both(inputs, options, True, EVERY), dtype)


@pytest.mark.parametrize("wanted", range(6))
def test_cuda_sample_norm_gives_each_gradient_alone(wanted):
    inputs, options = saved_for((3, 5), 40, F32, random.Random(3), dropout_p=0.2, drop_path_p=0.3)
    assert_close(*both(inputs, options, False, [k == wanted for k in range(6)]), F32)


# Of each sample: threads that add them side by side, or together, or in several turns.
@pytest.mark.parametrize("programs", [1, 2, 9, 40, 200])
def test_cuda_sample_norm_adds_the_sums_of_many_programs(programs):
    force = torch.ops.fusednorm_cuda.force
    force("backward", [8, 4, 1, programs])
    try:
        inputs, options = saved_for((3, 800), 64, BF16, random.Random(programs))
        assert_close(*both(inputs, options, False, EVERY), BF16)
    finally:
        force("backward", [])


@pytest.mark.parametrize("samples", [1, 2, 5, 40, 300])
def test_cuda_sample_norm_spreads_samples_over_the_multiprocessors(samples):
    torch.ops.fusednorm_cuda.emulate(128, 512, 8, 16, 1)
    inputs, options = saved_for((samples, 600 // samples), 16, F32, random.Random(samples))
    assert_close(*both(inputs, options, False, EVERY), F32)


@pytest.mark.slow
def test_cuda_sample_norm_of_more_samples_than_an_axis_of_the_grid_has():
    inputs, options = saved_for((65_537, 1), 1, F32, random.Random(1), rms=True)
    # z is x, without a rounding that rows near zero would magnify
    inputs = inputs._replace(weight=torch.rand(65_537, 1, 1) + 0.5, residual=None, x_bias=None, layer_scale=None)
    assert_close(*both(inputs, options, False, [False, False, True, False, False, False]), F32)


@pytest.mark.parametrize("lead", [(0, 3), (3, 0)], ids=["no_samples", "no_rows"])
def test_cuda_sample_norm_of_nothing(lead):
    x, scale = torch.ones(*lead, 8, requires_grad=True), torch.ones(lead[0], 8, requires_grad=True)
    normed, z = fusednorm.add_layer_norm(x, None, 8, scale=scale)
    dx, dscale = torch.autograd.grad((normed, z), (x, scale), (normed, z))
    assert normed.shape == dx.shape == x.shape and dscale.shape == scale.shape and not dscale.any()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("columns", [72, 1028])
def test_cuda_sample_norm_repeats_bit_for_bit_in_any_order_of_threads(columns, machine):
    leaves = [torch.randn(3, 13, columns), *(torch.randn(3, columns) for _ in range(3)), torch.randn(columns)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, gate, scale, shift, weight = leaves
    cotangent, runs = torch.randn(3, 13, columns), []
    for seed in (1, 2, 3):
        emulate(machine, seed)
        normed, _ = fusednorm.add_layer_norm(x, x.detach(), columns, weight, gate=gate, scale=scale, shift=shift)
        runs.append((normed, *torch.autograd.grad(normed, leaves, cotangent)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@pytest.mark.parametrize("seed", range(24))
def test_cuda_sample_norm_drawn_at_random(seed):
    draw = random.Random(seed)
    machine = draw.choice([*MACHINES])
    emulate(machine, seed + 1)
    dtype, rms = draw.choice(DTYPES), draw.random() < 0.5
    lead = tuple(draw.choice((1, 2, 3, 7)) for _ in range(draw.choice((1, 2, 3))))
    n = draw.choice((8, 24, 33, 256, 515, 1040, 2056))
    dropped = {"dropout_p": 0.25, "drop_path_p": 0.25} if draw.random() < 0.5 else {}
    inputs, options = saved_for(lead, n, dtype, draw, rms=rms, **dropped)
    mask = [draw.random() < 0.7 for _ in range(6)]
    assert_close(*both(inputs, options, False, mask), dtype)


# --- what is passed to the kernels ---


def test_vectors_of_samples_are_not_copied():
    m = torch.randn(3, 6 * 8)
    for given in (m[:, 8:16], m[:, None, 9:17], m[:, :8].reshape(3, 8), m[:1, :8].expand(3, 8)):
        assert library.sample_parameter(given, BF16, F32) is given
    for given in (m[:, :16:2], m[:, :8].double(), torch._neg_view(m[:, :8])):
        made = library.sample_parameter(given, F32, F32)
        assert made.dtype is F32 and made.is_contiguous() and torch.equal(made, given.float())
    far = torch.empty(2**31 + 8, dtype=BF16).as_strided((2, 8), (2**31, 1))  # of memory that nobody touches
    assert library.sample_parameter(far, BF16, F32).is_contiguous()


WRONG = {
    "weight: its shape does not fit": torch.randn(2, 8),
    "weight: its shape does not fit ": torch.randn(3, 4),
    "weight: the columns of a vector must lie": torch.randn(3, 16)[:, ::2],
    "weight: its dtype is neither": torch.randn(3, 8).double(),
}


@pytest.mark.parametrize("said", WRONG)
def test_the_library_refuses_vectors_that_it_cannot_read(said):
    x = torch.randn(3, 4, 8)
    options = NormOptions(1, 1e-5, 0.0, 0.0, F32, F32, False, False, True)
    with pytest.raises(RuntimeError, match=said.strip()):
        library.ops.add_layer_norm_fwd.default(
            x, None, WRONG[said], None, None, None, None, cuda.packed_norm(options), 1e-5, 0.0, 0.0
        )
