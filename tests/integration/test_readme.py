"""Every Python block and every shell command of README.md runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fusednorm

ROOT = Path(fusednorm.__file__).parents[1]
README = ROOT / "README.md"
SHELLS = ("sh", "bash", "console", "shell")
# change the environment that runs the tests; `make test` itself has gone through them
INSTALLING = ("git clone", ". .venv/", "cd ", "pip install", "python -m pip install", "python3 -m pip install")


def blocks(*languages: str) -> list[tuple[int, str]]:
    """(line, text) of every fenced block in one of the languages."""
    if not README.exists():
        return []
    text = README.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w+)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match[2]) for match in fences if match[1] in languages]


def commands() -> list[tuple[int, str]]:
    found = []
    for line, text in blocks(*SHELLS):
        joined = text.replace("\\\n", "  ")
        for offset, command in enumerate(joined.splitlines()):
            command = command.removeprefix("$ ").split("  #")[0].strip()
            if command and not command.startswith("#"):
                found.append((line + offset, command))
    return found


def names(found: list[tuple[int, str]]) -> list[str]:
    return [f"line_{line}" for line, _ in found]


PYTHON, COMMANDS = blocks("python", "py"), commands()


def test_readme_has_snippets_and_commands():
    assert PYTHON, f"no Python block in {README.name}"
    assert COMMANDS, f"no shell command in {README.name}"


@pytest.mark.parametrize(("line", "text"), PYTHON, ids=names(PYTHON))
def test_python_block(line, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * (line - 1) + text, str(README), "exec")
    exec(code, {"__name__": "readme"})


@pytest.mark.parametrize(("line", "command"), COMMANDS, ids=names(COMMANDS))
def test_shell_command(line, command, tmp_path):
    where = f"{README.name}:{line}: {command}"
    while re.match(r"[A-Z_]+=\S* ", command):
        command = command.split(" ", 1)[1]
    words = shlex.split(command)
    if words[0] == "make":
        run = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, f"{where}\n{run.stderr}"
        return
    if command.startswith(INSTALLING):
        assert (ROOT / "pyproject.toml").exists(), where
        return
    if words[0] in ("python", "python3"):
        words[0] = sys.executable
    if "--report" in words:  # not into the checkout
        words[words.index("--report") + 1] = str(tmp_path / "report")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, f"{where}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
