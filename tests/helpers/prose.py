"""The sentences of a Markdown page: of paragraphs, lists, headings and cells of tables, code left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

CODE = "\N{REPLACEMENT CHARACTER}"  # stands for code within a line: one word, however long it is
ABBREVIATIONS = frozenset(("e.g.", "i.e.", "vs.", "cf.", "no.", "fig.", "eq.", "approx.", "et al.", "al."))
END = re.compile(r"[.!?]+[\"')\]*_”’]*(?=\s|$)")
WORD = re.compile(r"\w")


class Sentence(NamedTuple):
    line: int  # of the block that it is in, from 1
    text: str

    @property
    def words(self) -> int:
        return sum(bool(WORD.search(word)) or CODE in word for word in self.text.split())


def sentences(markdown: str) -> list[Sentence]:
    return [Sentence(line, text) for line, block in blocks(markdown) for text in split(block)]


def blocks(markdown: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each block that has sentences."""
    line = 1
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        line = token.map[0] + 1 if token.map else line
        if token.type == "inline":
            yield line, "".join(map(plain, token.children or ()))


def plain(token: Token) -> str:
    if token.type == "code_inline":
        return CODE
    if token.type in ("softbreak", "hardbreak"):
        return " "
    return token.content if token.type == "text" else ""  # links by their text; no marks, pictures, HTML


def split(text: str) -> list[str]:
    found, start = [], 0
    for end in END.finditer(text):
        before = text[start : end.end()].split()
        if before and ends(before):
            found.append(text[start : end.end()].strip())
            start = end.end()
    return [part for part in [*found, text[start:].strip()] if part]


def ends(words: list[str]) -> bool:
    """Whether the last word, which has a full stop, ends its sentence: no abbreviation, initial or number of a list."""
    word = words[-1].lstrip("(\"'*_[")
    if word.lower() in ABBREVIATIONS or word == "..." or (re.fullmatch(r"\d+\.", word) and len(words) == 1):
        return False
    initial = re.fullmatch(r"[A-Z]\.", word)  # of a name where it is first or after another; else a symbol
    return not (initial and all(re.fullmatch(r"[A-Z]\.", before) for before in words[:-1]))
