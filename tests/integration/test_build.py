"""What setup.py compiles anew, and what it does where something is missing or fails. Compilers and torch are stubs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import emulated
import pytest

ROOT = Path(__file__).resolve().parents[2]
HAS_HEADERS = (Path(sysconfig.get_path("include")) / "Python.h").exists()
pytestmark = pytest.mark.skipif(
    sys.platform not in ("linux", "darwin"), reason="native libraries are for Linux and macOS"
)

# Records its calls, and makes what it is asked for; everything reads csrc/common/data.h.
COMPILER = r"""#!/bin/sh
here=$(dirname "$0")
case "$1" in
  --version) cat "$here/version"; exit ;;
  --list-gpu-code) cat "$here/codes"; exit ;;
esac
all="$*"
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2 ;; -MF) listing=$2 ;; -c) source=$2 ;; esac
  shift
done
case "$source" in *fault*) echo "$source: error: planted" >&2; exit 1 ;; esac
echo "$source|$all" >> "$here/calls"
[ -z "$listing" ] || for name in "$out:" "$source" "$ROOT/csrc/common/data.h"; do
  printf '%s ' "$(echo "$name" | sed 's/ /\\ /g')"
done > "$listing"
echo "$all $$" > "$out"
"""


class Checkout:
    """A copy of the sources beside a torch without contents, and a compiler and nvcc that are stubs."""

    def __init__(self, folder: Path) -> None:
        self.root, self.site, self.tools = folder / "check out", folder / "site", folder / "tools"
        for name in ("csrc", "fusednorm"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy2(ROOT / name, self.root)
        for name in ("bin", "lib64", "other"):
            (self.tools / name).mkdir(parents=True)
        (self.tools / "lib64" / "libcudart_static.a").touch()
        for name in ("bin/c++", "bin/nvcc", "other/c++"):
            program = self.tools / name
            program.write_text(COMPILER)
            program.chmod(0o755)
            program.with_name("version").write_text("a stub 1.0\n")
            program.with_name("codes").write_text("sm_80\nsm_90\nsm_100\n")
        self.variables = {
            "CXX": str(self.tools / "bin" / "c++"),
            "CUDACXX": str(self.tools / "bin" / "nvcc"),
            "FUSEDNORM_CUDA": "1",
            "PYTHONPATH": str(self.site),
            "ROOT": str(self.root.resolve()),
        }
        self.install_torch("2.13.0+cpu")

    def install_torch(self, version: str) -> None:
        """In the place of another version, and older than whatever was built, as an archive's files are."""
        shutil.rmtree(self.site, ignore_errors=True)
        for name in ("include", "lib"):
            (self.site / "torch" / name).mkdir(parents=True)
        (self.site / "torch" / "__init__.py").touch()
        (self.site / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
        information = self.site / f"torch-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        for path in self.site.rglob("*"):
            os.utime(path, (1e9, 1e9))

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "setup.py", "build_ext", "--inplace", *arguments]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDNORM")}
        return subprocess.Popen(command, cwd=self.root, env=environment | self.variables | variables, **options)

    def build(self, *arguments: str, status: int = 0, **variables: str) -> str:
        """What it prints."""
        started = self.start(*arguments, **variables)
        said, _ = started.communicate(timeout=300)
        assert started.returncode == status, said
        return said

    def calls(self) -> list[tuple[str, str]]:
        """The source and all arguments of each call of a compiler since this was last asked."""
        found = []
        for file in self.tools.glob("*/calls"):
            found += [(Path(s).name, a) for s, a in (line.split("|") for line in file.read_text().splitlines())]
            file.unlink()
        return found

    def compiled(self) -> Counter[str]:
        return Counter(source for source, _ in self.calls() if source)

    def sources(self, *patterns: str) -> Counter[str]:
        """How often each is compiled: kernels for each instruction set, what is common for each library."""
        found = Counter[str]()
        matching = {pattern: set(self.root.glob(f"csrc/{pattern}")) for pattern in patterns}
        assert all(matching.values()), matching
        for path in set().union(*matching.values()):
            sets = len(emulated.setup_script().INSTRUCTION_SETS) if path.name.endswith("_kernels.cpp") else 1
            found[path.name] += 2 if path.parent.name == "common" else sets
        return found

    def libraries(self) -> set[str]:
        return {path.name.partition(".cpython")[0] for path in (self.root / "fusednorm").glob("*.so")}


EVERYTHING = ["common/*.cpp", "cpu/*/*.cpp", "cuda/*/*.cpp", "cuda/*/*.cu", *["fastpath/*.cpp"] * HAS_HEADERS]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def built(shared, monkeypatch):
    """A checkout whose libraries are built, and nobody changed anything since."""
    monkeypatch.setattr(shared, "variables", dict(shared.variables))
    shared.build()
    shared.calls()
    return shared


def test_a_build_compiles_everything_once_and_then_nothing(checkout):
    checkout.build()
    assert checkout.compiled() == checkout.sources(*EVERYTHING)
    assert checkout.libraries() >= {"libfusednorm_cpu.so", "libfusednorm_cuda.so"}
    checkout.build()
    assert checkout.calls() == []
    checkout.build("--force")
    assert checkout.compiled() == checkout.sources(*EVERYTHING)


def test_what_includes_torch_is_compiled_anew_for_another_torch(built):
    """The version counts: the files of the other one may be older than the objects."""
    built.install_torch("2.14.0+cpu")
    built.build()
    assert built.compiled() == built.sources(*EVERYTHING) - built.sources("cpu/*/*_kernels.cpp", "cuda/*/*.cu")
    assert not HAS_HEADERS or {"_fastpath.torch-2.13.0+cpu", "_fastpath.torch-2.14.0+cpu"} <= built.libraries()


def another_compiler(built):
    built.variables["CXX"] = str(built.tools / "other" / "c++")
    return EVERYTHING  # nvcc calls it too


def a_new_version_of_the_compilers(built):
    (built.tools / "bin" / "version").write_text("a stub 1.1\n")
    return EVERYTHING


def other_architectures(built):
    built.variables["FUSEDNORM_CUDA_ARCHITECTURES"] = "90"
    return ["cuda/*/*.cu"]


def what_nvcc_reads_from_the_environment(built):
    built.variables["NVCC_APPEND_FLAGS"] = "-lineinfo"
    return EVERYTHING


def a_flag_in_setup_py(built):
    script = built.root / "setup.py"
    before, times = script.read_text(), script.stat()
    assert '"-Wno-psabi"' in before
    script.write_text(before.replace('"-Wno-psabi"', '"-Wno-psabi", "-DMORE"'))
    os.utime(script, ns=(times.st_atime_ns, times.st_mtime_ns))
    return ["cpu/*/*_kernels.cpp"]


def a_header(built):
    (built.root / "csrc" / "common" / "data.h").touch()
    return EVERYTHING


def a_source(built):
    (built.root / "csrc" / "cuda" / "support" / "machine.cu").touch()
    return ["cuda/support/machine.cu"]


CHANGES = (
    another_compiler,
    a_new_version_of_the_compilers,
    other_architectures,
    what_nvcc_reads_from_the_environment,
    a_flag_in_setup_py,
    a_header,
    a_source,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_compiles_anew_what_it_concerns(change, built):
    patterns = change(built)
    built.build()
    assert built.compiled() == built.sources(*patterns)
    built.build()
    assert built.calls() == []


def test_a_source_that_is_gone_is_no_part_of_the_library(built):
    source = built.root / "csrc" / "cuda" / "support" / "machine.cu"
    source.rename(source.with_suffix(".gone"))
    built.build()
    source.with_suffix(".gone").rename(source)
    links = [arguments for source, arguments in built.calls() if not source]
    assert len(links) == 1 and "partials.o" in links[0] and "machine.o" not in links[0]


def test_a_library_that_is_in_use_is_replaced_and_not_written_to(built):
    library = built.root / "fusednorm" / "libfusednorm_cuda.so"
    with library.open() as in_use:
        other_architectures(built)
        before = library.read_text()
        built.build()
        assert in_use.read() == before != library.read_text()
    folder = built.root / "fusednorm"
    assert {path.suffix for path in folder.iterdir() if path.is_file()} <= {".py", ".so", ".typed"}


def test_processes_that_build_at_once_share_the_work(checkout):
    builds = [checkout.start() for _ in range(3)]
    for build in builds:
        said, _ = build.communicate(timeout=300)
        assert build.returncode == 0, said
    assert checkout.compiled() == checkout.sources(*EVERYTHING)


def test_a_library_that_does_not_compile_is_left_out_with_the_compilers_words(built):
    """The others are built; one of an earlier build is not taken for it."""
    (built.root / "csrc" / "cuda" / "fault.cu").touch()
    for library in (built.root / "fusednorm").glob("*.so"):
        library.unlink()
    said = built.build()
    assert "fault.cu: error: planted" in said and "installing without libfusednorm_cuda" in said, said
    assert "libfusednorm_cuda.so" not in built.libraries() and "libfusednorm_cpu.so" in built.libraries()
    said = built.build(status=1, FUSEDNORM_NATIVE="1")
    assert "fault.cu: error: planted" in said and "it would be without libfusednorm_cuda" in said, said
    (built.root / "csrc" / "cuda" / "fault.cu").unlink()
    assert "installing without" not in built.build()
    assert "libfusednorm_cuda.so" in built.libraries()


def test_without_the_cpu_library_there_is_no_fastpath(checkout):
    (checkout.root / "csrc" / "cpu" / "fault.cpp").touch()
    said = checkout.build()
    assert "installing without libfusednorm_cpu" in said
    assert not HAS_HEADERS or "installing without _fastpath" in said
    assert checkout.libraries() == {"libfusednorm_cuda.so"}


def test_without_ninja_the_package_is_pure_python_and_the_remedy_is_said(checkout):
    hidden = checkout.site / "ninja"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("raise ImportError('hidden')\n")
    said = checkout.build()
    assert "pip install ninja" in said and "pure Python" in said, said
    assert checkout.calls() == [] and checkout.libraries() == set()
    assert "pip install ninja" in checkout.build(status=1, FUSEDNORM_NATIVE="1")


def test_without_a_compiler_the_package_is_pure_python(checkout):
    del checkout.variables["CXX"]
    said = checkout.build(PATH=str(checkout.site))
    assert "no C++ compiler is installed" in said and checkout.libraries() == set()


@pytest.mark.skipif(emulated.compiler() is None, reason="there is no g++, which the test builds with")
@pytest.mark.parametrize("changed", ["torch_version", "version_of"])
def test_what_tests_build_is_built_anew_for_another_torch_and_compiler(changed, tmp_path, monkeypatch):
    script, source = emulated.setup_script(), tmp_path / "empty.cpp"
    source.touch()
    monkeypatch.setattr(emulated, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(emulated, "setup_script", lambda: script)
    include = str(emulated.torch_directory() / "include")
    jobs = {"empty": [str(emulated.compiler()), "-isystem", include, "-fPIC", "-c", str(source)]}

    def build():
        return emulated.build_from("empty.so", jobs, ["-shared"])

    first = build()
    assert build() == first
    monkeypatch.setattr(script, changed, lambda *_: "another")
    assert build() != first


@pytest.mark.skipif(emulated.compiler() is None, reason="there is no g++, which the test builds with")
def test_what_tests_build_is_built_anew_where_a_file_that_it_includes_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(emulated, "CACHE", tmp_path / "cache")
    sources = tmp_path / "with blanks"
    sources.mkdir()
    for name in ("included.h", "indirect.h", "beside.h"):
        (sources / name).write_text("#pragma once\n")
    (sources / "included.h").write_text('#pragma once\n#include "indirect.h"\n')
    (sources / "source.cpp").write_text('#include "included.h"\n')

    def build():
        return emulated.build("made.so", [sources / "source.cpp"], ["-fPIC"], ["-shared"])

    made = {build()}
    for name in ("included.h", "indirect.h", "source.cpp"):
        before = (sources / name).read_text()
        (sources / name).write_text(before + "// a comment\n")
        made.add(build())
        (sources / name).write_text(before)
        assert build() in made
    assert len(made) == 4
    monkeypatch.setattr(emulated, "run", lambda command: pytest.fail(f"compiled again: {command}"))
    (sources / "beside.h").write_text("// a comment\n")
    (sources / "another.h").write_text("// a comment\n")
    assert build() in made


@pytest.mark.skipif(
    "FUSEDNORM_EMULATE" not in os.environ, reason="the kernels run on a GPU here: no emulation is built"
)
@pytest.mark.parametrize(("folder", "anew"), [("cpu", False), ("fastpath", False), ("cuda", True), ("emulation", True)])
def test_the_emulation_is_built_anew_only_where_it_has_to_be(folder, anew, monkeypatch):
    """A comment in every file of csrc/cpu changes nothing that it is compiled from."""
    read = emulated.digest_of
    changed = emulated.CSRC / folder
    assert any(changed.rglob("*"))
    compiled = []

    class Compiles(Exception):
        pass

    def compile_nothing(command):
        compiled.append(command)
        raise Compiles

    monkeypatch.setattr(emulated, "run", compile_nothing)
    emulated.build_provider(sanitized=False)  # conftest.py has built it
    assert not compiled
    commented = {str(path.relative_to(ROOT)) for path in changed.rglob("*") if path.is_file()}
    monkeypatch.setattr(emulated, "digest_of", lambda file: "a comment" if file in commented else read(file))
    with pytest.raises(Compiles) if anew else contextlib.nullcontext():
        emulated.build_provider(sanitized=False)
    assert bool(compiled) == anew
