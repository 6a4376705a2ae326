"""The pytest-benchmark suite in benchmarks/, which `make test` leaves out, still collects and runs."""

from __future__ import annotations

import re

import pytest
from fresh import python

from benchmarks.cases import TINY, Sweep


def test_the_suite_collects_every_case_and_runs_one():
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark times the suite and is not installed")
    chosen = f"bias_dropout_add_rms_norm and both and bfloat16 and {'x'.join(map(str, TINY))}"
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-disable", "-k", chosen]
    said = python("-m", "pytest", "benchmarks/test_operations.py", *options)
    passed, deselected = (int(re.search(rf"(\d+) {what}", said)[1]) for what in ("passed", "deselected"))
    assert passed == 2  # eager and fused
    layers = [op for op in Sweep((), ()).operations().values() if op.family == "layer"]
    others = len(Sweep((), ()).operations()) - len(layers)
    # sizes, eager and fused; directions and dtypes, of which layers have one
    assert passed + deselected == 2 * 2 * (others * 2 * 2 + len(layers))


def test_the_default_run_leaves_the_suite_out(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
