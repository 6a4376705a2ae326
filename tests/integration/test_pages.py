"""Pages are short and written in short sentences: README.md, CONTRIBUTING.md and everything in docs/."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import fusednorm
from tests.helpers.prose import CODE, sentences

ROOT = Path(fusednorm.__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
TEACHING = ROOT / "docs" / "fused-layer-norm.md"  # one page that goes from the formula to the kernel
WORDS, LINES = 25, 200


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_sentences_are_short(page):
    found = sentences(page.read_text(encoding="utf-8"))
    assert found
    assert [f"{page.name}:{s.line}: {s.words} words: {s.text}" for s in found if s.words > WORDS] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != TEACHING], ids=lambda p: p.stem)
def test_pages_are_short(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_pages_have_no_tags(page):
    """`<name>` outside of code is a tag, which no reader sees."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    parts = [part for token in tokens for part in (token.children or [token])]
    tags = [part.content for part in parts if part.type in ("html_inline", "html_block")]
    assert [tag for tag in tags if not tag.lstrip().startswith("<!--")] == []


def test_every_page_is_in_the_list_of_pages():
    listed = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    names = [page.relative_to(ROOT / "docs").as_posix() for page in DOCS if page.name != "README.md"]
    assert [name for name in names if f"]({name})" not in listed] == []


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("One. Two! Three? Four.", ["One.", "Two!", "Three?", "Four."]),
        ("One line\ngoes on. And ends.", ["One line goes on.", "And ends."]),
        (
            "It is 1.5 times as fast, e.g. here. x is lower case.",
            ["It is 1.5 times as fast, e.g. here.", "x is lower case."],
        ),
        ("No. 3 of length D. Then more.", ["No. 3 of length D.", "Then more."]),
        ("A. B. Author wrote it.", ["A. B. Author wrote it."]),
        ('He said "yes." (It was so.) **Bold.** After.', ['He said "yes."', "(It was so.)", "Bold.", "After."]),
        ("Call `f(a, b). Then` twice.", [f"Call {CODE} twice."]),
        ("See [one. page](a.md) and ![a picture. Of it.](b.png).", ["See one.", "page and ."]),
        ("- First item\n- Second. Item\n\n1. Third", ["First item", "Second.", "Item", "Third"]),
        ("| a | b. c |\n|---|---|\n| d | `e` |", ["a", "b.", "c", "d", CODE]),
        ("```python\nx = 1. + 2.\n```\n\n    code. too\n\n<!-- a comment. here -->\n", []),
        ("# A title\n\nText.", ["A title", "Text."]),
        ("It goes on ... and ends.", ["It goes on ... and ends."]),
    ],
)
def test_sentences_are_found(markdown, expected):
    assert [sentence.text for sentence in sentences(markdown)] == expected


def test_words_are_counted():
    long = " ".join(["word"] * 26)
    assert [s.words for s in sentences(f"{long}.\n\n- {long}\n\n| x |\n|---|\n| {long} |")] == [26, 26, 1, 26]
    (sentence,) = sentences("`a b c` is - as [two words](x.md) say - one word, 1.5 times.")
    assert sentence.words == 10
