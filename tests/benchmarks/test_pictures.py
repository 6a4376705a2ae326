"""What the pictures of docs/ show is what the package computes, and each has its file and its place in a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import memory
from benchmarks.publish import pictures
from benchmarks.report.files import read_result

QUERY, KEY = torch.arange(8)[:, None], torch.arange(8)
row, column = QUERY[:6], KEY[:6]
SEQUENCE = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
SAME, UP_TO = SEQUENCE[:, None] == SEQUENCE, torch.ones(9, 9).tril().bool()
SEEN = {
    "full": [torch.ones(6, 6)],
    "causal": [column <= row],
    "alignment": [column <= row[:3], column <= row[:3] + 3],
    "window": [(row - 2 <= column) & (column <= row + right) for right in (0, 1, 6)],
    "padding": [torch.ones(6, 6), (column < 4).expand(6, 6)],
    "bias": [KEY <= QUERY] * 2,
    "softcap": [torch.ones(6, 6)] * 2,
    "packed": [SAME, SAME & UP_TO],
    "grouped": [torch.arange(6)[:, None] // 3 == torch.arange(2)],
}


@pytest.mark.parametrize("name", pictures.MASKS)
def test_squares_of_a_mask_are_the_keys_that_a_query_sees(name):
    panels = pictures.MASKS[name]()
    for panel, seen in zip(panels, SEEN[name], strict=True):
        assert torch.equal(panel.weights > 0, seen.bool()), panel.title
        torch.testing.assert_close(panel.weights.sum(1), torch.ones(len(seen)))


def test_shades_are_the_weights_of_the_formula():
    for panel, slope in zip(pictures.bias(), (0.5, 0.125)):
        logits = (-slope * (QUERY - KEY)).masked_fill(KEY > QUERY, -torch.inf)
        torch.testing.assert_close(panel.weights, logits.softmax(1))
    logits = 8 - 3.0 * (row - column).abs()
    plain, capped = pictures.softcap()
    torch.testing.assert_close(plain.weights, logits.softmax(1))
    torch.testing.assert_close(capped.weights, (2 * (logits / 2).tanh()).softmax(1))


@pytest.mark.filterwarnings("ignore:memory_efficient")
def test_bytes_by_part_are_what_a_step_keeps():
    committed = {case["name"]: case for case in read_result(pictures.MEMORY)["cases"]}
    shown = pictures.memory({"cases": committed.values()})
    ways = {way.name: way for way in memory.ways()}
    assert list(shown)[:2] == ["torch.nn, float32", "fusednorm, float32"] and len(shown) == 5
    for name, parts in shown.items():
        assert sum(parts.values()) == committed[name]["kept_bytes"], name
        assert memory.Training(ways[name]).bytes() == {"kept_bytes": sum(parts.values()), "kept_parts": parts}, name


def test_pictures_are_drawn_and_shown(tmp_path):
    assert pictures.main(["--folder", str(tmp_path)]) == 0
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"memory.png", *(f"mask-{name}.png" for name in pictures.MASKS)}
    assert all((pictures.IMAGES / name).stat().st_size > 1000 for name in drawn)
    pages = "".join(path.read_text(encoding="utf-8") for path in (pictures.ROOT / "docs").glob("*.md"))
    assert drawn <= set(re.findall(r"\]\(images/([\w-]+\.png)\)", pages))


def test_other_ways_are_no_result_to_count_anew(tmp_path):
    (tmp_path / "memory.json").write_text(Path(pictures.MEMORY).read_text().replace("fusednorm, float32", "other"))
    with pytest.raises(ValueError, match="other ways"):
        memory.renewed(read_result(tmp_path / "memory.json"), [memory.Training(way) for way in memory.ways()[:1]])
