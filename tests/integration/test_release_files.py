"""Files that a release and its users need beside the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import fusednorm

ROOT = Path(fusednorm.__file__).parents[1]
yaml = pytest.importorskip("yaml")


def read(name: str):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is from Python 3.11 on")
def test_citation_and_changelog_name_this_version():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = read("CITATION.cff")
    assert "version" not in project and "version" in project["dynamic"]
    assert citation["version"] == fusednorm.__version__ and citation["license"] == project["license"]
    assert citation["title"] == project["name"] and citation["authors"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == fusednorm.__version__


@pytest.mark.parametrize("name", ["fault", "wish"])
def test_issue_forms_ask_for_what_is_needed(name):
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids)) and all(part["attributes"]["label"] for part in form["body"])
    asked = " ".join(
        part["attributes"]["label"] for part in form["body"] if part.get("validations", {}).get("required")
    )
    assert "fusednorm doctor" in asked or name == "wish"


def test_what_the_security_page_says_of_caches_holds():
    """No module of the package reads a pickle."""
    for path in (ROOT / "fusednorm").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"\b(pickle|torch|marshal|shelve|dill|cloudpickle)\.loads?\(|^import pickle", text, re.M
        ), path
