"""What is measured, how a winner is found, and providers that are slow, wrong, crash or hang."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusednorm
from fusednorm.dispatch import registry, tuned
from fusednorm.tuning import run as running
from fusednorm.tuning.calls import FAMILIES, OPERATION_NAMES, CallClass, build, grid, parse
from fusednorm.tuning.measure import candidates, verdict, why_wrong

CPU = torch.device("cpu")
CLASSES = [CallClass("add_layer_norm", "float32", False, (rows, 64)) for rows in (4, 16, 64)]


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """Other tests run beside these."""
    monkeypatch.setattr(running.BackgroundLoad, "share", lambda self: 0.0)


@pytest.fixture
def measured(in_a_fork):
    """What a run finds, with the providers that a test planted in this process."""

    def run(classes=CLASSES, limit: float = 60.0, write: bool = True) -> running.Result:
        return running.measure_and_keep(classes, CPU, 0.01, limit, write, False, in_a_fork)

    return run


@pytest.mark.parametrize("operation", OPERATION_NAMES)
@pytest.mark.parametrize("grad", [False, True])
def test_every_class_is_a_call_that_every_candidate_computes_rightly(operation: str, grad: bool):
    shape = (2, 2, 8, 8, 16) if operation in FAMILIES["attention"] else (6, 32)
    for dtype in ("float32", "bfloat16"):
        of = CallClass(operation, dtype, grad, shape)
        assert parse(of.name) == of
        state = torch.get_rng_state()
        results = build(of, CPU)()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(r.dtype is of.torch_dtype and r.isfinite().all() for r in results)
        assert ("torch" in candidates(of, CPU)) == (not of.draws_mask) and "reference" not in candidates(of, CPU)
        for name in candidates(of, CPU):
            assert why_wrong(of, name, CPU) == "", name


@pytest.mark.parametrize("name", ["", "a/b", "add_layer_norm/float32/forward/4", "add_layer_norm/float31/forward/4x4"])
def test_names_that_are_none(name: str):
    with pytest.raises(ValueError):
        parse(name)


def test_the_class_of_a_recorded_call_is_the_class_that_is_built():
    """What dispatch asks for a call is what was measured: the same line and the same place."""
    for of in (*grid("cpu", "quick", FAMILIES)[::7], CallClass("attention_causal", "float32", True, (1, 2, 8, 16, 16))):
        with fusednorm.recording_shapes() as shapes:
            build(of, CPU)()
        (found,) = shapes.classes(CPU)
        assert found == of._replace(needs_grad=of.needs_grad or of.draws_mask), of


def test_grids_hold_every_family_once():
    for device in ("cpu", "cuda"):
        for level in ("quick", "default"):
            classes = grid(device, level, FAMILIES)
            assert len(set(classes)) == len(classes) and {of.operation for of in classes} == {*OPERATION_NAMES}
    assert {of.operation for of in grid("cpu", "quick", ["attention"])} == {*FAMILIES["attention"]}


# --- the winner ---


def test_a_winner_is_faster_beyond_the_spread():
    steady = [1.0, 1.01, 0.99] * 5
    faster = verdict({"cpu": [0.5 * t for t in steady], "torch": steady}, "torch")
    assert faster["best"] == "cpu" and faster["ratios"]["torch"][0] == pytest.approx(2.0)
    noisy = [0.5, 1.6, 0.7, 1.4, 0.9, 1.2, 1.1, 0.8, 1.3, 0.6]
    for before in ("cpu", "torch"):
        assert verdict({"cpu": noisy, "torch": noisy[::-1]}, before)["best"] == before
        assert verdict({"cpu": [0.999 * t for t in steady], "torch": steady}, before)["best"] == before


def test_a_planted_slow_provider_is_not_chosen(plant, measured):
    plant("snail", "slow")
    result = measured()
    assert all("snail" in r["providers"] and r["best"] != "snail" for r in result.records) and len(result.records) == 3
    points = json.loads(result.path.read_text())["points"]["add_layer_norm/4/forward"]
    assert {point[2] for point in points} <= {"cpu", "torch"}


def test_a_planted_wrong_provider_is_refused(plant, measured):
    plant("liar", "wrong")
    result = measured()
    for record in result.records:
        assert "liar" not in record["providers"] and "its error against float64" in record["rejected"]["liar"]
    assert "liar: its error against float64" in str(result)


def test_a_provider_that_ends_its_process_is_left_out_and_named(plant, measured):
    plant("bomb", "crash")
    result = measured()
    assert [r["name"] for r in result.records] == [of.name for of in CLASSES]
    for record in result.records:
        assert "exit code 7" in record["rejected"]["bomb"] and {"cpu", "torch"} <= {*record["providers"]}
    assert result.path is not None


def test_a_provider_that_hangs_is_left_out_and_named(plant, monkeypatch, measured):
    plant("sloth", "hang")
    monkeypatch.setattr(running, "PATIENCE", 1.5)
    result = measured(CLASSES[:1])
    assert "no answer in 1.5 s" in result.records[0]["rejected"]["sloth"] and result.records[0]["best"] != "sloth"


def test_a_class_that_no_machine_holds_does_not_stop_the_others(measured):
    huge = CallClass("add_layer_norm", "float32", False, (1 << 22, 1 << 22))
    result = measured([huge, CLASSES[0]])
    assert "best" not in result.records[0] and result.records[0]["rejected"] and "best" in result.records[1]


# --- a run ---


def test_a_busy_machine_is_refused(monkeypatch, cache: Path, measured):
    monkeypatch.setattr(running.BackgroundLoad, "share", lambda self: 0.4)
    with pytest.raises(fusednorm.tuning.TooNoisy, match="40% of the cores' time"):
        measured()
    assert not cache.exists()


def test_time_that_is_up_keeps_what_was_measured(measured):
    result = measured(CLASSES, limit=-1.0)
    assert result.records == [] and result.stopped == "time was up" and result.path is None


def test_an_interrupt_keeps_what_was_measured(monkeypatch, measured):
    original = running.with_progress

    def interrupted(messages, *args):
        for i, message in enumerate(original(messages, *args)):
            yield message
            if message[0] == "case" and i >= 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(running, "with_progress", interrupted)
    result = measured()
    assert result.stopped == "interrupted" and len(result.records) == 1 and result.path.exists()
    assert "The run stopped early: interrupted." in str(result)


def test_nothing_is_written_if_not_wanted(cache: Path, measured):
    result = measured(write=False)
    assert result.path is None and not cache.exists() and "Nothing was kept." in str(result)


def test_tune_in_a_process_of_its_own(cache: Path):
    """The whole way, by the public function: three classes in the real worker."""
    x = torch.randn(64, 256)
    with fusednorm.recording_shapes() as shapes:
        fusednorm.layer_norm(x, 256)
        fusednorm.bias_act_dropout(x, x[0], "gelu")
        fusednorm.scaled_dot_product_attention(*[x.view(1, 4, 64, 64)] * 3)
    result = fusednorm.tune(shapes, device="cpu", quick=True, progress=False)
    assert [r["name"].split("/")[0] for r in result.records] == ["layer_norm", "bias_gelu", "attention"]
    assert result.path == tuned.path_of(CPU) and all(r["best"] in registry.PROVIDERS for r in result.records)
    text = str(result)
    assert text.startswith("3 classes of calls were measured on cpu") and f"Kept in {result.path}" in text


def test_arguments_that_are_wrong():
    with pytest.raises(ValueError, match="did you mean 'norms'"):
        fusednorm.tune(only="norm")
    with pytest.raises(ValueError, match="expected the CPU or a CUDA GPU, got meta"):
        fusednorm.tune(device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU"):
            fusednorm.tune(device="cuda")
    with fusednorm.recording_shapes() as shapes:
        pass
    with pytest.raises(ValueError, match="no call on cpu was recorded"):
        fusednorm.tune(shapes, device="cpu")


def test_the_worker_imports_nothing_from_the_working_directory(tmp_path, monkeypatch):
    here, own = tmp_path / "here", tmp_path / "own"
    for folder in (here, own):
        folder.mkdir()
    for name in ("torch.py", "json.py", "fusednorm.py"):
        (here / name).write_text("raise SystemExit('planted')\n")
    monkeypatch.chdir(here)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # a relative entry of it would name the folder
    of = SimpleNamespace(output=tmp_path / "said.txt", reports=tmp_path / "reports")
    child = running._start_worker({"device": "abacus"}, of, own)
    child._reap()
    said = of.output.read_text()
    assert "planted" not in said and "device string: abacus" in said, said
