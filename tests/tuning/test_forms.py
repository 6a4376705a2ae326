"""Forms of norm kernels: tried on a stand-in for a GPU, kept in the file, and taken by the next process's launches."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable

import pytest
import torch
from backends import INTERPRETED

import fusednorm
from fusednorm import dispatch
from fusednorm.__main__ import main
from fusednorm._once import _said
from fusednorm.dispatch import rules, tuned
from fusednorm.providers.forms import Place
from fusednorm.providers.triton.config import Config
from fusednorm.tuning import measure, run, store
from fusednorm.tuning.calls import CallClass
from fusednorm.tuning.forms import TriedForm, kernel_of, triton_form
from tests.helpers.tuning_records import CPU, GPU, record, with_forms, with_section

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is not what runs its kernels here")
CLASS = CallClass("add_layer_norm", "float32", False, (128, 64))
PLACE = Place("forward", 64, 4, 1)
NAME = "triton/forward/64/4/1"
FAST = Config(64, 64, 1, 16, 1)  # a quarter of the programs, which the interpreter runs one after another


def planted_form(text: str, forced: Callable[[], contextlib.AbstractContextManager]) -> TriedForm:
    return TriedForm("triton", text, forced, tuple(FAST))


@contextlib.contextmanager
def in_the_form(outputs: Callable[[tuple], None]):
    """The fast form, in which something happens to what a kernel was given."""
    from fusednorm.providers.triton import launch

    original = launch.Variant.launch

    def launched(self, grid, pointers, numbers):
        original(self, grid, pointers, numbers)
        outputs(pointers)

    with triton_form(PLACE, FAST), pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Variant, "launch", launched)
        yield


@pytest.fixture
def tuning(gpu, monkeypatch, in_a_fork):
    """What a run finds of the forms that are planted, where Triton's provider is the only one."""

    def tune(*planted: TriedForm, classes=(CLASS,), limit: float = 120.0, **given) -> run.Result:
        monkeypatch.setattr(measure, "candidates", lambda of, device: ["triton"])
        if planted:
            monkeypatch.setattr(measure, "forms_to_try", lambda kernel, device, provider: list(planted))
        with dispatch.settings.without_fastpath():  # which serves on CPU tensors
            return run.measure_and_keep(classes, GPU, 0.05, limit, True, False, in_a_fork)

    return tune


@pytest.fixture
def launched(monkeypatch):
    """Blocks of the forward that a call launches, its tile, and where the CPU's tensors have the GPU's file."""
    from fusednorm.providers.triton import launch

    original, found, file = launch.Variant.launch, [], tuned.file

    def noted(self, *args):
        found.append(self)
        original(self, *args)

    monkeypatch.setattr(launch.Variant, "launch", noted)
    monkeypatch.setattr(tuned, "file", lambda device: file(GPU))

    def call(rows: int = 128) -> tuple[int, int, int]:
        found.clear()
        x = torch.randn(rows, 64)
        with fusednorm.use_provider("triton"):
            fusednorm.add_layer_norm(x, x, 64)
        (forward,) = found
        return forward.constants[-5], forward.constants[-4], forward.warps

    return call


fast = planted_form("fast", lambda: triton_form(PLACE, FAST))
wrong = planted_form("wrong", lambda: in_the_form(lambda pointers: pointers[7].mul_(1.1)))
crash = planted_form("crash", lambda: in_the_form(lambda pointers: os._exit(7)))
impossible = planted_form("impossible", lambda: triton_form(PLACE, FAST._replace(block_n=32)))


@interpreted
def test_a_faster_form_is_kept_and_launched_by_who_reads_the_file(tuning, launched, monkeypatch):
    assert launched() == (16, 64, 4)
    result = tuning(fast)
    (found,) = result.records
    assert found["best"] == "triton" and found["forms"]["tried"]["triton fast"]["ratio"][0] > 1.5
    content = json.loads(result.path.read_text())
    assert content["forms"] == {NAME: list(FAST)} and content["format"] == tuned.FORMAT
    line = next(line for line in str(result).splitlines() if line.startswith(NAME))
    assert line.split()[1:3] == ["triton", "fast"] and float(line.split()[3]) > 1.5
    assert "Launch configurations that change" in str(result)
    rules.forget()
    assert launched() == (*FAST[:2], FAST.warps) and launched(4) == launched(128)
    with fusednorm.batch_invariant():
        assert launched() == (*FAST[:2], FAST.warps)
    monkeypatch.setenv(tuned.SWITCH_VARIABLE, "0")
    rules.forget()
    assert launched() == (16, 64, 4)


@interpreted
@pytest.mark.parametrize(
    ("planted", "why"),
    [(wrong, "its error against float64"), (crash, "exit code 7"), (impossible, "does not hold a row of 64")],
    ids=["wrong", "crash", "impossible"],
)
def test_a_form_that_does_not_serve_costs_only_itself(planted: TriedForm, why: str, tuning):
    result = tuning(planted, fast)
    (found,) = result.records
    assert why in found["forms"]["rejected"][planted.name] and planted.name not in found["forms"]["tried"]
    assert f"{CLASS.name}: {planted.name}: " in str(result) and not result.stopped
    assert json.loads(result.path.read_text())["forms"] == {NAME: list(FAST)}


@interpreted
@pytest.mark.parametrize("grad", [False, True])
def test_the_forms_that_are_listed_are_right_and_forced(grad: bool, tuning):
    of = CLASS._replace(needs_grad=grad, shape=(4, 64))
    (found,) = tuning(classes=[of]).records
    forms = found["forms"]
    assert forms["place"].startswith(f"triton/{'backward' if grad else 'forward'}/64/4/") and not forms["rejected"]
    assert len(forms["tried"]) >= 4 and forms["decided by"] == "host and device"  # there is no graph to capture
    numbers = [entry["numbers"] for name, entry in forms["tried"].items() if name != "triton table"]
    assert all(numbers) and len({*map(tuple, numbers)}) == len(numbers)


@interpreted
def test_time_that_is_up_leaves_the_forms_untried(tuning, monkeypatch):
    clock = iter([0.0] * 2 + [1e9] * 100)  # the deadline is set, and the one class is measured
    monkeypatch.setattr(run.time, "time", lambda: next(clock))
    result = tuning(fast)
    (found,) = result.records
    assert found["best"] == "triton" and "forms" not in found
    assert "The run stopped early: time was up before all forms were tried." in str(result)


@interpreted
def test_the_bar_counts_forms(tuning, capsys, monkeypatch):
    classes = [CLASS._replace(shape=(rows, 64)) for rows in (4, 8)]
    totals = []
    original = run.with_progress

    def noted(messages, total, *args):
        for message in original(messages, total, *args):
            totals.append(message[1] if message[0] == "more" else message[0])
            yield message

    monkeypatch.setattr(run, "with_progress", noted)
    tuning(fast, classes=classes)
    assert totals == ["case", "case", 2, "case", "case"]


@interpreted
def test_a_row_in_a_form_does_not_depend_on_the_batch(generator):
    x = torch.randn(40, 64, generator=generator)
    with triton_form(PLACE, FAST), fusednorm.use_provider("triton"):
        whole, *alone = (fusednorm.add_layer_norm(rows, rows, 64)[0] for rows in (x, x[:1], x[:17]))
    assert all(torch.equal(whole[: len(rows)], rows) for rows in alone)


def test_which_calls_have_forms():
    assert kernel_of(CLASS).place("triton") == PLACE
    both = CallClass("bias_dropout_add_rms_norm", "bfloat16", True, (4, 4096))
    assert kernel_of(both).place("triton") == Place("backward", 4096, 2, 1)
    assert kernel_of(both).place("cuda") == Place("backward", 4096, 2, 0)
    assert kernel_of(CLASS._replace(shape=(4, 66))) is None  # its rows are not aligned
    assert kernel_of(CallClass("bias_gelu", "float32", False, (4, 64))) is None
    assert kernel_of(CallClass("attention", "float32", False, (1, 1, 16, 16, 16))) is None


# --- the file ---


def test_a_form_is_kept_that_is_faster_in_one_class_and_slower_in_none():
    def of(shape: str, **tried: float) -> dict:
        return with_forms(record(shape, "triton"), NAME, {name: ([64], ratio) for name, ratio in tried.items()})

    def kept(*records: dict) -> dict[str, str]:
        return {place: form.name for place, form in store.faster_forms(records).items()}

    assert kept(of("4x64", a=1.02)) == kept(of("4x64", a=0.9)) == kept(record("4x64", "cpu")) == {}
    assert kept(of("4x64", a=1.1, b=1.2)) == {NAME: "b"}
    assert kept(of("4x64", a=1.1, b=1.2), of("8x64", a=1.0, b=0.9)) == {NAME: "a"}
    assert kept(of("4x64", a=1.1), of("8x64", b=1.1)) == {}  # each failed, or was wrong, in the other class
    assert kept(of("4x64", a=1.1, b=1.2), of("8x64", a=1.3, b=1.0)) == {NAME: "a"}


def test_forms_stay_where_a_later_run_tried_none():
    first = with_forms(record("8x64", "triton"), NAME, {"fast": (list(FAST), 1.2)})
    store.save(CPU, [first])
    path = store.save(CPU, [record("8x64", "triton"), record("16x64", "triton")])
    assert json.loads(path.read_text())["forms"] == {NAME: list(FAST)}
    store.save(CPU, [record("8x64", "cpu")])  # another provider is the fastest now
    assert json.loads(path.read_text())["forms"] == {}


DAMAGED = {
    "no section": None,
    "a list": [[1]],
    "unknown provider": {"torch/forward/64/4/1": [64, 64, 1, 16, 1]},
    "unknown kernel": {"triton/sideways/64/4/1": [64, 64, 1, 16, 1]},
    "a name that is short": {"triton/forward/64": [64, 64, 1, 16, 1]},
    "no number": {"triton/forward/64/x/1": [64, 64, 1, 16, 1]},
    "too few numbers": {NAME: [64, 64, 1, 16]},
    "a fraction": {NAME: [64, 64, 1, 16, 1.5]},
    "no power of two": {NAME: [48, 64, 1, 16, 1]},
    "nothing": {NAME: [0, 64, 1, 16, 1]},
    "a row that is not held": {NAME: [64, 32, 1, 16, 1]},
    "more than a program holds": {NAME: [4096, 64, 1, 4, 1]},
    "registers that are none": {NAME: [64, 64, 1, 16, 1, 512]},
    "numbers of cuda": {"cuda/forward/64/4/0": [1, 32, 1]},
    "a number of programs": {"cuda/backward/64/4/0": [32, 1, 1, 3]},
    "a number below zero": {"cuda/forward/64/4/0": [1, 32, -1, 1]},
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_section_refuses_the_file(how: str, monkeypatch):
    monkeypatch.setattr("fusednorm._once._said", type(_said)())
    path = store.save(CPU, [record("8x64", "torch", "cpu")])
    x = torch.randn(8, 64)
    assert fusednorm.explain(fusednorm.add_layer_norm, x, x, 64).startswith("add_layer_norm: torch")
    with_section(path, DAMAGED[how])
    with pytest.raises(tuned.Unusable, match="it is damaged"):
        tuned.read(path, tuned.machine(CPU))
    with pytest.warns(RuntimeWarning, match="it is damaged"):
        rules.forget()
        assert fusednorm.explain(fusednorm.add_layer_norm, x, x, 64).startswith("add_layer_norm: cpu")


@interpreted
def test_explain_and_info_say_that_forms_are_kept(capsys):
    path = store.save(CPU, [with_forms(record("8x64", "triton"), NAME, {"fast": (list(FAST), 1.2)})])
    x = torch.randn(8, 64)
    with fusednorm.use_provider("triton"):
        said = fusednorm.explain(fusednorm.add_layer_norm, x, x, 64)
        other = fusednorm.explain(fusednorm.add_layer_norm, x[:, :32], x[:, :32], 32)
    assert said == f"add_layer_norm: triton, one fused op each way; forms are kept for 64 columns ({path})"
    assert "forms" not in other
    main(["info"])
    assert "1 classes of calls and 1 forms of kernels on cpu" in capsys.readouterr().out
