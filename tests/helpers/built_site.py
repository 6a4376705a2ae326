"""Faults of a built site: links and anchors that lead nowhere, requests to other servers, marks left as they were."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

LEFT = re.compile(r":(?:class|func|meth|math):|\.\. math::|^::: |arithmatex|^(?:[-*] |\d\. |\|)", re.MULTILINE)


class Content(HTMLParser):
    """What a page holds: `anchors`, `links` that a reader follows, `loaded` files, and the text of its paragraphs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.paragraphs: list[str] = []
        self.inside = self.code = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := found.get(key))}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        loads = found.get("src") or (found.get("href") if tag == "link" else None)
        if loads:
            self.loaded.append(loads)
        if tag == "p":
            self.paragraphs.append("")
            self.inside = True
        self.code |= tag == "code"

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag != "p"
        self.code &= tag != "code"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.paragraphs[-1] += "code" if self.code else data


def faults(site: Path) -> list[str]:
    pages = {path: Content(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site)
        for link in [*page.links, *page.loaded]:
            address, anchor = urldefrag(link)
            if re.match(r"\w+:|//", address):
                if link in page.loaded and not address.startswith("data:"):
                    found.append(f"{where}: loads {link}")
                continue
            start = site if address.startswith("/") else path.parent
            target = (start / unquote(address).lstrip("/")).resolve() if address else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{where}: {link} is not there")
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                found.append(f"{where}: {link} has no such anchor")
        found += [f"{where}: {mark[0]!r} in {text!r}" for text in page.paragraphs if (mark := LEFT.search(text))]
    return found
