"""The command ``fusednorm tune``, and what ``info`` and ``explain`` say of what they found."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from fusednorm.__main__ import main
from fusednorm.dispatch import rules
from fusednorm.tuning import cli, run, store
from tests.helpers.tuning_records import record

STEP = """
import torch, fusednorm
def step():
    x = torch.randn(8, 32)
    fusednorm.add_layer_norm(x, x, 32)
def nothing():
    pass
number = 3
"""


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(run.BackgroundLoad, "share", lambda self: 0.0)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "a_step.py"
    path.write_text(STEP)
    return str(path)


def test_the_console_script_is_this_command():
    (script,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "fusednorm"]
    assert script.load() is main


def test_tune_measures_what_a_function_calls(script: str, idle, capsys):
    assert main(["tune", "--model", f"{script}:step", "--device", "cpu", "--quick"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 classes of calls were measured on cpu") and "Kept in" in said
    rules.forget()
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert "tuned      1 classes of calls on cpu" in said
    assert main(["explain", "add_layer_norm", "--shape", "8x32", "--no-bias", "--device", "cpu"]) == 0
    assert "at 8 x 32 on 20" in capsys.readouterr().out


def test_info_names_the_command_where_nothing_was_measured(capsys):
    assert main(["info"]) == 0
    assert "not here for cpu; type `fusednorm tune`" in capsys.readouterr().out


def test_a_dry_run_keeps_nothing(script: str, idle, capsys, cache: Path):
    assert main(["tune", "--model", f"{script}:step", "--device", "cpu", "--dry-run"]) == 0
    assert "Nothing was kept." in capsys.readouterr().out and not cache.exists()


def test_list_prints_the_classes(capsys):
    assert main(["tune", "--quick", "--list", "--only", "attention", "--device", "cpu"]) == 0
    names = capsys.readouterr().out.split()
    assert names[0] == "attention/float32/forward/1x4x16x16x16" and len(names) == len({*names}) == 36


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere.py:step", "there is no file nowhere.py"),
        ("step", "expected FILE.py:FUNCTION, got 'step'"),
        ("{}:other", "has no function other"),
        ("{}:number", "has no function number"),
        ("{}:nothing", "made no call of fusednorm"),
    ],
)
def test_models_that_are_none(model: str, words: str, script: str, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "--model", model.format(script), "--device", "cpu"])
    assert words in capsys.readouterr().err


def test_a_device_that_is_not_here(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "--device", "xpu"])
    assert "expected the CPU or a CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [run.TooNoisy("too busy"), OSError("no room; set FUSEDNORM_CACHE_DIR")])
def test_a_run_that_cannot_end_well_says_why(fault: Exception, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise fault

    monkeypatch.setattr(cli, "tune", fails)
    assert main(["tune", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == f"fusednorm tune: {fault}\n"


def test_the_table_shows_what_changes():
    records = [record("8x64", "cpu"), record("16x64", "torch", "cpu"), {**record("4x64", "cpu", ratio=3.0)}]
    said = str(run.Result(torch.device("cpu"), None, records, 3.2, 0.0))
    lines = said.splitlines()
    assert lines[0] == "3 classes of calls were measured on cpu in 3 s."
    assert "Automatic choice changes for 2 of them:" in lines
    assert lines[5].split() == ["add_layer_norm/float32/forward/4x64", "torch", "cpu", "3.00", "20.0", "us"]
    assert "16x64" not in said


def test_a_record_without_gain_changes_nothing():
    said = str(run.Result(torch.device("cpu"), None, [record("16x64", "torch", "cpu")], 3.2, 0.0))
    assert "Automatic choice stays as it is" in said


def test_saved_classes_are_counted(capsys):
    store.save(torch.device("cpu"), [record("8x64", "cpu"), record("16x64", "cpu")])
    main(["info"])
    assert "2 classes of calls on cpu" in capsys.readouterr().out
