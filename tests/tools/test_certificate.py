"""The certificate: its page is what its record says, and its record is of the tests that there are."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from fusednorm import dispatch
from fusednorm.__main__ import FUNCTIONS
from tools.certificate import cells, evidence, page
from tools.certificate.__main__ import ROOT, SELECTED, marked_files
from tools.certificate.evidence import Key

RECORDS = evidence.records()
TESTS = evidence.merged(RECORDS)
LINK = re.compile(r'\[\w(\d+)\]\(\.\./(tests/[\w/]+\.py) "(\w+)"\)')


def noted(path, *arguments: str) -> tuple[dict[str, Any], int]:
    """What the plugin writes of a run, and the run's exit status."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.certificate.plugin", "--certificate", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments], cwd=ROOT, env=environment, capture_output=True
    )
    return json.loads(path.read_text()) if path.exists() else {}, run.returncode


def claimed(tests: dict[str, list[dict[str, Any]]]) -> set[tuple[str, ...]]:
    return {(test, e["op"], e["provider"], e["property"]) for test, entries in tests.items() for e in entries}


def test_the_page_is_what_the_tool_writes():
    assert page.PAGE.read_text(encoding="utf-8") == page.page(RECORDS), "run `make certificate`"


def test_no_run_had_a_failure():
    assert [record["failed"] for record in RECORDS] == [[]] * len(RECORDS)


def test_the_record_has_every_marked_test_and_no_other(tmp_path):
    """With the operators, providers and properties that its cases prove."""
    collected, status = noted(tmp_path / "claims.json", "--collect-only", "-m", SELECTED, *marked_files())
    assert status == 0
    for record in RECORDS:
        assert claimed(record["tests"]) == claimed(collected["tests"]), "run `make certificate`"


def test_every_link_names_a_marked_test_and_every_marked_test_is_listed():
    text = page.PAGE.read_text(encoding="utf-8")
    body, _, listed = text.partition("## Tests\n")
    names = re.findall(r"(\d+) `(\w+)` \(\d+\)", listed)
    assert [name for _, name in names] == [test.rpartition("::")[2] for test in TESTS]
    links = LINK.findall(body)
    assert len(links) > 300 and body.count("](../tests") == len(links)
    for number, path, name in links:
        assert names[int(number) - 1] == (number, name)
        assert f"{path}::{name}" in TESTS
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_the_rows_are_the_operators_and_the_providers():
    """Those that the command line explains, and what has no provider of its own."""
    assert set(cells.OPERATORS) == {*FUNCTIONS, "modulation", "dropout_mask"}
    assert tuple(dispatch.PROVIDERS) == cells.PROVIDERS


def test_every_cell_has_a_test_or_a_reason():
    found = evidence.cells(TESTS)
    assert len(found) == len(cells.OPERATORS) * len(cells.PROVIDERS) * len(cells.PROPERTIES)
    assert evidence.faults(found) == []


CELL = Key("varlen_attention", "cpu", "2^31 elements")


def of_cell(tests: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return [e for entries in tests.values() for e in entries if (e["op"], e["provider"], e["property"]) == CELL]


def test_a_cell_without_its_test_is_a_fault():
    tests = copy.deepcopy(TESTS)
    for entries in tests.values():
        entries[:] = [e for e in entries if (e["op"], e["provider"], e["property"]) != CELL]
    said = [f"{CELL.op} by {CELL.provider}, {CELL.property}: neither a test nor a reason"]
    assert evidence.faults(evidence.cells(tests)) == said


def test_a_skipped_test_proves_nothing_and_gives_its_reason():
    tests = copy.deepcopy(TESTS)
    for entry in of_cell(tests):
        entry |= {"passed": 0, "skipped": {"there is no memory for it": 3}}
    found = evidence.cells(tests)[CELL]
    assert (found.proofs, found.reason) == ({}, "there is no memory for it")
    assert found.strongest is None and evidence.cells(TESTS)[CELL].strongest == "CPU"


@pytest.mark.parametrize("where", [CELL, Key("add_layer_norm", "cpu", "CUDA graph")], ids=["proved", "twice"])
def test_a_reason_beside_a_test_or_another_reason_is_a_fault(where, monkeypatch):
    planted = cells.Reason((where.op,), (where.provider,), (where.property,), "It is not wanted.")
    for module in (cells, evidence):
        monkeypatch.setattr(module, "REASONS", (*cells.REASONS, planted))
    (said,) = evidence.faults(evidence.cells(TESTS))
    assert said.startswith(f"{where.op} by {where.provider}, {where.property}: ")


def test_a_test_that_waits_for_a_gpu_is_no_proof_until_it_ran():
    key = Key("rms_norm", "torch", "CUDA graph")
    tests = {
        "tests/a.py::test_a": [{**key._asdict(), "on": "GPU", "passed": 0, "dtypes": [], "skipped": {"no GPU": 1}}]
    }
    cell = evidence.cells(tests)[key]
    assert (page.state(cell), cell.waiting) == ("never run", "tests/a.py::test_a")
    tests["tests/a.py::test_a"][0]["passed"] = 1
    cell = evidence.cells(tests)[key]
    assert (page.state(cell), cell.waiting) == ("GPU", None)


PLANTED = """
import pytest

certifies = pytest.mark.certifies

@certifies("forward", "backward", provider="cpu")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", ["rms_norm"])
def test_passes(function, dtype): pass

@certifies("vmap", op=("layer_norm", "rms_norm"), on="formulas")
@pytest.mark.parametrize("place", [("triton", "cpu"), ("torch", "cpu"), ("cuda", "cuda"), ("automatic", "cpu")])
def test_of_places(place): pass

@certifies("empty", op="layer_norm", provider="cuda")
def test_skips(): pytest.skip("it is late; come back")

@certifies("strided", op="layer_norm", provider="cpu")
def test_fails(): {}

def test_unmarked(): pass
"""


def planted(tmp_path, text: str) -> tuple[dict[str, Any], int]:
    path = tmp_path / "test_planted.py"
    path.write_text(text)
    configuration = ["-c", os.devnull, "--rootdir", str(tmp_path), "-o", "markers=certifies: as here"]
    return noted(tmp_path / "noted.json", *configuration, str(path))


def test_the_plugin_notes_what_ran(tmp_path):
    found, status = planted(tmp_path, PLANTED.format("assert False"))
    tests = {name.partition("::")[2]: entries for name, entries in found["tests"].items()}
    assert status == 1 and [name.rpartition("::")[2] for name in found["failed"]] == ["test_fails"]
    assert tests.keys() == {"test_passes", "test_of_places", "test_skips"} and found["passed"] == 5
    common = {"op": "rms_norm", "provider": "cpu", "on": "CPU", "passed": 2, "skipped": {}}
    assert tests["test_passes"] == [
        common | {"property": name, "dtypes": ["float32", "float64"]} for name in ("backward", "forward")
    ]
    places = {(e["op"], e["provider"], e["on"]) for e in tests["test_of_places"]}
    ran = {("triton", "formulas"), ("torch", "CPU"), ("cuda", "formulas")}
    assert places == {(op, *place) for op in ("layer_norm", "rms_norm") for place in ran}
    (skipped,) = tests["test_skips"]
    assert (skipped["passed"], skipped["skipped"], skipped["on"]) == (0, {"it is late": 1}, "emulation")


@pytest.mark.parametrize(
    "marker",
    [
        'pytest.mark.certifies("foreward", provider="cpu")\n@certifies("forward"',
        'pytest.mark.certifies("forward")\n@certifies("forward"',
        'pytest.mark.certifies(provider="cpu")\n@certifies("forward"',
        'pytest.mark.certifies("forward", operator="rms_norm")\n@certifies("forward"',
    ],
    ids=["no property", "no provider", "nothing", "no argument"],
)
def test_a_marker_that_says_nothing_known_ends_the_run(marker, tmp_path):
    text = PLANTED.format("pass").replace('certifies("forward"', marker, 1)
    assert planted(tmp_path, text)[1] == 4
