"""The sdist: what is in it, what a package index shows of it, and what it installs where there is no compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fusednorm

ROOT = Path(__file__).resolve().parents[2]
LEFT = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "tests", "benchmarks")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "checkout", ignore=LEFT)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(folder)]
    subprocess.run(command, cwd=folder / "checkout", env=os.environ | {"FUSEDNORM_NATIVE": "0"}, check=True)
    (made,) = folder.glob("*.tar.gz")
    return made


@pytest.fixture(scope="module")
def source(sdist):
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


def files(folder, *names):
    found = {path.relative_to(folder) for name in names for path in (folder / name).rglob("*") if path.is_file()}
    return {path for path in found if path.suffix not in (".so", ".pyc")}


def test_it_has_every_source(source):
    assert files(source, "csrc", "fusednorm") == files(ROOT, "csrc", "fusednorm")
    assert {path.name for path in source.iterdir()} >= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "docs"}


def test_its_metadata_have_the_version_and_a_text_that_needs_no_other_file(source):
    head, _, text = (source / "PKG-INFO").read_text(encoding="utf-8").partition("\n\n")
    lines = head.splitlines()
    assert f"Version: {fusednorm.__version__}" in lines and "Description-Content-Type: text/markdown" in lines
    assert not any(line.startswith(("Project-URL", "Home-page")) for line in lines)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    link = r"\[[^]]+\]\((?!https?:)([^)]+)\)"
    assert re.search(link, readme) and not re.search(link, text)
    assert readme.count("\n## ") == text.count("\n## ") > 3
    named = set(re.findall(link, readme)) - set(re.findall(r"!" + link, readme))
    assert named and all(f"({name})" in text for name in named)


@pytest.mark.slow
def test_without_a_compiler_it_installs_pure_python_which_warns_and_is_well(sdist, tmp_path):
    site, nowhere = tmp_path / "site", {"PATH": "/nonexistent", "HOME": str(tmp_path)}
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-cache-dir", "--no-index", "--no-deps"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 300}
    command = [*pip, "--no-build-isolation", "--target", site, sdist]
    installed = subprocess.run(command, env=nowhere, cwd=tmp_path, **options)
    assert installed.returncode == 0, installed.stdout
    assert "pure Python, without the native library: no C++ compiler is installed" in installed.stdout
    assert not list(site.rglob("*.so"))

    def run(*arguments):
        environment = nowhere | {"PYTHONPATH": str(site)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    called = run("-c", "import torch, fusednorm as f; print(f.__file__); f.rms_norm(torch.ones(64, 64), 64)")
    assert called.returncode == 0 and called.stdout.startswith(str(site)), called.stderr
    assert called.stderr.count("UserWarning: ") == 1 and "its library is not built; type: " in called.stderr
    said = run("-m", "fusednorm", "doctor", "--device", "cpu")
    assert said.returncode == 0 and said.stdout.rstrip().endswith("All is well."), said.stdout + said.stderr
    assert re.search(r"^  cpu +not here: its library is not built", said.stdout, re.MULTILINE)
    assert "reference: varlen_attention" in said.stdout and "ok        cpu: " not in said.stdout
