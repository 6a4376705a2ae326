"""Parameters with a vector for each sample on the Triton kernels: adaptive norms, against float64.

The modulations are slices of one tensor, as a diffusion transformer's linear layer makes them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from oracle import Call, assert_within_budget, check
from shapes import FUSED
from torch import Tensor

import fusednorm
from fusednorm._options import NormGradOptions, NormSaved
from fusednorm.providers.reference import norm as reference
from fusednorm.providers.triton import host
from fusednorm.providers.triton import norm as triton_norm
from fusednorm.providers.triton import strides as triton_layout

pytestmark = pytest.mark.usefixtures("triton")

ALL = ("gate", "scale", "shift")
DROPPED = {"dropout_p": 0.2, "drop_path_p": 0.3, "seed": 2**63 + 5}


@dataclass(frozen=True)
class Adaptive(Call):
    """A call with modulations that are slices of the leaf `ada`, (B, slices N): as (B, N), or as (B, 1, N)."""

    names: tuple[str, ...] = ALL
    slices: int = 6
    ones: int = 0  # dimensions of size 1 between samples and columns
    first: int = 0  # of each modulation's columns, from its slice's
    step: int = 1  # between columns

    def given(self, leaves: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        ada = leaves["ada"]
        samples, shape = ada.shape[0], self._normalized_shape(self._inputs(leaves)[0])
        n, found = shape.numel(), {name: leaf for name, leaf in leaves.items() if name != "ada"}
        for slot, name in enumerate(self.names):
            begin = slot * n * self.step + self.first
            columns = ada[:, begin : begin + n * self.step : self.step]
            columns = columns.unflatten(1, shape) if len(shape) > 1 else columns
            found[name] = columns.reshape(samples, *[1] * self.ones, *shape)
        return found


def leaves_of(
    call: Adaptive,
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    modulation: torch.dtype | None = None,
    shared: tuple[str, ...] = (),
    base: tuple[int, ...] | None = None,  # of the leaves x and residual, where a view makes `shape` of it
) -> dict[str, Tensor]:
    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    columns = shape[len(shape) - call.normalized_ndim :]
    n = torch.Size(columns).numel()
    leaves = {name: (drawn(*(base or shape)) * 1.5 + 0.25).to(dtype) for name in ("x", "residual")}
    leaves["ada"] = (drawn(shape[0], call.slices * n * call.step + call.first) * 0.5).to(modulation or dtype)
    for name in shared:
        one = name in ("weight", "layer_scale")
        leaves[name] = (one + drawn(*columns) * 0.2).to(modulation or dtype)
    return leaves


@pytest.fixture(params=["one", "several", "chosen"])
def programs(request, monkeypatch):
    """How many programs of the backward have the rows of a sample: one writes its gradients whole."""
    if request.param != "chosen":
        monkeypatch.setattr(host, "programs", lambda *_: 1 if request.param == "one" else 3)
    triton_norm.forget_variants()
    yield
    triton_norm.forget_variants()


SHAPES = {
    "rows_not_in_whole_tiles": (3, 21, 24),
    "one_row_a_sample": (5, 1, 40),
    "rows_alone": (19, 40),
    "chunks": (2, 3, 1280),
    "odd_width": (3, 5, 33),
    "four_dimensions": (2, 3, 4, 16),
    "aligned_tile": (2, 2, 1024),
}


@pytest.mark.certifies("forward", "backward", op="modulation")
@pytest.mark.parametrize(
    ("dtype", "modulation"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("function", FUSED)
def test_modulations_of_samples(function, shape, dtype, modulation, generator):
    call = Adaptive(function, ones=min(1, len(shape) - 2))
    check(call, leaves_of(call, shape, generator, dtype, modulation), generator)


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (ALL, ("x_bias",)),
        (("gate",), ("weight", "bias")),
        (("scale",), ("layer_scale",)),
        (("shift",), ("weight", "layer_scale", "x_bias")),
        (("shift",), ()),
        (("scale", "shift"), ("weight", "bias", "x_bias", "layer_scale")),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", FUSED)
def test_beside_shared_parameters(function, names, shared, programs, generator):
    """One gradient is a sum over the rows of a sample, that of its neighbour over all rows."""
    shared = tuple(name for name in shared if name != "bias" or "rms" not in function)
    for options in ({}, DROPPED):
        call = Adaptive(function, options=options, names=names)
        check(call, leaves_of(call, (3, 7, 36), generator, torch.bfloat16, None, shared), generator)


@pytest.mark.parametrize("options", [{}, DROPPED], ids=["kept", "dropped"])
@pytest.mark.parametrize("width", [203, 256], ids=["odd", "aligned"])
@pytest.mark.parametrize("function", FUSED)
def test_rows_wider_than_registers(function, width, options, tiny_tiles, programs, generator):
    call = Adaptive(function, options=options)
    check(call, leaves_of(call, (2, 5, width), generator, torch.bfloat16, torch.float32, ("x_bias",)), generator)


@pytest.mark.parametrize(
    "lies",
    [
        {"slices": 3},
        {"slices": 7, "ones": 1},
        {"first": 1, "slices": 4},
        {"step": 2},
    ],
    ids=str,
)
def test_where_modulations_lie(lies, generator):
    call = Adaptive("add_layer_norm", **lies)
    for width in (40, 36):
        check(call, leaves_of(call, (3, 4, width), generator), generator)


@pytest.mark.parametrize(
    ("base", "view"),
    [
        ((4, 3, 24), lambda leaf: leaf.transpose(0, 1)),
        ((3, 4, 48), lambda leaf: leaf[..., ::2]),
        ((3, 4, 72), lambda leaf: leaf[..., 24:48]),
        ((1, 4, 24), lambda leaf: leaf.expand(3, 4, 24)),
    ],
    ids=["transposed", "columns_step_2", "slice_of_fused_projection", "expanded"],
)
@pytest.mark.parametrize("options", [{}, DROPPED], ids=["kept", "dropped"])
def test_where_rows_lie(base, view, options, generator):
    call = Adaptive("add_layer_norm", view=view, options=options)
    check(call, leaves_of(call, (3, 4, 24), generator, shared=("x_bias",), base=base), generator)


@pytest.mark.parametrize("ones", [0, 1])
def test_several_normalized_dimensions(ones, generator):
    call = Adaptive("add_layer_norm", normalized_ndim=2, ones=ones, names=("scale", "shift"))
    check(call, leaves_of(call, (3, 2, 4, 6), generator), generator)


@pytest.mark.parametrize("shape", [(0, 4, 16), (3, 0, 16), (3, 4, 0)], ids=str)
def test_nothing_to_do(shape, generator):
    call = Adaptive("add_layer_norm")
    check(call, leaves_of(call, shape, generator), generator)


def test_one_sample_runs_the_kernels_of_shared_parameters(launches):
    """A vector for each of one sample is a vector for all rows: nothing else is compiled for it."""
    x, rows = torch.zeros(1, 5, 64), torch.zeros(1, 64)
    inputs = dict.fromkeys(("weight", "bias", "layer_scale"), rows)
    for parameters in (inputs, {name: p[0] for name, p in inputs.items()}):
        arguments = fusednorm._options.NormInputs(x, **parameters)
        options = fusednorm._options.NormOptions(1, 1e-5, 0.0, 0.0, x.dtype, x.dtype, False, False, True)
        triton_norm.add_layer_norm_fwd(arguments, options)
    ours, shared = launches
    assert ours.compiled == shared.compiled and ours.numbers == shared.numbers and ours.grid == shared.grid


def test_slices_are_read_where_they_lie_and_others_copied():
    ada = torch.randn(3, 6 * 40)
    weight, bias, layer_scale = ada.chunk(6, 1)[:3]
    read = triton_layout.Parameters((weight, bias, None, layer_scale[:, None]), 1, 40, torch.float32)
    assert read.copied is None and read.strides == (240, 240, 240)
    columns = torch.randn(40, 3).t()
    read = triton_layout.Parameters((columns, ada[0, :40], None, ada[:, :40].double()), 1, 40, torch.float32)
    assert read.copied == [True, False, False, True] and read.strides == (40, 0, 40)
    rows = triton_layout.Rows((torch.randn(3, 2, 40),), 1, 40)
    assert rows.layout(True, read).kind == 0 and read.in_units(rows.layout(True, read)) == (10, 0, 10)
    odd = triton_layout.Parameters((torch.randn(3, 241)[:, :40], None, None, None), 1, 40, torch.float32)
    assert rows.layout(True, odd).kind == 1 and odd.in_units(rows.layout(True, odd)) == (241, 0, 0)


@pytest.mark.parametrize("options", [{}, DROPPED], ids=["kept", "dropped"])
def test_backward_repeats_bit_for_bit(options, programs, generator):
    call = Adaptive("add_layer_norm", options=options)
    leaves = leaves_of(call, (3, 21, 40), generator, shared=("x_bias",))
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    cotangents = [torch.randn(3, 21, 40, generator=generator) for _ in range(2)]
    runs = [torch.autograd.grad(call.ours(leaves), list(leaves.values()), cotangents) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("samples", [1, 2, 40, 300, 100_000])
@pytest.mark.parametrize("rows", [1, 17, 256])
def test_programs_of_a_sample(samples, rows, monkeypatch):
    """No program is without rows, and they wait for few others to end."""
    monkeypatch.setattr(host, "processors", lambda index: 132)
    config = triton_norm.table.backward(1152, 3, small=False)
    programs, at_once = host.programs(0, config, rows, 1, samples), 132 * config.per_sm
    assert 1 <= programs <= rows
    if samples > 1:
        assert samples * programs <= max(samples, host._MOST_ROUNDS * at_once)
        rounds = -(-samples * programs // at_once)
        assert rounds * -(-rows // programs) <= 1.5 * max(1.0, samples * rows / at_once) + 4


@pytest.mark.parametrize("rms", [False, True], ids=["layer_norm", "rms_norm"])
def test_backward_from_normed(rms, programs, generator):
    """The operator takes what no public function asks for: rows rebuilt with a weight and a bias of each sample."""
    samples, rows, n = 3, 5, 40

    def drawn(*sizes: int, by: float = 1.0, plus: float = 0.0) -> Tensor:
        return torch.randn(sizes, generator=generator) * by + plus

    normed, dnormed, dz = (drawn(samples, rows, n) for _ in range(3))
    stats = drawn(2 - rms, samples * rows).abs() + 0.5
    ada = drawn(samples, 4 * n, by=0.1, plus=1.0)
    saved = NormSaved(normed, stats, ada[:, :n], ada[:, None, n : 2 * n])
    options = NormGradOptions(1, 0.0, 0.0, torch.float32, torch.float32, rms, False, True)
    mask = [True, False, True, True, False, False]
    ours = triton_norm.add_layer_norm_bwd(dnormed, dz, saved, options, mask)
    float32 = reference.add_layer_norm_bwd(dnormed, dz, saved, options, mask)
    wide = replace_tensors(saved)
    wide_options = options._replace(x_dtype=torch.float64, residual_dtype=torch.float64)
    exact = reference.add_layer_norm_bwd(dnormed.double(), dz.double(), wide, wide_options, mask)
    for index, name in ((0, "dx"), (2, "dweight"), (3, "dbias")):
        assert_within_budget(ours[index], float32[index], exact[index], what=name)


def replace_tensors(saved: NormSaved) -> NormSaved:
    return NormSaved(*[None if t is None else t.double() for t in saved])


@pytest.mark.parametrize("seed", range(24))
def test_drawn_calls(seed, generator):
    draw = random.Random(seed)
    shared = [name for name in ("weight", "bias", "x_bias", "layer_scale") if draw.random() < 0.4]
    call = Adaptive(
        draw.choice(FUSED),
        options=draw.choice([{}, DROPPED, {"dropout_p": 0.5, "seed": seed}, {"residual_dtype": torch.float32}]),
        names=tuple(draw.sample(ALL, draw.randint(1, 3))),
        slices=draw.choice([3, 6]),
        first=draw.choice([0, 0, 0, 1]),
        step=draw.choice([1, 1, 1, 2]),
    )
    if call.rms and "bias" in shared:
        shared.remove("bias")
    shape = (draw.randint(2, 6), draw.choice([1, 2, 9, 17]), draw.choice([24, 33, 64, 130, 256]))
    call = replace(call, ones=draw.randint(0, 1))
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    modulation = draw.choice([None, torch.float32])
    check(call, leaves_of(call, shape, generator, dtype, modulation, tuple(shared)), generator)
