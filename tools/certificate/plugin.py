"""A pytest plugin that notes what marked tests prove: ``pytest -p tools.certificate.plugin --certificate FILE``.

A test is marked ``certifies(*properties, op=..., provider=..., on=...)``. What the marker does not name is read off
the test's parameters and fixtures. With ``--collect-only`` the file says what would be proved, without outcomes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tools.certificate.cells import OPERATORS, PROPERTIES, PROVIDERS

OF_MODULES = {"bias_act_dropout_fwd": "bias_act_dropout", "attention_fwd": "scaled_dot_product_attention"}
ALLOWED = {"op", "provider", "on"}


class Claim(NamedTuple):
    """What one case of a test proves, if it passes."""

    op: str
    provider: str
    property: str
    on: str
    dtype: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--certificate", type=Path, metavar="FILE", help="write here what marked tests proved, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--certificate")
    if path is not None:
        config.pluginmanager.register(Recorder(config, path), "certificate")


def claims(item: pytest.Item) -> list[Claim]:
    """Of a marked test, one for each operator and property; none where no provider is asked for by name."""
    found = []
    for marker in item.iter_markers("certifies"):
        unknown = [*(set(marker.args) - PROPERTIES.keys()), *(marker.kwargs.keys() - ALLOWED)]
        if unknown or not marker.args:
            raise pytest.UsageError(f"{item.nodeid}: certifies {unknown or 'nothing'}; known: {', '.join(PROPERTIES)}")
        provider = marker.kwargs.get("provider") or _provider(item)
        if provider == "automatic":
            continue
        ops = marker.kwargs.get("op") or _op(item)
        ops = (ops,) if isinstance(ops, str) else tuple(ops or ())
        if provider not in PROVIDERS or not ops or not OPERATORS.keys() >= set(ops):
            raise pytest.UsageError(
                f"{item.nodeid}: its marker certifies names no operator and provider: {ops, provider}"
            )
        on, dtype = _on(item, provider, marker.kwargs.get("on")), _dtype(item)
        found += [Claim(op, provider, name, on, dtype) for op in ops for name in marker.args]
    return found


def _parameters(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else callspec.params


def _provider(item: pytest.Item) -> str | None:
    given = _parameters(item)
    if "place" in given:
        return str(given["place"][0])
    named = given.get("kernels", given.get("provider"))
    return named or next((name for name in ("cuda", "triton") if name in getattr(item, "fixturenames", ())), None)


def _op(item: pytest.Item) -> str | None:
    given = _parameters(item)
    named = given.get("function", getattr(given.get("operator"), "name", None))
    return named or OF_MODULES.get(getattr(getattr(item, "module", None), "OP", ""))


def _dtype(item: pytest.Item) -> str:
    dtype = _parameters(item).get("dtype")
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _on(item: pytest.Item, provider: str, said: str | None) -> str:
    """Where the case runs: what the marker says of kernels that do not, else the device or what stands in for it."""
    place = _parameters(item).get("place", ("", "cpu"))
    if said is not None and (said != "formulas" or provider != "torch"):
        return said
    if place[1] == "cuda" or item.get_closest_marker("gpu"):
        return "GPU"
    return {"triton": "interpreter", "cuda": "emulation"}.get(provider, "CPU")


class Recorder:
    """Sums up outcomes. With pytest-xdist it runs in the process that starts the others, which it gets reports from."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self.path, self.writes = path, not hasattr(config, "workerinput")
        self.collecting = config.option.collectonly
        self.found: dict[tuple[str, Claim], dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.failed: list[str] = []
        self.passed = 0  # cases with a claim

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            noted = claims(item)
            item.user_properties.append(("certifies", [[*claim] for claim in noted]))  # what xdist can send
            if self.collecting:
                self._add(item.nodeid, noted, "collected")

    def _add(self, nodeid: str, noted: Iterable[Any], outcome: str) -> None:
        for claim in noted:
            self.found[nodeid.partition("[")[0], Claim(*claim)][outcome] += 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        noted = dict(report.user_properties).get("certifies", [])
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped and isinstance(report.longrepr, tuple):
            self._add(report.nodeid, noted, report.longrepr[2].removeprefix("Skipped: ").partition(";")[0])
        elif report.when == "call" and report.passed:
            self._add(report.nodeid, noted, "passed")
            self.passed += bool(noted)

    def pytest_sessionfinish(self) -> None:
        if self.writes:
            self.path.write_text(
                json.dumps({"tests": self._tests(), "failed": self.failed, "passed": self.passed}), encoding="utf-8"
            )

    def _tests(self) -> dict[str, list[dict[str, Any]]]:
        """For each test its cells, with the dtypes that passed, how many cases did, and why others were skipped."""
        cells: dict[str, dict[tuple[str, ...], dict[str, Any]]] = defaultdict(dict)
        for (test, claim), outcomes in self.found.items():
            key = claim[:4]
            cell = cells[test].setdefault(key, {"dtypes": set(), "passed": 0, "skipped": defaultdict(int)})
            for outcome, number in outcomes.items():
                if outcome in ("passed", "collected"):
                    cell["passed"] += number
                    cell["dtypes"] |= {claim.dtype} - {""}
                else:
                    cell["skipped"][outcome] += number
        return {
            test: [
                dict(zip(Claim._fields, key))
                | {"passed": cell["passed"]}
                | {"dtypes": sorted(cell["dtypes"]), "skipped": dict(sorted(cell["skipped"].items()))}
                for key, cell in sorted(of_test.items())
            ]
            for test, of_test in sorted(cells.items())
        }
