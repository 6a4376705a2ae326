"""Griffe: the docstrings, whose roles and directives are reStructuredText, as Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

DIRECTIVE = re.compile(r"^( *)\.\. math::[ ]?(.*(?:\n(?:\1 +\S.*|(?=\n\1 +\S)))*)", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|mod):`(~?)([^`]+)`")
RETURNS = re.compile(r"^Returns:\n((?: +\S.*\n?)+)", re.MULTILINE)  # prose, which is no list of "type: what it is"
INLINE = re.compile(r":math:`([^`]+)`")


def markdown(text: str, public: frozenset[str]) -> str:
    """A docstring's text: formulas between dollars, names of the package as references, others as code."""

    def formula(match: re.Match[str]) -> str:
        body = " ".join(line.strip() for line in match[2].strip().splitlines())
        return f"{match[1]}$$ {body} $$"

    def reference(match: re.Match[str]) -> str:
        name = match[2].removeprefix("fusednorm.")
        if name in public:
            return f"[`{name}`][fusednorm.{name}]"
        return f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`"

    text = DIRECTIVE.sub(formula, text)
    text = ROLE.sub(reference, text)
    text = INLINE.sub(r"$\1$", text)
    text = re.sub(r"^Example:", "Examples:", text, flags=re.MULTILINE)
    return RETURNS.sub(lambda match: f"**Returns:** {' '.join(match[1].split())}\n", text)


class Docstrings(griffe.Extension):
    """Changes every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._change(pkg, frozenset(pkg.exports or ()), set())

    def _change(self, item: griffe.Object | griffe.Alias, public: frozenset[str], seen: set[int]) -> None:
        if item.is_alias or id(item) in seen:
            return
        seen.add(id(item))
        if item.docstring is not None:
            item.docstring.value = markdown(textwrap.dedent(item.docstring.value), public)
        for member in item.members.values():
            self._change(member, public, seen)
