"""Every figure with a unit in the prose of docs/ is what the committed data, or the code, says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.publish import add_result, gains, readme
from benchmarks.report.files import read_result
from benchmarks.report.stats import measured, ratio
from fusednorm.acceleration import example, fused
from fusednorm.dispatch import rules
from fusednorm.tuning import auto, fit, measure, timers
from tests.helpers.prose import blocks
from tools.release import wheel

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = r"\d(?:[\d.,]*\d)?"
UNIT = r"(?:x\b| times as| ?%| percent\b| ?[KMG]i?B\b| ?[mu]s\b| elements\b| ulps\b)"
FIGURE = re.compile(rf"{NUMBER}(?:(?:,| and| to| or) {NUMBER})*{UNIT}")


def model(name: str) -> float:
    (row,) = (row for row in read_result(RESULTS / "models.json")["rows"] if row["model"] == name)
    return row["ratio"]


def small_models() -> tuple[str, ...]:
    """Worst and best of those that are not of BERT-base's or GPT-2's size."""
    rows = read_result(RESULTS / "models.json")["rows"]
    ratios = [row["ratio"] for row in rows if row["model"].partition(" ")[0] not in ("bert", "gpt2")]
    return f"{min(ratios):.2f}", f"{max(ratios):.2f}"


def adaptive() -> tuple[str, ...]:
    cases = [case for _, result in add_result.newest() for case in measured(result) if "adaptive" in case["op"]]
    assert cases
    return ("faster" if min(ratio(case, "eager")[0] for case in cases) > 1 else "not faster",)


def worst_loss() -> tuple[str, ...]:
    files = sorted((ROOT / "fusednorm" / "dispatch" / "measured").glob("*.json"))
    return (f"{max(json.loads(path.read_text())['worst_loss'] for path in files):.0%}".rstrip("%"),)


def mebibytes(*sizes: int) -> tuple[str, ...]:
    return tuple(str(size >> 20) for size in sizes)


def confidence() -> tuple[str, ...]:
    return (f"{100 * timers.median_interval.__defaults__[0]:.0f}",)


class Fact(NamedTuple):
    """What a page says, a group for each figure, and where the figures are from."""

    said: str
    figures: Callable[[], tuple[str, ...]]


FACTS = [
    Fact(
        r"Two BERT-base blocks are (\S+) times as fast, two GPT-2 blocks (\S+) times",
        lambda: (
            f"{model('bert blocks'):.2f}",
            f"{model('gpt2 blocks'):.2f}",
        ),
    ),
    Fact(r"Small models are (\S+) to (\S+) times as fast", small_models),
    Fact(r"are (faster) than the statements of diffusers in every measured case", adaptive),
    Fact(
        r"use torch: up to (\d+) MiB of x, or (\d+) MiB with gradients",
        lambda: mebibytes(rules.HOST_BOUND[False], rules.HOST_BOUND[True]),
    ),
    Fact(r"Norms of up to (\d+) MiB take the fast path", lambda: mebibytes(rules.SMALL)),
    Fact(r"fused from (\S+) elements on", lambda: (f"{fused._LARGE:,}",)),
    Fact(r"before a LayerNorm are from (\S+) on", lambda: (f"{fused._LARGE * fused._BARE:,}",)),
    Fact(r"plus (\d+) ulps of the largest", lambda: (f"{example._ULPS:g}",)),
    Fact(r"only where it is (\S+) % faster", lambda: (f"{100 * (measure.SPREAD - 1):.0f}",)),
    Fact(r"[Tt]he (\d+) % interval of the paired ratios", confidence),
    Fact(r"for at most (\d+) ms", lambda: (f"{1000 * auto.SECONDS:.0f}",)),
    Fact(r"Tensors over (\d+) MiB", lambda: mebibytes(auto.MOST_BYTES)),
    Fact(r"calls over (\S+) ms stay", lambda: (f"{1000 * auto.LONGEST:.0f}",)),
    Fact(r"within (\d+) % of the fastest provider at every", lambda: (f"{100 * fit.TOLERATED:.0f}",)),
    Fact(r"the largest loss on a device, (\d+) %", worst_loss),
    Fact(r"It takes less than (\d+) MB", lambda: (f"{wheel.MOST_BYTES / 1e6:g}",)),
]


def passages(markdown: str) -> list[str]:
    """Blocks of prose, a table by its rows; what a command wrote is left out, other tests compare it with its data."""
    if markdown.startswith("<!-- written by"):
        return []
    found: dict[int, list[str]] = {}
    for line, text in blocks(re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", "", markdown, flags=re.DOTALL)):
        found.setdefault(line, []).append(text)
    return [" | ".join(texts) for texts in found.values()]


def held(passage: str) -> tuple[list[tuple[int, int]], list[str], set[Fact]]:
    """Where a passage says facts, which of them are wrong, and the facts."""
    places, wrong, known = [], [], set()
    for fact in FACTS:
        for match in re.finditer(fact.said, passage):
            places.append(match.span())
            known.add(fact)
            if match.groups() != fact.figures():
                wrong.append(f"{match[0]!r}: the data say {', '.join(fact.figures())}")
    return places, wrong, known


def faults(passage: str) -> list[str]:
    places, wrong, _ = held(passage)
    alone = [
        match[0] for match in FIGURE.finditer(passage) if not any(start <= match.start() < end for start, end in places)
    ]
    return wrong + [f"{figure!r} in {passage!r} has no data" for figure in alone]


PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_figures_of_a_page_are_those_of_the_data(page):
    assert [fault for passage in passages(page.read_text(encoding="utf-8")) for fault in faults(passage)] == []


def test_every_fact_is_said():
    said: set[Fact] = set()
    for page in PAGES:
        for passage in passages(page.read_text(encoding="utf-8")):
            said |= held(passage)[2]
    assert [fact.said for fact in FACTS if fact not in said] == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Small models are 1.50 to 9.99 times as fast.", "the data say"),
        ("It is 7.5 times as fast.", "'7.5 times as' in"),
        ("It takes 12 % of the bytes.", "'12 %' in"),
        ("| a | b |\n|---|---|\n| it | 3x and 550 MiB |", "'550 MiB' in"),
        ("It is 1.05 to 1.2 times as fast.", "'1.05 to 1.2 times as' in"),
    ],
)
def test_figures_without_data_are_found(text, fault):
    found = [said for passage in passages(text) for said in faults(passage)]
    assert any(fault in said for said in found), found


def test_what_a_command_wrote_is_left_to_its_own_test():
    assert passages("<!-- x: begin -->\n\n5 %\n\n<!-- x: end -->\n\nText of 3 words.") == ["Text of 3 words."]
    assert faults("Text of 3 words, and `2 x 3` shapes.") == []


def test_the_table_of_gains_is_of_one_machine_and_is_noticed_to_differ(monkeypatch, capsys):
    _, newest = add_result.newest()[0]
    files = [read_result(RESULTS / name) for name in ("memory.json", "models.json")]
    assert {result["environment"]["cpu"] for result in [*files, newest]} == {newest["environment"]["cpu"]}
    assert newest["method"]["threads"] == files[0]["threads"]
    assert readme.main(["--check"]) == 0
    monkeypatch.setattr(gains, "step", lambda: "a step 9.99 times as fast")
    assert readme.main(["--check"]) == 1
    assert "drop-in.md does not follow the data" in capsys.readouterr().out
