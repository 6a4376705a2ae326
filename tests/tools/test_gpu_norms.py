"""The stages of a GPU check that measure, and what they leave when they are cut off. No GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks import run
from tools.gpu_check import check as gpu_check

ROOT = Path(__file__).resolve().parents[2]
NORMS = ("environment", "build", "tune", "targets")  # what `make gpu-norms` runs


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("names", "count", "passed_on"),
    [(gpu_check.STAGES, 8, {"tests.xml", "benchmark.json"}), (NORMS, 7, {"tune.json", "targets.json"})],
)
def test_at_most_eight_files(device, names, count, passed_on, tmp_path):
    every = gpu_check.stages(tmp_path, device, [])
    assert [s.name for s in every] == [*gpu_check.STAGES, *gpu_check.ASKED_FOR]
    stages = [s for s in every if s.name in names]
    files = {name for s in stages for name in (s.log, *s.files)} | {"summary.json", "summary.md"}
    assert len(files) == count <= 8
    written = " ".join(word for s in stages for command in s.commands(100.0) for word in command)
    assert {name for name in files if str(tmp_path / name) in written} == passed_on


def test_plain_calls_keep_to_their_five_stages(tmp_path):
    assert gpu_check.parse([str(tmp_path)]).stages == list(gpu_check.STAGES)
    shares = {s.name: s.share for s in gpu_check.stages(tmp_path, "cuda", [])}
    assert sum(shares[name] for name in gpu_check.STAGES) <= 7 * 60 - 5
    assert (shares["tune"], shares["targets"]) == (120, 300)
    assert gpu_check.parse([str(tmp_path), "--stages", ",".join(NORMS)]).stages == list(NORMS)


def test_targets_and_tune_are_told_how_long_they_have(tmp_path):
    by_name = {s.name: s for s in gpu_check.stages(tmp_path, "cuda", ["/the/peers"])}
    tune, targets = by_name["tune"], by_name["targets"]
    (command,) = tune.commands(120.0)
    until = ["--device", "cuda", "--limit"]
    assert command[2:] == ["-m", "tools.tune.norms", *until, "89", "--json", f"{tmp_path}/tune.json"]
    measure, table = targets.commands(300.0)
    raw = f"{tmp_path}/targets.json"
    assert measure[2:] == ["-m", "benchmarks.run", "--targets", *until, "246", "--json", raw]
    assert table[2:] == ["-m", "benchmarks.publish.targets", raw]
    # run.py has all but the table's time; it is interrupted 10 s before its end
    assert 300 - targets.brief - 10 > 246 + 25
    assert "/the/peers" in targets.env["PYTHONPATH"].split(os.pathsep)
    assert "/the/peers" not in tune.env["PYTHONPATH"].split(os.pathsep)
    assert run.parse([*measure[4:6], "cpu", *measure[7:]]).limit == 246


def test_make_runs_the_stages_of_the_norms():
    done = subprocess.run(
        ["make", "-n", "gpu-norms", "ARGS=--device cpu"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"--stages {','.join(NORMS)} --minutes 9 --device cpu" in " ".join(done.stdout.replace("\\\n", " ").split())


def test_targets_stage_end_to_end(tmp_path, monkeypatch):
    """Few cases: what the stage's own options allow is the default sweep's eighty seconds."""
    real = gpu_check.stages

    def few(*args):
        (targets,) = (s for s in real(*args) if s.name == "targets")

        def commands(limit):
            measure, table = targets.commands(limit)
            options = ["--only", "^layer_norm/.*/float32/4x64", "--baselines", "none", "--seconds", "0.02"]
            return [[*measure, *options], table]

        return [dataclasses.replace(targets, commands=commands)]

    monkeypatch.setattr(gpu_check, "stages", few)
    assert gpu_check.main([str(tmp_path), "--device", "cpu", "--stages", "targets"]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"targets.json", "targets.log", "summary.json", "summary.md"}
    log = (tmp_path / "targets.log").read_text()
    assert "2 cases in" in log
    row = r"\n\| their forward \+ backward under 1 MiB .* \d\.\d\dx \| +layer_norm/both/float32/4x64 \|"
    assert re.search(row, log.rpartition("$ ")[2])
    assert "their forward + backward under 1 MiB" in (tmp_path / "summary.md").read_text()


class Killed(BaseException):
    """What no program survives."""


@pytest.mark.parametrize(("how", "said"), [(KeyboardInterrupt, "interrupted"), (Killed, "cut off")])
def test_a_benchmark_that_is_cut_off_leaves_what_it_had(how, said, monkeypatch, tmp_path):
    real, calls = run.run_case, []

    def second_does_not_return(*args):
        calls.append(args)
        if len(calls) == 2:
            raise how
        return real(*args)

    monkeypatch.setattr(run, "run_case", second_does_not_return)
    if how is Killed:
        monkeypatch.setattr(run, "WRITE_EVERY", 0.0)
    raw = tmp_path / "raw.json"
    options = ["--device=cpu", "--threads=1", "--seconds=0.02", "--baselines=none", "--quick", f"--json={raw}"]
    with pytest.raises(Killed) if how is Killed else nullcontext():
        assert run.main([*options, "--only", "^layer_norm/forward/float32"]) == 0
    result = json.loads(raw.read_text())
    assert [r["status"] for r in result["cases"]] == ["measured"] and list(tmp_path.iterdir()) == [raw]
    assert set(result["left_out"].values()) == {said} and len(result["left_out"]) == 2
    assert result["method"]["level"] == "quick"
