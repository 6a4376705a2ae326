"""Which forms of the norm kernels are tried beside the table's own, and how one is forced and left again."""

from __future__ import annotations

import math
import re

import pytest
import torch
from backends import EMULATED, INTERPRETED

import fusednorm
from benchmarks.cases import Case
from fusednorm.providers.forms import DIRECTIONS, Place
from fusednorm.providers.triton import norm_config as table
from fusednorm.providers.triton.config import Config, Pinned
from fusednorm.tuning import forms, near_forms
from fusednorm.tuning.calls import CallClass
from fusednorm.tuning.forms import TriedForm, cuda_form, triton_form
from fusednorm.tuning.near_forms import CudaBackwardForm, CudaForwardForm
from tools.tune import forms as tool_forms
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
    widths = {d: {c.shape[1] for c in GPU_CASES.values() if c.direction == d} for d in DIRECTIONS}
    assert widths["forward"] - widths["backward"] == {131072, 262144}


def cuda_forms(name: str) -> tuple:
    """The table's form, and those beside it."""
    return forms.cuda_forms(kernel_of(GPU_CASES[name]), CPU)


@emulated
@pytest.mark.parametrize("name", [name for name in GPU_CASES if re.match("add_layer_norm", name)])
def test_forms_of_cuda_hold_the_row(name, hopper):
    base, others = cuda_forms(name)
    vectors = GPU_CASES[name].shape[1] * GPU_CASES[name].torch_dtype.itemsize // 16
    assert 2 <= len(others) <= near_forms.MOST_CUDA and base not in others and len(set(others)) == len(others)
    for form in others:
        chunks, most = (form.chunks, 128 * form.chunks) if isinstance(form, CudaForwardForm) else (1, 512)
        assert 64 <= form.threads * form.rows <= most and form.ranks in (1, 2, 4, 8)
        assert form.threads % 32 == 0 or (form.threads < 32 and math.log2(form.threads).is_integer())
        assert form.rows == 1 or form.ranks == 1
        assert form.rows == 1 or form.threads <= 32 or (isinstance(form, CudaBackwardForm) and form.rows <= 8)
        held = chunks * form.threads * form.ranks
        if held < vectors:  # read again, by the widest blocks there are; or slabs
            assert (chunks, form.threads) == (4, 512) if isinstance(form, CudaForwardForm) else form.ranks == 1
        else:  # and no form has a warp, or half the threads of one, that holds nothing
            assert held < 2 * vectors and (held - vectors) / (chunks * form.ranks) < 32
        with cuda_form(GPU_CASES[name].direction, form):  # the numbers are those of a form
            pass


@emulated
def test_forms_nearest_to_the_tables_are_kept(hopper):
    base, others = cuda_forms("add_layer_norm/forward/bfloat16/8192x4096")
    assert base == CudaForwardForm(4, 128, 1, 1)
    assert others[:2] == [CudaForwardForm(2, 256, 1, 1), CudaForwardForm(2, 128, 1, 2)]
    distances = [near_forms.distance(base, form) for form in others]
    assert distances == sorted(distances) and distances[0] == 2
    assert near_forms.cuda_forward(512, base, most_ranks=1) == [CudaForwardForm(2, 256, 1, 1)]
    narrow = near_forms.cuda_backward(128, CudaBackwardForm(128, 4, 1), False)
    assert narrow[:3] == [CudaBackwardForm(*form) for form in ((128, 2, 1), (128, 1, 1), (64, 1, 2))]


@emulated
def test_tune_keeps_no_number_of_programs_of_cuda(hopper):
    """Which one is best depends on the number of rows, and a form serves every number."""
    kernels = [forms.kernel_of(CallClass("add_layer_norm", "bfloat16", True, (rows, 8192))) for rows in (7, 4096)]
    assert kernels[0] == kernels[1] == kernel_of(GPU_CASES["add_layer_norm/backward/bfloat16/4096x8192"])
    tried = forms.forms_to_try(kernels[0], CPU, "cuda")
    assert [form.numbers for form in tried][:2] == [(256, 1, 4), (128, 1, 8)]
    assert {len(form.numbers) for form in tried} == {3}  # threads, rows and ranks


@emulated
def test_the_tool_tries_numbers_of_programs_too(hopper):
    case = GPU_CASES["add_layer_norm/backward/bfloat16/4096x8192"]
    table, tried = tool_forms.forms_tried(case, CPU, "cuda")
    assert table == "t512 r1 k2" and tried[0] == TriedForm("cuda") and tried[-1].text == "no overlap"
    programs = [form.text for form in tried if form.text.startswith(f"{table} p")]
    assert programs == [f"{table} p{number}" for number in (1, 2, 4)]
    for form in tried:
        with form.forced():  # the numbers are those of a form
            pass
    base = CudaBackwardForm(512, 1, 2)
    assert tool_forms.numbers_of_programs(base, 1024, False, 4096, 132) == [66, 132, 264]
    assert tool_forms.numbers_of_programs(base, 1024, False, 7, 132) == [7]


@pytest.mark.parametrize("name", GPU_CASES)
def test_forms_of_triton_hold_the_row(name):
    case = GPU_CASES[name]
    base, others = forms.triton_forms(kernel_of(case))
    assert 3 <= len(others) <= near_forms.MOST_TRITON and len({base, *others}) == 1 + len(others)
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

    def statistics():
        with fusednorm.use_provider("cuda"):
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


def test_the_tables_form_of_triton_comes_back_after_a_fault():
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


def test_rows_of_other_layouts_keep_the_tables_form():
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
    base, others = forms.triton_forms(kernel_of(case))
    for config in (base, *others[:2]):
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
