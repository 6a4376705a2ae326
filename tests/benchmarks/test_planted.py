"""Planted providers, measured by run.py from end to end: a slow one is flagged, a wrong one gets no figure."""

from __future__ import annotations

import json
import time
import types
from unittest import mock

import pytest

from benchmarks import run
from fusednorm.providers.reference import norm as reference
from tests.helpers import dispatching

pytestmark = pytest.mark.usefixtures("ordinary_memory")
FAST = ["--device", "cpu", "--threads", "1", "--seconds", "0.02", "--baselines", "none", "--quick"]
FORWARD, BACKWARD = "add_layer_norm_fwd", "add_layer_norm_bwd"


@pytest.fixture
def plant(monkeypatch):
    """Puts the reference into the table under the name `planted`, with ops of one's own in place of some of its."""

    def replace(**ops):
        module = types.ModuleType("fusednorm_test_benchmarks_planted")
        own = {FORWARD: getattr(reference, FORWARD), BACKWARD: getattr(reference, BACKWARD)}
        vars(module).update(own | ops, unavailable_reason=lambda: None, refusal=lambda op, *args: None)
        dispatching.plant(monkeypatch, "planted", module)

    return replace


def measure(only, raw, *options):
    """The exit status of a run with the planted provider, and its records by name."""
    status = run.main([*FAST, "--provider", "planted", "--only", only, "--json", str(raw), *map(str, options)])
    return status, {record["name"]: record for record in json.loads(raw.read_text())["cases"]}


def slow(op):
    def waiting(*args):
        time.sleep(1e-2)
        return getattr(reference, op)(*args)

    return waiting


@pytest.mark.parametrize(("op", "direction"), [(FORWARD, "forward"), (BACKWARD, "both")])
def test_a_kernel_that_became_slow_is_flagged(op, direction, plant, tmp_path, capsys):
    name = f"rms_norm/{direction}/float32/4x64"
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    rounds = ("--seconds", 0.6)  # many: the interval of a few samples holds what a busy machine does to one of them
    plant()
    status, records = measure(f"^{name}$", before, *rounds)
    assert status == 0 and records[name]["provider"] == "planted"
    assert "Compared" not in capsys.readouterr().out
    plant(**{op: slow(op)})
    status, records = measure(f"^{name}$", after, "--compare", before, *rounds)
    assert status == 3
    assert min(records[name]["variants"]["fused"]["samples"]) > 1e-2
    out = capsys.readouterr().out
    assert "1 changed beyond the spread, 1 for the worse." in out
    assert [name in line for line in out.splitlines() if "SLOWER" in line] == [True]
    plant()
    assert measure(f"^{name}$", before, "--compare", after, *rounds)[0] == 0  # faster again: no regression
    assert "1 changed beyond the spread, 0 for the worse." in capsys.readouterr().out


def spoiled(op, index, spoil):
    """An op whose result number `index` is spoiled."""

    def wrong(*args):
        results = list(getattr(reference, op)(*args))
        results[index] = spoil(results[index])
        return tuple(results)

    return wrong


def one_element(t):
    if not t.numel():
        return t
    t = t.clone()
    t.view(-1)[-1] += 0.25
    return t


WRONG = {
    "normed": (FORWARD, spoiled(FORWARD, 0, one_element)),
    "residual_out": (FORWARD, spoiled(FORWARD, 1, one_element)),
    "NaN": (FORWARD, spoiled(FORWARD, 0, lambda t: t * float("nan"))),
    "dx": (BACKWARD, spoiled(BACKWARD, 0, one_element)),
    "dresidual": (BACKWARD, spoiled(BACKWARD, 1, one_element)),
    "dweight": (BACKWARD, spoiled(BACKWARD, 2, one_element)),
    "dbias": (BACKWARD, spoiled(BACKWARD, 3, lambda t: 2 * t)),
    "dx_bias": (BACKWARD, spoiled(BACKWARD, 4, one_element)),
    "no launch": (FORWARD, mock.Mock(side_effect=RuntimeError("launch failed"))),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_provider_gets_no_figure(fault, plant, tmp_path, capsys):
    op, wrong = WRONG[fault]
    plant(**{op: wrong})
    status, records = measure("^bias_dropout_add_layer_norm/.*/float32/4x64$", tmp_path / "raw.json")
    assert status == 1
    forward, both = (records[f"bias_dropout_add_layer_norm/{d}/float32/4x64"] for d in ("forward", "both"))
    verdict = "failed" if fault == "no launch" else "wrong"
    assert (both["status"], both["variants"]) == (verdict, {})
    expected = ("measured", True) if op == BACKWARD else (verdict, False)
    assert (forward["status"], bool(forward["variants"])) == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if "_layer_norm/both" in line]
    assert lines and all(verdict.upper() in line and " us" not in line for line in lines)
    said = {"NaN": "max|normed - fp64|", "no launch": "RuntimeError: launch failed"}.get(fault, f"max|{fault} - fp64|")
    assert all(said in line for line in lines)


def test_a_kernel_that_became_wrong_is_flagged_and_has_no_figure(plant, tmp_path, capsys):
    only, before = "^rms_norm/forward/float32/4x64$", tmp_path / "before.json"
    plant()
    assert measure(only, before)[0] == 0
    plant(**{FORWARD: spoiled(FORWARD, 0, one_element)})
    status, records = measure(only, tmp_path / "after.json", "--compare", before)
    assert status == 1 and [record["variants"] for record in records.values()] == [{}]
    said = capsys.readouterr().out.rpartition("Compared")[2]
    assert "1 changed beyond the spread, 1 for the worse." in said and "WRONG" in said.partition("Conclusion")[0]
