"""The benchmark's HTML page: complete, readable, and in need of no other file."""

from __future__ import annotations

import base64
import html
import re
import sys

import pytest

from benchmarks.report import pages as report
from tests.benchmarks.test_report import record, result


class Reader:
    """Tables as rows of cells, the text of headings, the attributes that could name another file."""

    def __init__(self, page: str) -> None:
        self.tags = set(re.findall(r"<(\w+)", page))
        self.headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
        self.images, self.links = (re.findall(rf"\b{name}=[\"']?([^\"'\s>]*)", page) for name in ("src", "href"))
        tables = (
            re.findall(r"<tr>(.*?)</tr>", table, re.S) for table in re.findall(r"<table>(.*?)</table>", page, re.S)
        )
        self.tables = [[self.cells(row) for row in table] for table in tables]

    def cells(self, row: str) -> list[str]:
        """Without what a browser takes for tags."""
        found = re.findall(r"<t[dh]\b[^>]*>(.*?)</t[dh]>", row, re.S)
        return [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in found]


@pytest.fixture
def of():
    slow, wrong = record(eager=0.5), record("rms_norm") | {"status": "wrong", "variants": {}}
    return result(slow, record(shape=(1, 4096)), wrong | {"detail": "max|dx - fp64| is <nan>"})


@pytest.fixture
def page(of, tmp_path):
    pytest.importorskip("markdown_it", reason="markdown-it-py writes the page and is not installed")
    assert tmp_path / "benchmark.html" in report.write(of, tmp_path)
    return Reader((tmp_path / "benchmark.html").read_text(encoding="utf-8"))


def test_the_page_needs_no_other_file(page, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures and is not installed")
    drawn = [path.read_bytes() for path in tmp_path.glob("*.png")]
    assert len(drawn) == 2 and all(picture.startswith(b"\x89PNG") for picture in drawn)
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in page.images)
    assert sorted(base64.b64decode(source.removeprefix(prefix)) for source in page.images) == sorted(drawn)
    assert not page.tags & {"link", "script", "iframe"}
    assert all(link.startswith("#") for link in page.links)


def test_the_page_has_every_section_and_table(page):
    assert {"No figures", "Conclusion", "Where we lose", "Summary", "Every measurement"} <= set(page.headings)
    assert page.links == ["#" + heading.lower().replace(" ", "-") for heading in page.headings]
    assert len({len(row) for row in page.tables[0]}) == 1 and page.tables[0][1] == [
        *("rms_norm/forward/float32/4x64", "WRONG", "max|dx - fp64| is <nan>")
    ]
    losses = next(table for table in page.tables if table[0][1] == "ours")
    assert losses[1][:2] == ["layer_norm/forward/float32/4x64", "2.00x slower"] and len(losses) == 2
    measurements = page.tables[-1]
    assert [row[:2] for row in measurements[1:]] == [
        [f"layer_norm/forward/float32/{size}", variant] for size in ("4x64", "1x4096") for variant in ("fused", "eager")
    ]


@pytest.mark.parametrize(
    ("module", "message", "missing"),
    [
        ("matplotlib.figure", "no pictures: matplotlib is not installed", {".png"}),
        ("markdown_it", "no benchmark.html: markdown-it-py is not installed", {".html"}),
    ],
)
def test_what_is_not_installed_is_named_and_the_rest_written(
    module, message, missing, of, monkeypatch, tmp_path, capsys
):
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures and is not installed")
    pytest.importorskip("markdown_it", reason="markdown-it-py writes the page and is not installed")
    monkeypatch.setitem(sys.modules, module, None)  # what makes an import fail
    written = {path.suffix for path in report.write(of, tmp_path)}
    assert written == {path.suffix for path in tmp_path.iterdir()}
    assert written == {".json", ".md", ".html", ".png"} - missing
    assert capsys.readouterr().err == message + "\n"
    assert ("![" in (tmp_path / "benchmark.md").read_text()) is (".png" in written)
