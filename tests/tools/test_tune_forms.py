"""Which forms of the norm kernels are tried beside the table's own, and how one is forced and left again."""

from __future__ import annotations

import math
import re

import pytest
import torch
from backends import EMULATED, INTERPRETED

import fusednorm
from benchmarks.cases import Case
from fusednorm.providers.forms import Place
from fusednorm.providers.triton import norm_config as table
from fusednorm.providers.triton.config import Config, Pinned
from fusednorm.tuning import forms as tune_forms
from fusednorm.tuning import variants as tune_variants
from fusednorm.tuning.forms import Variant, cuda_form, triton_form
from fusednorm.tuning.variants import Backward, Forward
from tools.tune import norms as tune
from tools.tune.cases import kernel_of

CPU = torch.device("cpu")
emulated = pytest.mark.skipif(not EMULATED, reason="there is no g++ to build the emulation with")
GPU_CASES = {case.name: case for case in tune.chosen("cuda")}


@pytest.fixture
def hopper():
    """The emulation of a machine with clusters."""
    torch.ops.fusednorm_cuda.emulate(128, 512, 8, 132, 1)
    yield
    torch.ops.fusednorm_cuda.emulate(128, 512, 8, 2, 1)


# --- what is tried ---


def test_cases_are_the_most_important_first():
    names = list(GPU_CASES)
    assert names[0] == "add_layer_norm/backward/bfloat16/131072x256"
    assert all(case.input_bytes == 64 << 20 for case in GPU_CASES.values() if case.shape[1] != 5120)
    groups = list(dict.fromkeys((c.dtype, c.op, c.direction) for c in GPU_CASES.values()))
    assert groups[:3] == [
        ("bfloat16", "add_layer_norm", "backward"),
        ("bfloat16", "add_layer_norm", "forward"),
        ("bfloat16", "bias_dropout_add_layer_norm", "backward"),
    ]
    assert [dtype for dtype, _, _ in groups] == ["bfloat16"] * 8 + ["float32"] * 8
    widths = {d: {c.shape[1] for c in GPU_CASES.values() if c.direction == d} for d in tune.DIRECTIONS}
    assert widths["forward"] - widths["backward"] == {131072, 262144}


def forms(case: Case) -> tuple[tuple, list, int]:
    """The table's form, those beside it, and the vectors of a row."""
    n_rows, n = case.shape
    vectors = n * case.torch_dtype.itemsize // 16
    chunks, threads, rows, ranks, tiles = tune_forms.cuda_table(kernel_of(case), CPU)[case.direction][:5]
    if case.direction == "forward":
        base = Forward(chunks, threads, rows, ranks)
        return base, tune_variants.cuda_forward(vectors, base), vectors
    base = Backward(threads, rows, ranks)
    return base, tune_variants.cuda_backward(vectors, base, n_rows, 132, tiles > 1), vectors


@emulated
@pytest.mark.parametrize("name", [name for name in GPU_CASES if re.match("add_layer_norm", name)])
def test_forms_of_cuda_hold_the_row(name, hopper):
    base, others, vectors = forms(GPU_CASES[name])
    assert 3 <= len(others) <= tune_variants.MOST_CUDA and base not in others and len(set(others)) == len(others)
    for form in others:
        chunks, most = (form.chunks, 128 * form.chunks) if isinstance(form, Forward) else (1, 512)
        assert 64 <= form.threads * form.rows <= most and form.ranks in (1, 2, 4, 8)
        assert form.threads % 32 == 0 or (form.threads < 32 and math.log2(form.threads).is_integer())
        assert form.rows == 1 or form.ranks == 1
        assert form.rows == 1 or form.threads <= 32 or (isinstance(form, Backward) and form.rows <= 8)
        held = chunks * form.threads * form.ranks
        if held < vectors:  # read again, by the widest blocks there are; or slabs
            assert (chunks, form.threads) == (4, 512) if isinstance(form, Forward) else form.ranks == 1
        else:  # and no form has a warp, or half the threads of one, that holds nothing
            assert held < 2 * vectors and (held - vectors) / (chunks * form.ranks) < 32
        with cuda_form(GPU_CASES[name].direction, form):  # the numbers are those of a form
            pass


@emulated
def test_forms_nearest_to_the_tables_are_kept(hopper):
    base, others, _ = forms(GPU_CASES["add_layer_norm/forward/bfloat16/8192x4096"])
    assert base == Forward(4, 128, 1, 1)
    assert others[:2] == [Forward(2, 256, 1, 1), Forward(2, 128, 1, 2)]
    distances = [tune_variants.distance(base, form) for form in others]
    assert distances == sorted(distances) and distances[0] == 2
    assert tune_variants.cuda_forward(512, base, most_ranks=1) == [Forward(2, 256, 1, 1)]
    narrow = tune_variants.cuda_backward(128, Backward(128, 4, 1), 32768, 132, False)
    assert narrow[:3] == [Backward(128, 2, 1), Backward(128, 1, 1), Backward(64, 1, 2)]  # rows of several warps too


@emulated
def test_backward_varies_one_thing_at_a_time(hopper):
    base, others, _ = forms(GPU_CASES["add_layer_norm/backward/bfloat16/4096x8192"])
    assert base == Backward(512, 1, 2)
    assert {form[:3] == base[:3] for form in others if form.programs} == {True}
    assert [form.programs for form in others if form.programs] == [66, 132, 264]
    assert [form[:3] for form in others if not form.programs][:2] == [(256, 1, 4), (128, 1, 8)]
    few_rows = tune_variants.cuda_backward(1024, base, 7, 132, False)
    assert {form.programs for form in few_rows} == {0, 7}


@pytest.mark.parametrize("name", GPU_CASES)
def test_configurations_of_triton_hold_the_row(name):
    case = GPU_CASES[name]
    base, *others = tune_forms.triton_configs(kernel_of(case))
    assert 3 <= len(others) <= tune_variants.MOST_TRITON and len({base, *others}) == 1 + len(others)
    n = case.shape[-1]
    for config in (base, *others):
        assert config.chunks == 0 or n <= config.block_n * config.chunks < n + config.block_n
        assert all(math.log2(x).is_integer() for x in (config.block_m, config.block_n, config.warps))
        assert 1 <= config.warps <= 32 and config.per_sm >= 1 and 24 <= config.registers <= 255
    pinned = [config for config in others if isinstance(config, Pinned)]
    assert bool(pinned) == (case.direction == "backward")
    for config in pinned:
        assert config[:4] == base[:4] and config.registers == base.registers and config.per_sm != base.per_sm
        assert config != Config(*config[:5]) and config.stages == base.stages


# --- how a form is forced, and left again ---


class Fault(Exception):
    pass


def test_the_tables_form_of_cuda_comes_back_after_a_fault(monkeypatch):
    asked = []

    def force(what, numbers):
        asked.append((what, numbers))
        if numbers == [0, 0, 0, 0]:
            raise RuntimeError("no such form")

    monkeypatch.setattr(torch.ops.fusednorm_cuda, "force", force, raising=False)
    with pytest.raises(Fault), cuda_form("forward", (2, 128, 1, 1)):
        raise Fault
    with pytest.raises(RuntimeError, match="no such form"), cuda_form("backward", (0, 0, 0, 0)):
        pass
    assert asked == [("forward", [2, 128, 1, 1]), ("forward", []), ("backward", [0, 0, 0, 0]), ("backward", [])]


@emulated
def test_cuda_takes_the_form_that_is_forced(hopper, generator):
    x = torch.randn(5, 1024, generator=generator)
    run = Variant("cuda").active

    def statistics():
        with run():
            return fusednorm.layer_norm(x, 1024)

    own = statistics()
    with cuda_form("forward", (1, 64, 1, 4)):
        forced = statistics()
    assert not torch.equal(own, forced)  # the sums are of other numbers
    assert torch.allclose(own, forced, atol=1e-6)  # a few roundings of numbers around 1, added in another order
    assert torch.equal(own, statistics())
    with pytest.raises(RuntimeError), cuda_form("forward", (3, 64, 1, 1)):
        pass
    assert torch.equal(own, statistics())


def test_the_tables_configuration_of_triton_comes_back_after_a_fault():
    form, place = Config(1, 2048, 2, 8, 1), Place("forward", 4096, 4, 1)
    layout, own = (0, 8, False), table.forward(4096, False, True, False, False)
    with pytest.raises(Fault), triton_form(place, form):
        assert table.chosen(place, -1, layout, own) == form
        raise Fault
    assert table.chosen(place, -1, layout, own) == own
    with (
        pytest.raises(ValueError, match="does not hold a row of 4097"),
        triton_form(place._replace(columns=4097), form),
    ):
        pass
    assert table.tried == {}


def test_rows_of_other_layouts_keep_the_tables_configuration():
    place, own = Place("backward", 4096, 2), table.backward(4096, 0, False)
    with triton_form(place, Config(1, 1024, 4, 8, 1)):
        assert table.chosen(place, -1, (0, 8, False), own) != own
        for layout in ((1, 8, False), (0, 8, True)):
            assert table.chosen(place, -1, layout, own) == own


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is not what runs its kernels here")
@pytest.mark.parametrize("name", [name for name in GPU_CASES if re.search("bfloat16/.*x(256|8192)$", name)])
def test_what_is_compiled_ahead_is_what_a_call_launches(name):
    from tools.codegen import compile
    from tools.tune.compile_ahead import launches

    case = GPU_CASES[name]
    small = Case(case.op, (3, case.shape[1]), case.dtype, case.direction)
    for config in tune_forms.triton_configs(kernel_of(case))[:3]:
        expected, launched = launches(case, config), []
        form = triton_form(kernel_of(case).place("triton"), config)
        with compile.launches(launched.append), form, fusednorm.use_provider("triton"):
            op = case.operation
            leaves = {n: torch.zeros(s, dtype=case.torch_dtype) for n, s in op.inputs(small.shape).items()}
            grad = case.direction == "backward"
            outputs = op.fused({n: leaf.requires_grad_(grad) for n, leaf in leaves.items()})()
            if grad:
                launched.clear()
                torch.autograd.grad(outputs, list(leaves.values()), [torch.zeros_like(o) for o in outputs])
        assert launched and launched == expected
        assert config.block_n in launched[-1 - grad].constants
