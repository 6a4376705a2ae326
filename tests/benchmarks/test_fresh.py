"""The benchmark of large results in new memory: its processes, its table."""

from __future__ import annotations

import sys

import pytest

from benchmarks import huge_pages


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked for on Linux alone")
def test_every_variant_is_measured_in_turn(tmp_path, capsys):
    assert huge_pages.main(["--shape", "64x96", "--rounds", "2", "--report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "huge_pages.md").read_text() == said
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| 64x96")
    ]
    assert [row[1] for row in rows] == list(huge_pages.VARIANTS)
    assert rows[0][3] == "1.00 [1.00, 1.00]"


def test_a_row_is_eagers_time_over_the_variants():
    found = {"eager": [[3.0, 100], [4.0, 100], [5.0, 100]], "fusednorm": [[1.0, 7], [2.0, 7], [5.0, 7]]}
    eager, ours = huge_pages.rows_of((2, 3), found)
    assert eager == ["2x3", "eager", "4 s", "1.00 [1.00, 1.00]", "100"]
    assert ours == ["2x3", "fusednorm", "2 s", "2.00 [1.00, 3.00]", "7"]


@pytest.mark.parametrize("shape", ["64", "64x", "axb"])
def test_a_shape_that_is_none_is_refused(shape, capsys):
    with pytest.raises(SystemExit):
        huge_pages.main(["--shape", shape])
    assert "ROWSxCOLUMNS" in capsys.readouterr().err
