"""Training steps of whole models before and after accelerate."""

from __future__ import annotations

import json

import pytest

from benchmarks import models


def test_a_model_is_measured_and_its_launches_are_counted(tmp_path, capsys):
    models.main(["--only", "^GPT-2$", "--rounds", "3", "--seconds", "0", "--threads", "1", "--report", str(tmp_path)])
    result = json.loads((tmp_path / "models.json").read_text())
    rows = {row["model"]: row for row in result["rows"]}
    assert "GPT-2" in rows
    row = rows["GPT-2"]
    assert row["launches"][0] - row["launches"][1] > 20 and row["ratio"] > 0.5 and row["rounds"] == models.PLACES
    assert "| GPT-2 |" in (tmp_path / "models.md").read_text() and "| GPT-2 |" in capsys.readouterr().out


def test_an_unknown_model_is_said(capsys):
    with pytest.raises(SystemExit):
        models.main(["--only", "no such model"])
    assert "no model is named like 'no such model'" in capsys.readouterr().err
