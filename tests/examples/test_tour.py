"""The tour prints what it shows, and what it shows is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import examples

TOUR = Path(examples.__file__).parent / "tour.py"


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *text: lines.append(" ".join(map(str, text))))
        runpy.run_path(str(TOUR), run_name="__main__")
    return "\n".join(lines)


def test_every_cell_prints(said: str):
    cells = re.findall(r"^# %% (?!\[markdown\])", TOUR.read_text("utf-8"), re.M)
    parts = said.split("\n--- ")
    assert len(parts) == len(cells) >= 9 and all(part.count("\n") >= 2 for part in parts[1:])


def test_what_is_said_to_be_equal_is(said: str):
    found = [float(number) for number in re.findall(r"differ\D+? (\d\.\de[-+]\d+)", said)]
    assert len(found) >= 7 and all(number < 1e-5 for number in found)
    assert said.count("True") >= 7 and "False" not in said


def test_fewer_bytes_are_kept_than_by_torch(said: str):
    pairs = re.findall(r"keeps ([\d.]+) MiB .*?, and ([\d.]+) MiB", said)
    assert len(pairs) == 2 and all(float(ours) < float(theirs) for theirs, ours in pairs)


def test_all_of_the_model_is_accelerated(said: str):
    assert "torch.nn.Sequential: 13 fused, 0 left as they are" in said
