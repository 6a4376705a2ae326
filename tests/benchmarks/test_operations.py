"""The pytest-benchmark suite in benchmarks/, which `make test` leaves out, still collects and runs."""

from __future__ import annotations

import pytest

from benchmarks.cases import TINY, Sweep


class Counts:
    """A plugin of the suite's own run."""

    def __init__(self) -> None:
        self.deselected, self.passed = 0, 0

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += len(items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed


def test_the_suite_collects_every_case_and_runs_one(pytestconfig, monkeypatch):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark times the suite and is not installed")
    monkeypatch.chdir(pytestconfig.rootpath)
    chosen, counts = f"bias_dropout_add_rms_norm and both and bfloat16 and {'x'.join(map(str, TINY))}", Counts()
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-disable", "-k", chosen]
    assert pytest.main(["benchmarks/test_operations.py", *options], [counts]) == pytest.ExitCode.OK
    assert counts.passed == 2  # eager and fused
    layers = [op for op in Sweep((), ()).operations().values() if op.family == "layer"]
    others = len(Sweep((), ()).operations()) - len(layers)
    # sizes, eager and fused; directions and dtypes, of which layers have one
    assert counts.passed + counts.deselected == 2 * 2 * (others * 2 * 2 + len(layers))


def test_the_default_run_leaves_the_suite_out(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
