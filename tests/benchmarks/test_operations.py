"""The pytest-benchmark suite in benchmarks/, which `make test` leaves out, still collects and runs."""

from __future__ import annotations

import re

import pytest

from benchmarks.cases import TINY, Sweep


def test_the_suite_collects_every_case_and_runs_one(pytestconfig, monkeypatch, capsys):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark times the suite and is not installed")
    monkeypatch.chdir(pytestconfig.rootpath)
    chosen = f"bias_dropout_add_rms_norm and both and bfloat16 and {'x'.join(map(str, TINY))}"
    options = ["-q", "-s", "-p", "no:cacheprovider", "--benchmark-disable", "-k", chosen]
    assert pytest.main(["benchmarks/test_operations.py", *options]) == pytest.ExitCode.OK
    passed, deselected = map(int, re.findall(r"(\d+) (?:passed|deselected)", capsys.readouterr().out))
    assert passed == 2  # eager and fused
    layers = [op for op in Sweep((), ()).operations().values() if op.family == "layer"]
    others = len(Sweep((), ()).operations()) - len(layers)
    # sizes, eager and fused; directions and dtypes, of which layers have one
    assert passed + deselected == 2 * 2 * (others * 2 * 2 + len(layers))


def test_the_default_run_leaves_the_suite_out(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
