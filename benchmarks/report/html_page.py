"""The Markdown page as one HTML file that needs no other: pictures inside, tables that scroll, no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1.5em; color: #1c1e21;
  background: #fff; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2em; border-bottom: 1px solid #d5d8dc; padding-bottom: .2em; }
nav a { margin-right: 1.2em; white-space: nowrap; }
img { max-width: 100%; height: auto; }
code { background: #f1f3f5; padding: 0 .25em; }
.wide { overflow: auto; max-height: 85vh; margin: 1em 0; border: 1px solid #d5d8dc; width: fit-content;
  max-width: 100%; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { position: sticky; top: 0; background: #eceff2; }
th, td { padding: .25em .8em; }
td:first-child { font-family: ui-monospace, monospace; }
tbody tr:nth-child(even) { background: #f7f8f9; }
""".strip()


def page(markdown: str, folder: Path, pictures: Sequence[str]) -> str | None:
    """The page, with the pictures of `folder` inside; None where markdown-it is missing."""
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        return None
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(markdown)
    sections = _name_sections(tokens)
    body = reader.renderer.render(tokens, reader.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    for name in pictures:
        data = base64.b64encode((folder / name).read_bytes()).decode("ascii")
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    links = "\n".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for title, anchor in sections)
    body = body.replace("</h1>", f"</h1>\n<nav>\n{links}\n</nav>", 1)
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n<title>Benchmark</title>'
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n<style>\n{STYLE}\n</style>\n</head>\n'
        f"<body>\n{body}</body>\n</html>\n"
    )


def _name_sections(tokens: Sequence[Any]) -> list[tuple[str, str]]:
    """Give every section an anchor; (title, anchor) of each."""
    sections = []
    for opening, title in pairwise(tokens):
        if (opening.type, opening.tag) == ("heading_open", "h2"):
            anchor = title.content.lower().replace(" ", "-")
            opening.attrSet("id", anchor)
            sections.append((title.content, anchor))
    return sections
