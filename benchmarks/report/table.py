"""Markdown tables whose source is aligned too."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], bar: str = "|", texts: int = 1) -> str:
    """The first `texts` columns are text, the others are figures. `bar` stands for a bar inside a cell."""
    lines = [[str(cell).replace("|", bar) for cell in row] for row in [head, *rows]]
    widths = [max(3, *map(columns, cells)) for cells in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        blanks = [" " * (w - columns(cell)) for w, cell in zip(widths, cells)]
        padded = [cell + blank if i < texts else blank + cell for i, (cell, blank) in enumerate(zip(cells, blanks))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i < texts else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(lines[0]), f"|{rule}|", *map(line, lines[1:])])


def columns(text: str) -> int:
    """How wide a text stands on a terminal: a Chinese character takes two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
