"""The benchmarks of generation and of ways to train run, and write what they say."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import generation, memory

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_generation_writes_its_figures(tmp_path, capsys):
    assert generation.main(["--rounds", "3", "--tokens", "4", "--keys", "16", "--report", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "generation.json").read_text())["cases"]
    assert len(found) == 4 and all(case["ours"] > 0 and case["theirs"] > 0 for case in found)
    assert (tmp_path / "generation.md").read_text() in capsys.readouterr().out


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
