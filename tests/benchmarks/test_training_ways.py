"""The benchmarks of generation and of ways to train run, and write what they say."""

from __future__ import annotations

import json
import time

import pytest
import torch
from fastpath_calls import NEEDS_FASTPATH

from benchmarks import allocators, fastpath, generation, memory
from benchmarks.measure.turns import in_turns

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_generation_writes_its_figures(tmp_path, capsys):
    assert generation.main(["--rounds", "3", "--tokens", "4", "--keys", "16", "--report", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "generation.json").read_text())["cases"]
    assert len(found) == 4 and all(case["ours"] > 0 and case["theirs"] > 0 for case in found)
    assert (tmp_path / "generation.md").read_text() in capsys.readouterr().out


def test_allocators_are_measured_in_processes_of_their_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(allocators, "allocators", lambda: {"kept": allocators.KEPT, "as it is": {}})
    assert allocators.main(["--rounds", "2", "--report", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "allocators.json").read_text())["allocators"]
    assert list(found) == ["kept", "as it is"]
    for kept, given_back in zip(*found.values(), strict=True):
        assert min(kept[name] for name in ("copy", "clone", "eager", "ours")) > 0
        assert kept["case"] == given_back["case"] and kept["faults"] >= 0 and given_back["faults"] >= 0
    page = capsys.readouterr().out
    assert (tmp_path / "allocators.md").read_text() in page and "4096 x 4096, float32" in page


@NEEDS_FASTPATH
def test_ways_with_and_without_the_fast_path_are_measured_in_processes_of_their_own(tmp_path, capsys):
    assert fastpath.main(["--turns", "1", "--seconds", "0", "--report", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "fastpath.json").read_text())["ways"]
    assert list(found) == ["fast path", "without"]
    for [turn] in found.values():
        assert len(turn) == 18 and all(us > 0 for case in turn.values() for us in case.values())
    assert (tmp_path / "fastpath.md").read_text() in capsys.readouterr().out


@NEEDS_FASTPATH
def test_the_way_that_is_asked_for_is_the_one_that_is_measured(monkeypatch):
    monkeypatch.setenv("FUSEDNORM_FASTPATH", "0")  # after it was loaded
    with pytest.raises(SystemExit, match="the fast path is not here"):
        fastpath.here(0.0)


def test_generation_notices_other_tokens(monkeypatch):
    monkeypatch.setattr(generation.Gpt, "recompute", lambda self, prompt, count: torch.zeros(len(prompt), count))
    with pytest.raises(AssertionError, match="tokens of both ways differ"):
        generation.generation(1, 4, 1)


def test_ways_to_train_write_their_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "BATCH", 4)
    monkeypatch.setattr(memory, "LENGTH", 8)
    monkeypatch.setattr(memory, "WIDTH", 64)
    assert memory.main(["--rounds", "2", "--report", str(tmp_path)]) == 0
    kept = {c["name"]: c["kept_bytes"] for c in json.loads((tmp_path / "memory.json").read_text())["cases"]}
    assert len(kept) == len(memory.ways())
    eager, ours = kept["torch.nn, float32"], kept["fusednorm, float32"]
    assert kept["fusednorm, recompute=norms, activation, attention"] < ours < eager
    assert kept["fusednorm, gradients of 4 parts accumulated"] < 0.3 * ours


def test_turns_alternate_and_are_timed():
    said: list[str] = []
    calls = [lambda: said.append("a"), lambda: (time.sleep(0.002), said.append("b")), lambda: said.append("c")]
    times = in_turns(calls, 3)
    assert said == [*"abc", *"cba", *"abc"]
    assert [len(taken) for taken in times] == [3, 3, 3] and min(times[1]) > 0.002 > min(times[0] + times[2]) > 0
