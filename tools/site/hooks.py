"""MkDocs: the site has the folders of the repository, so that a link of a page leads to the same file in both.

The pages are README.md, docs/ and every file that a page links to, directly or not. Source files and folders of them
become pages of their own. Formulas become MathML, which needs no script.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterable
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r'(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[)#]| ")')
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
UPRIGHT = re.compile(r"\\mathrm\{([^{}]*)\}")  # the converter makes an upright letter an italic one
LANGUAGES = {".py": "python", ".toml": "toml", ".cff": "yaml", ".yml": "yaml"}


def shown(root: Path, name: str) -> str:
    """The page that shows a file or folder; its own name where it is a page or is given as it is."""
    path = root / name
    if path.is_dir():
        return f"{name}/README.md"
    return f"{name}.md" if path.suffix in LANGUAGES or path.name in ("Makefile", "LICENSE") else name


def targets(name: str, text: str) -> list[str]:
    """Paths, from the repository's root, of what a page links to."""
    return [posixpath.normpath(posixpath.join(posixpath.dirname(name), link)) for link in LINK.findall(text)]


def listing(folder: Path) -> str:
    """A page for a folder of programs: each with the first line of its docstring."""
    lines = [f"# `{folder.name}/`", ""]
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            lines.append(f"- [`{path.name}`]({path.name}). {said.partition(chr(10))[0]}")
    return "\n".join([*lines, ""])


def page_of(root: Path, name: str) -> tuple[str, str]:
    """(page's name, its text) for a file or folder that is no Markdown."""
    path = root / name
    if path.is_dir():
        return shown(root, name), listing(path)
    text = path.read_text(encoding="utf-8")
    fence = f"````{LANGUAGES.get(path.suffix, 'text')}\n{text}````\n"
    return shown(root, name), f"# `{name}`\n\n{fence}"


def reached(root: Path, names: Iterable[str]) -> dict[str, str | None]:
    """Every file of the site, and the text of those that are made; the files that a missing link names are left out."""
    found: dict[str, str | None] = {}
    pending = list(names)
    while pending:
        name = pending.pop()
        path = root / name
        if not path.exists() or shown(root, name) in found:
            continue
        text = None
        if path.is_dir() and (path / "README.md").exists():
            name = f"{name}/README.md"
        elif shown(root, name) != name:
            name, text = page_of(root, name)
        found[name] = text
        if name.endswith(".md"):
            text = (root / name).read_text(encoding="utf-8") if text is None else text
            pending += targets(name, text)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    docs = Path(config.docs_dir)
    ours = [file for file in files if file.src_dir == config.docs_dir]
    for file in ours:
        files.remove(file)
    names = ["README.md", *(f"{docs.name}/{file.src_uri}" for file in ours)]
    names = [name for name in names if shown(root, name) == name]  # a program has a page where one leads to it
    for name, text in sorted(reached(root, names).items()):
        if text is None:
            files.append(File.generated(config, name, abs_src_path=str(root / name)))
        else:
            files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to source files and folders lead to the pages that show them."""
    root = Path(config.config_file_path).parent
    here = posixpath.dirname(page.file.src_uri)

    def renamed(match: re.Match[str]) -> str:
        name = posixpath.normpath(posixpath.join(here, match[1]))
        return posixpath.relpath(shown(root, name), here or ".") if (root / name).exists() else match[1]

    return LINK.sub(renamed, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def formula(match: re.Match[str]) -> str:
        source = UPRIGHT.sub(lambda name: rf"\text{{{name[1]}}}".replace(r"\_", "_"), unescape(match[2]))
        return convert(source, display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(formula, html)
