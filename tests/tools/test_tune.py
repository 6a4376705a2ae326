"""A run over other forms than the tables choose: verdicts, processes, what is written and said of it."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import time
from unittest import mock

import pytest
import torch
from backends import EMULATED

import fusednorm
from benchmarks import measure
from benchmarks.cases import Case
from fusednorm.providers.forms import DIRECTIONS
from fusednorm.tuning import supervise
from fusednorm.tuning.forms import TriedForm
from tools.tune import cases as tune_cases
from tools.tune import forms
from tools.tune import norms as tune
from tools.tune import report as tune_report

pytestmark = pytest.mark.usefixtures("ordinary_memory")
CPU = torch.device("cpu")
CASE = Case("add_layer_norm", (4, 64), "float32", "forward")
ADD_LAYER_NORM = fusednorm.add_layer_norm


# --- one case ---


def wrong(x, residual, *settings, **options):
    normed, z = ADD_LAYER_NORM(x, residual, *settings, **options)
    return normed + 0.25, z


impossible = mock.MagicMock()
impossible.__enter__.side_effect = RuntimeError("a form\nthat cannot be")
never = mock.Mock(side_effect=torch.OutOfMemoryError("it does not fit"))
PLANTED = [
    TriedForm("reference"),
    TriedForm("reference", "wrong", lambda: mock.patch.object(fusednorm, "add_layer_norm", wrong)),
    TriedForm("reference", "impossible", lambda: impossible),
    TriedForm("reference", "too large", lambda: mock.patch.object(fusednorm, "add_layer_norm", never)),
    TriedForm("reference", "another"),
]


@pytest.fixture
def planted(monkeypatch):
    """A provider with a wrong form, one that raises when it is forced and one when it is called."""
    monkeypatch.setattr(forms, "forms_tried", lambda case, device, provider: ("its own", PLANTED))
    monkeypatch.setattr(tune_cases, "absent", lambda device_type: {"reference": None})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_form_gets_no_time_and_one_that_raises_stops_no_other(planted, direction):
    case = Case("add_layer_norm", (4, 64), "float32", direction)
    *steps, (kind, record) = tune.measure_case(case, CPU, measure.CpuTimer(), ["reference"], 0.01, {})
    assert kind == "case" and record["status"] == "measured"
    assert [step for _, step in steps] == [(case.name, name) for name in ("", *[v.name for v in PLANTED], "")]
    assert set(record["variants"]) == {"reference table", "reference another", "eager", "copy"}
    assert all(len(v["samples"]) >= measure.SLOW_ROUNDS for v in record["variants"].values())
    rejected = record["rejected"]
    assert {n: r["status"] for n, r in rejected.items()} == {
        "reference wrong": "wrong",
        "reference impossible": "failed",
        "reference too large": "failed",
    }
    assert "normed - fp64" in rejected["reference wrong"]["detail"]
    assert rejected["reference impossible"]["detail"] == "RuntimeError: a form that cannot be"
    assert rejected["reference too large"]["detail"] == "OutOfMemoryError: it does not fit"


def test_what_an_earlier_process_lost_is_not_tried_again(planted):
    arguments = (CASE, CPU, measure.CpuTimer(), ["reference"], 0.01)
    lost = {(CASE.name, "reference another"): "no answer"}
    *_, (_, record) = tune.measure_case(*arguments, lost)
    assert record["rejected"]["reference another"] == {"status": "failed", "detail": "no answer"}
    *_, (kind, record) = tune.measure_case(*arguments, {(CASE.name, ""): "its process ended"})
    assert (kind, record["status"], record["variants"]) == ("case", "failed", {})
    assert "its process ended" in record["detail"]


def test_a_provider_that_loses_process_after_process_is_left_out(planted):
    lost = {(str(k), "reference another"): "no answer" for k in range(tune.MOST_LOST)}
    (_, facts), stopped = tune.work([CASE], "cpu", 0.01, math.inf, set(), lost)
    assert facts["absent"] == {"reference": "5 of its forms took their process with them"}
    assert stopped == ("stopped", "no provider of ours has forms to try here")


def test_a_lost_device_ends_the_work(planted, monkeypatch):
    monkeypatch.setattr(tune, "_wait", mock.Mock(side_effect=RuntimeError("an illegal memory access")))
    messages = list(tune.work([CASE, CASE], "cpu", 0.01, math.inf, set(), {}))
    assert messages[-2:] == [
        ("trying", (CASE.name, "reference table")),
        ("lost", "RuntimeError: an illegal memory access"),
    ]


# --- processes ---


def surviving(names: dict, done, lost):
    """Work whose steps do what `names` says of them, unless they were lost."""
    for case, steps in names.items():
        if case in done:
            continue
        record = {"name": case, "kept": []}
        for step, act in steps.items():
            yield "trying", (case, step)
            if (case, step) in lost:
                record["kept"].append(lost[case, step])
            elif act is not None:
                yield from act() or ()
        yield "case", record


def lose():
    yield "lost", "no device"
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_form_that_kills_its_process_or_hangs_costs_itself_alone():
    plan = {
        "a": {"1": None, "2": lambda: os.kill(os.getpid(), signal.SIGKILL)},
        "b": {"1": lambda: time.sleep(60), "2": lose, "3": None},
        "c": {"1": lambda: [("facts", {})]},
    }
    start = time.monotonic()
    messages = list(supervise.supervised(lambda done, lost: surviving(plan, done, lost), 1.0))
    assert messages == [
        ("case", {"name": "a", "kept": ["its process ended with exit code -9"]}),
        ("case", {"name": "b", "kept": ["no answer in 1 s", "no device"]}),
        ("facts", {}),
        ("case", {"name": "c", "kept": []}),
    ]
    assert time.monotonic() - start < 20


# --- what is written ---

FACTS = {
    "environment": {"device": "a GPU", "torch": "2", "triton": "3", "commit": "0", "date": "today"},
    "method": {"timer": "planted"},
    "clocks": None,
    "absent": {"cuda": None, "triton": "Triton is not installed"},
}


def record_of(name: str, variants: dict, rejected: dict | None = None) -> dict:
    op, direction, dtype, size = name.split("/")
    timed = {n: {"samples": [t * (1 + 0.001 * k) for k in range(9)]} for n, t in variants.items()}
    tried = [n for n in (*variants, *(rejected or {})) if n.startswith("cuda")]
    shape = [int(part) for part in size.split("x")]
    record = {"name": name, "op": op, "direction": direction, "dtype": dtype, "shape": shape, "status": "measured"}
    record |= {"tables": {"cuda": "t512 r1 k2"}, "tried": {"cuda": tried}, "detail": ""}
    return record | {"variants": timed, "rejected": rejected or {}}


def options(**changed) -> argparse.Namespace:
    return argparse.Namespace(**({"limit": math.inf, "seconds": 0.1, "only": re.compile(""), "jobs": 0} | changed))


def test_the_file_is_written_after_each_case(tmp_path):
    path, plan = tmp_path / "tune.json", [Case("add_layer_norm", (4, n), "float32", "forward") for n in (64, 128, 256)]
    seen = []

    def messages():
        yield "facts", FACTS
        for case in plan[:2]:
            yield "trying", (case.name, "")
            seen.append(json.loads(path.read_text()))
            yield "case", record_of(case.name, {"cuda table": 1.0})
        seen.append(json.loads(path.read_text()))
        raise KeyboardInterrupt

    result = tune.Result(plan, options(json=path))
    tune.collect(messages(), result, options(json=path))
    assert [[case["name"] for case in known["cases"]] for known in seen] == [
        [],
        [plan[0].name],
        [plan[0].name, plan[1].name],
    ]
    assert set(seen[0]["left_out"].values()) == {"cut off"} and seen[0]["environment"] == FACTS["environment"]
    assert result.known()["left_out"] == {plan[2].name: "interrupted"}


def test_tables_name_the_faster_form_and_what_was_wrong():
    rejected = {
        "cuda t64": {"status": "wrong", "detail": "max|dx - fp64| is 1"},
        "cuda t32": {"status": "failed", "detail": "RuntimeError: no such form"},
    }
    shared = {"copy": 1.0, "eager": 4.0}
    fast = record_of(
        "add_layer_norm/backward/bfloat16/8x4096",
        {"cuda table": 2.0, "cuda t256 r1 k4": 1.25, "cuda t128 r1 k8": 1.6, **shared},
        rejected,
    )
    near = record_of("add_layer_norm/backward/bfloat16/8x8192", {"cuda table": 2.0, "cuda t256 r1 k4": 1.99, **shared})
    none = record_of("rms_norm/forward/bfloat16/8x8192", shared, {"cuda table": rejected["cuda t32"]})
    known = tune.Result([], options())
    known.facts, known.records = FACTS, [fast, near, none]
    result = known.known()
    text = tune_report.text(result)
    lines = text.splitlines()

    def cells(start: str) -> list[str]:
        (line,) = (line for line in lines if line.startswith(start))
        return [cell.strip() for cell in line.strip("|").split("|")]

    assert cells("| 4096 ") == [
        *("4096", "cuda", "t512 r1 k2", "50.0%", "t256 r1 k4", "80.0%", "1.60 [1.60, 1.60]", "5", "1", "1", "25.0%")
    ]
    faster = text[text.index("Where another form") :]
    assert "| add_layer_norm/backward/bfloat16/8x4096 |     cuda |  t256 r1 k4 |   t512 r1 k2 |" in faster
    assert "8x8192" not in faster[: faster.index("WRONG")]
    assert "WRONG: add_layer_norm/backward/bfloat16/8x4096 cuda t64: max|dx - fp64| is 1" in text
    assert "failed, 2 times, first add_layer_norm/backward/bfloat16/8x4096 cuda t32: RuntimeError: no such form" in text
    assert "triton is not tried: Triton is not installed" in text
    assert not tune_report.all_right(result)
    assert tune_report.all_right(result | {"cases": [near]})
    nowhere = tune_report.faster_text(result | {"cases": [near, none]})
    assert nowhere.endswith("beyond the spread: nowhere in this run.")


# --- the command ---


@pytest.mark.skipif(not EMULATED, reason="there is no g++ to build the emulation with")
def test_command_measures_the_emulation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune_cases, "WITH_FORMS", ("cuda",))
    path = tmp_path / "tune.json"
    arguments = ["--device", "cpu", "--seconds", "0.01", "--json", str(path), "--only"]
    assert tune.main([*arguments, "^add_layer_norm/.*/bfloat16/6x1024$"]) == 0
    result = json.loads(path.read_text())
    assert [r["name"].split("/")[1] for r in result["cases"]] == ["backward", "forward"] and not result["left_out"]
    for record in result["cases"]:
        assert record["rejected"] == {} and record["tried"]["cuda"][0] == "cuda table"
        assert {*record["tried"]["cuda"], "eager", "copy"} == record["variants"].keys() and len(record["variants"]) >= 6
    out = capsys.readouterr().out
    assert "add_layer_norm, backward, bfloat16" in out and "c4 t32 r4 k1" in out
    assert tune_report.main([str(path)]) == 0
    assert capsys.readouterr().out == out


def test_command_takes_no_case_after_the_limit(planted, tmp_path, capsys):
    path = tmp_path / "tune.json"
    only = ["--only", "^add_layer_norm/forward/bfloat16", "--seconds", "0.01", "--json", str(path)]
    assert tune.main(["--device", "cpu", "--limit", "1e-9", *only]) == 1
    assert set(json.loads(path.read_text())["left_out"].values()) == {"time was up"}
    assert tune.main(["--device", "cpu", *only]) == 1  # one form is wrong
    assert "WRONG: add_layer_norm/forward/bfloat16/6x256 reference wrong" in capsys.readouterr().out


def test_command_says_that_nothing_has_forms_here(monkeypatch, capsys):
    monkeypatch.setattr(tune_cases, "absent", lambda device_type: {"cuda": "no GPU", "triton": "not installed"})
    assert tune.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "no provider of ours has forms to try here" in said and "cuda: no GPU" in said


def test_command_lists_its_cases_and_refuses_what_it_cannot_do(capsys):
    assert tune.main(["--device", "cuda", "--list", "--only", "rms_norm/forward/float32"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(tune.WIDTHS)
    assert tune.main(["--device", "cpu", "--only", "nothing"]) == 1
    if not torch.cuda.is_available():
        assert tune.main(["--device", "cuda"]) == 1
        assert "torch sees no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--only", "("])
