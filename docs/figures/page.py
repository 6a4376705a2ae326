"""The fenced blocks of a page, and the program that they are where the page says so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ONE_PROGRAM = "<!-- one program -->"  # in a page whose Python blocks are one program, in order


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """(line, text) of every fenced block in one of the languages."""
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start()].count("\n") + 2, m[2]) for m in fences if m[1] in languages]


def is_program(page: Path) -> bool:
    return ONE_PROGRAM in page.read_text(encoding="utf-8").splitlines()


def program(page: Path) -> str:
    """The page's Python blocks, each on the lines that it has in the page."""
    lines: list[str] = []
    for line, text in blocks(page, "python"):
        lines += [""] * (line - 1 - len(lines)) + text.splitlines()
    return "\n".join(lines) + "\n"


def load(page: Path, folder: Path) -> ModuleType:
    """Run the page's program from a file in the folder, where Triton finds the source of kernels."""
    file = folder / f"{page.stem.replace('-', '_')}.py"
    file.write_text(program(page), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
