"""Every Python block and every shell command of README.md and of the pages in docs/ runs; links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fusednorm
from docs.figures import page as pages

ROOT = Path(fusednorm.__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "api").glob("*.md"))]
DEVELOPERS = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "design").glob("*.md"))]
SHELLS = ("sh", "bash", "console", "shell")
# change the environment that runs the tests; `make test` itself has gone through them
INSTALLING = ("git clone", ". .venv/", "cd ", "pip install", "python -m pip install", "python3 -m pip install")


def blocks(*languages: str) -> list[tuple[Path, int, str]]:
    """(page, line, text) of every fenced block in one of the languages."""
    return [(page, line, text) for page in [*PAGES, *DEVELOPERS] for line, text in pages.blocks(page, *languages)]


def commands() -> list[tuple[Path, int, str]]:
    found = []
    for page, line, text in blocks(*SHELLS):
        joined = text.replace("\\\n", "  ")
        for offset, command in enumerate(joined.splitlines()):
            command = command.removeprefix("$ ").split("  #")[0].strip()
            if command and not command.startswith("#"):
                found.append((page, line + offset, command))
    return found


STEP = "import torch, fusednorm\ndef step():\n    fusednorm.layer_norm(torch.randn(4, 8), 8)\n"


def names(found: list[tuple[Path, int, str]]) -> list[str]:
    return [f"{page.stem}_line_{line}" for page, line, _ in found]


PROGRAMS = [page for page in PAGES if pages.is_program(page)]
PYTHON, COMMANDS = [block for block in blocks("python", "py") if block[0] not in PROGRAMS], commands()


def test_readme_has_snippets_and_commands():
    assert README in {page for page, *_ in PYTHON}, "no Python block"
    assert README in {page for page, *_ in COMMANDS}, "no shell command"


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 120


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *DEVELOPERS], ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", DEVELOPERS, ids=lambda p: p.stem)
def test_pages_name_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:fusednorm|csrc|tests|tools|benchmarks|examples|docs)/[\w./]*\w)`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@pytest.mark.parametrize(("page", "line", "text"), PYTHON, ids=names(PYTHON))
def test_python_block(page, line, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile("\n" * (line - 1) + text, str(page), "exec")
    exec(code, {"__name__": "readme"})


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda p: p.stem)
def test_page_is_a_program(page, tmp_path):
    """As a reader runs it: in a process of its own, from a file, without what the tests tell providers."""
    file = tmp_path / "program.py"
    file.write_text(pages.program(page), encoding="utf-8")
    theirs = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FUSEDNORM_"))}
    environment = theirs | {"PYTHONPATH": str(ROOT), "FUSEDNORM_TUNED": "0"}
    command = [sys.executable, file]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize(("page", "line", "command"), COMMANDS, ids=names(COMMANDS))
def test_shell_command(page, line, command, tmp_path):
    where = f"{page.name}:{line}: {command}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    while given := re.match(r"([A-Z_]+)=(\S*) +", command):
        environment |= {given[1]: given[2]} if given[1] != "PYTHONPATH" else {}
        command = command[given.end() :]
    words = shlex.split(command)
    if words[0] == "fusednorm":
        words[:1] = [sys.executable, "-m", "fusednorm"]
        if "tune" in words:  # which calls would be measured
            words.append("--list")
            (tmp_path / "train.py").write_text(STEP)
            words = [str(tmp_path / word) if word.startswith("train.py") else word for word in words]
    if words[0] == "make":
        run = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, f"{where}\n{run.stderr}"
        return
    if command.startswith(INSTALLING):
        assert (ROOT / "pyproject.toml").exists(), where
        return
    if words[0] in ("python", "python3"):
        words[0] = sys.executable
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    if "--report" in words:  # not into the checkout
        words[words.index("--report") + 1] = str(tmp_path / "report")
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, f"{where}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"


def test_every_environment_variable_is_explained():
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    for_tests = {"FUSEDNORM_EMULATE"}
    sources = [ROOT / "setup.py", *(ROOT / "fusednorm").rglob("*.py")]
    used = {
        name for path in sources for name in re.findall(r"FUSEDNORM_[A-Z_]*[A-Z]", path.read_text(encoding="utf-8"))
    }
    assert used - for_tests == set(re.findall(r"FUSEDNORM_[A-Z_]*[A-Z]", page))
