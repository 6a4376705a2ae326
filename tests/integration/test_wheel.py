"""The wheel of a release in bare environments of several torchs, without a compiler: `make release-check`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fusednorm

ROOT = Path(__file__).resolve().parents[2]
WHEEL = os.environ.get("FUSEDNORM_WHEEL", "")
PYTHONS = [ROOT / path for path in os.environ.get("FUSEDNORM_BARE_PYTHON", "").split()]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (WHEEL and PYTHONS), reason="FUSEDNORM_WHEEL or FUSEDNORM_BARE_PYTHON is not set"),
]


@pytest.fixture(scope="module", params=PYTHONS, ids=lambda path: path.parents[1].name)
def bare(request, tmp_path_factory):
    """A new environment with the wheel and what it requires; torch is that of another environment."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([request.param, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (torch,) = request.param.parents[1].glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{torch}\n")
    command = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", ROOT / WHEEL]
    said = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert said.returncode == 0 and "Successfully installed" in said.stdout, said.stdout + said.stderr
    assert "torch-" not in said.stdout.split("Successfully installed")[1], "it brought another torch"
    return folder


def doctor(bare):
    """What the installed command prints, with nothing to compile with."""
    nowhere = {"PATH": f"{bare / 'bin'}:/nonexistent", "HOME": str(bare)}
    assert not any(shutil.which(name, path=nowhere["PATH"]) for name in ("cc", "gcc", "c++", "g++", "clang++", "nvcc"))
    command = [bare / "bin" / "fusednorm", "doctor", "--device", "cpu"]
    done = subprocess.run(command, env=nowhere, cwd=bare, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("All is well."), done.stdout + done.stderr
    return done.stdout


def site_of(bare):
    (site,) = bare.glob("lib/python*/site-packages")
    return site


def has(bare, module):
    command = [bare / "bin" / "python", "-c", f"import importlib.util as u; print(u.find_spec({module!r}) is not None)"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=bare).stdout.strip() == "True"


def test_doctor_is_well_and_says_that_the_native_kernels_and_the_fast_path_run(bare):
    assert has(bare, "torch") and not has(bare, "pytest") and not has(bare, "numpy")
    said = doctor(bare)
    assert said.startswith(f"fusednorm  {fusednorm.__version__} in {site_of(bare)}")
    assert re.search(r"^  cpu +ready, instruction sets ", said, re.MULTILINE), said
    assert re.search(r"^fast path +ready", said, re.MULTILINE), said
    assert re.search(r"^ok +cpu: scaled_dot_product_attention ", said, re.MULTILINE), said
    assert re.search(r"^left out +torch.compile +it finds no C\+\+ compiler here", said, re.MULTILINE), said


def test_a_torch_without_a_fast_path_has_the_native_kernels_and_says_what_is_missing(bare, tmp_path):
    files = list((site_of(bare) / "fusednorm").glob("_fastpath.*"))
    assert files
    for file in files:
        file.rename(tmp_path / file.name)
    try:
        said = doctor(bare)
    finally:
        for file in files:
            (tmp_path / file.name).rename(file)
    assert re.search(r"^  cpu +ready, instruction sets ", said, re.MULTILINE), said
    assert re.search(r"^fast path +not here: it is not built, and this is torch ", said, re.MULTILINE), said


def test_its_tag_and_size_are_those_that_the_page_names():
    name, page = Path(WHEEL).name, (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert name.startswith(f"fusednorm-{fusednorm.__version__}-py3-none-manylinux_2_")
    (glibc,) = re.findall(r"glibc (2\.\d+)", page)
    assert f"manylinux_{glibc.replace('.', '_')}_" in name
    (most,) = re.findall(r"takes less than (\d+) MB", page)
    assert 0.5 < (ROOT / WHEEL).stat().st_size / (int(most) * 1e6) < 1


def test_its_fast_paths_are_those_that_the_page_names():
    with zipfile.ZipFile(ROOT / WHEEL) as archive:
        found = {Path(name).name for name in archive.namelist() if "/_fastpath." in name}
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    (torchs,) = re.findall(r"for torch ([\d., and]+) and the Pythons", page)
    for version in re.findall(r"\d+\.\d+\.\d+", torchs):
        assert any(name.startswith(f"_fastpath.torch-{version}") for name in found), (version, found)
