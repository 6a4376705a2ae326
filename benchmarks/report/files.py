"""The files of a run: a reader, or a cut, finds the old text or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def make_folder(folder: Path) -> None:
    """Make a report's folder before hours are spent on what belongs into it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to")


def read_result(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    replace(path, json.dumps(result) + "\n")


def write_pair(folder: Path | None, name: str, result: Mapping[str, Any], page: str) -> None:
    """Print a page; where there is a folder, write it there, and what it was made from beside it."""
    print(page)
    if folder is not None:
        make_folder(folder)
        replace(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
        replace(folder / f"{name}.md", page)


def replace(path: Path, text: str) -> None:
    special = path.exists() and not path.is_file()  # /dev/stdout, a pipe: not to be replaced
    beside = path if special else path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    if not special:
        beside.replace(path)


def renew(path: Path, text: str, check: bool) -> int:
    """Write a page that is made from the raw data, or only say whether it is that; the exit status."""
    if check:
        follows = path.exists() and path.read_text(encoding="utf-8") == text
        print(f"{path.name} {'follows' if follows else 'does not follow'} the data")
        return int(not follows)
    path.write_text(text, encoding="utf-8")
    return 0
