"""The native CPU library as a file: missing, broken, foreign, built twice at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh import python

import fusednorm
from fusednorm import dispatch
from fusednorm.providers.cpu import library as cpu

ROOT = Path(fusednorm.__file__).parents[1]
REASON = dispatch.unavailable_reason("cpu")
needs_library = pytest.mark.skipif(REASON is not None, reason=f"provider cpu: {REASON}")


PROGRAM = """
import sys, torch
from pathlib import Path
import fusednorm
from fusednorm import __main__, dispatch
from fusednorm.providers.cpu import library as cpu
for path in sys.argv[1:]:
    cpu.LIBRARY = Path(path)
    cpu._load.cache_clear()
    dispatch.registry._reasons.clear()
    assert "cpu" not in fusednorm.available_providers(), path
    normed, z = fusednorm.add_layer_norm(torch.ones(2, 8), torch.ones(2, 8), 8)
    assert z.eq(2).all()
    print(path, __main__.info(), sep="\\n", end="\\n\\n")
"""


def info_with(*libraries: Path) -> list[str]:
    """What ``python -m fusednorm info`` says of each file in the library's place; all in one process, which lives."""
    said = python("-c", PROGRAM, *map(str, libraries)).strip().split("\n\n")
    assert len(said) == len(libraries)
    return said


def test_without_the_library_masks_are_the_same(tmp_path):
    program = f"""
import torch
from pathlib import Path
from fusednorm.providers.cpu import library as cpu
cpu.LIBRARY = Path({str(tmp_path / "missing.so")!r})
import fusednorm
assert "cpu" not in fusednorm.available_providers()
print(fusednorm.dropout_mask((6, 7), 0.5, 11).int().tolist())
print(fusednorm.explain(fusednorm.bias_act_dropout, torch.ones(4, 128), torch.ones(128)))
"""
    mask, route = python("-c", program).splitlines()[:2]
    assert mask == str(fusednorm.dropout_mask((6, 7), 0.5, 11).int().tolist())
    assert route.startswith("bias_act_dropout: torch, ")


def test_a_library_that_is_missing_or_does_not_load_breaks_nothing(tmp_path):
    """Nothing in it, text, a header alone, a folder, and a library that has none of our operators."""
    contents = {"empty": b"", "text": b"not a library", "header": b"\x7fELF\x02\x01" + bytes(200)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    foreign = next((Path(torch.__file__).parent / "lib").glob("libtorch_global_deps.*"))
    missing, *others = info_with(tmp_path / "missing.so", *sorted(tmp_path.iterdir()), foreign)
    assert "setup.py build_ext --inplace" in missing
    for said in others:
        assert "does not load into torch" in said and "Could not load this library" not in said, said  # but why


@needs_library
def test_a_broken_copy_of_the_library_breaks_nothing(tmp_path):
    """The beginning of it, as a full disk leaves it, and the same for another machine."""
    content = cpu.LIBRARY.read_bytes()
    for percent in (1, 20, 50, 90):
        (tmp_path / f"{percent} percent").write_bytes(content[: len(content) * percent // 100])
    for machine, number in {"aarch64": 183, "riscv": 243}.items():
        (tmp_path / machine).write_bytes(content[:18] + number.to_bytes(2, "little") + content[20:])  # e_machine
    for said in info_with(*sorted(tmp_path.iterdir())):
        assert "does not load into torch" in said, said
        assert ("the file is cut off" in said) == ("percent" in said), said


@needs_library
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_library_that_may_not_be_read_breaks_nothing(tmp_path):
    path = tmp_path / "library.so"
    path.write_bytes(cpu.LIBRARY.read_bytes())
    path.chmod(0)
    (said,) = info_with(path)
    assert "does not load into torch" in said


@needs_library
def test_a_read_only_installation_works(tmp_path):
    """Nothing is written beside the package, whose files and folders nobody may write."""
    package = tmp_path / "site" / "fusednorm"
    shutil.copytree(Path(fusednorm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(package.rglob("*"))
    for path in [package, *before]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        said = info(package.parent, PYTHONDONTWRITEBYTECODE="1")
        assert "ready, instruction sets" in said
        assert sorted(package.rglob("*")) == before
    finally:
        for path in [package, *before]:
            path.chmod(path.stat().st_mode | 0o200)


def info(root: Path, **variables: str) -> str:
    command, environment = [sys.executable, "-m", "fusednorm", "info"], os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment | variables)
    assert run.returncode == 0, run.stderr
    return run.stdout


@needs_library
@pytest.mark.slow
def test_two_processes_may_build_at_once(tmp_path):
    """Both succeed, and the library is whole."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path)
    for name in ("csrc", "fusednorm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    assert "its library is not built" in info(tmp_path)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    variables = os.environ | {"FUSEDNORM_NATIVE": "1", "FUSEDNORM_CUDA": "0"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    builds = [subprocess.Popen(command, cwd=tmp_path, env=variables, **options) for _ in range(2)]
    for build in builds:
        said, _ = build.communicate(timeout=1500)
        assert build.returncode == 0, said
    assert "ready, instruction sets" in info(tmp_path)
    assert [path.name for path in (tmp_path / "fusednorm").glob("libfusednorm*")] == ["libfusednorm_cpu.so"]


def test_importing_the_package_does_not_load_the_library():
    python("-c", "import fusednorm, torch; assert not torch.ops.loaded_libraries")
