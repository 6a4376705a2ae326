"""Builds the native libraries where torch, a compiler and ninja are at hand; what is declarative is in pyproject.toml.

The CPU library takes a C++ compiler; the CUDA library nvcc too, and a torch built for CUDA. FUSEDNORM_CUDA=1 builds the
latter against any torch, 0 skips it. FUSEDNORM_CUDA_ARCHITECTURES="80 90" names the GPUs it is for, "native" those of
this machine alone, a fraction of the work. Unnamed, it is for those of ARCHITECTURES that nvcc knows.
``pip install --no-build-isolation .`` builds it, ``python setup.py build_ext --inplace`` serves a checkout. Without
torch, a compiler or ninja the package is pure Python. FUSEDNORM_NATIVE=1 makes a missing library an error, 0 skips it.

The libraries target torch's stable ABI and have no Python symbols: one build serves every Python, and every torch from
the targeted one on. The fast path, a Python module over torch's own C++ interface, serves the torch and the Python that
it is built with; its file name says which.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise, takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # without build isolation nobody looks at what pyproject.toml requires
    raise SystemExit('fusednorm: this setuptools is too old: pip install "setuptools>=77.0.3,<82"') from None

ROOT = Path(__file__).resolve().parent  # one spelling, or pip and a call by hand would not share objects
CSRC = ROOT / "csrc"
COMMON, CPU, CUDA, FASTPATH = CSRC / "common", CSRC / "cpu", CSRC / "cuda", CSRC / "fastpath"
TARGET = (2, 11)
MACOS = sys.platform == "darwin"
WANTED = os.environ.get("FUSEDNORM_NATIVE", "")
CUDA_WANTED = os.environ.get("FUSEDNORM_CUDA", "")
ARCHITECTURES = ("80", "89", "90a", "100", "120")  # 90a: with the matrix instructions of warpgroups
READ_BY_COMPILERS = ("CPATH", "CPLUS_INCLUDE_PATH", "NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "SDKROOT")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512BF16 = [*AVX512, "-mavx512bf16"]
INSTRUCTION_SETS = {"baseline": []}
INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512BF16} if X86 else {}
# No contraction: a * b + c rounds twice on every instruction set, so all of them give the same results.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
# A member of an enumeration without a case is an error. Error messages name sources as the repository does.
FLAGS += ["-Wall", "-Wextra", "-Werror=switch", f"-fmacro-prefix-map={ROOT}/="]
KERNEL_FLAGS = ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]


def torch_directory() -> Path:
    """Where torch is; RuntimeError where there is none to build against. It is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "torch is not installed in the environment that builds; install it and pass --no-build-isolation to pip"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < TARGET:
        raise RuntimeError(f"torch {version} is older than {'.'.join(map(str, TARGET))}")
    return Path(spec.origin).parent


def cxx_compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise RuntimeError(f"CXX names {named[0]}, which is not found")
        return named
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no C++ compiler is installed (c++, g++ and clang++ are not found; CXX names another)")


def nvcc() -> list[str]:
    for path in (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and Path(path).exists():
            return [path]
    raise RuntimeError("nvcc is not found (CUDACXX names one)")


def cuda_architectures(compiler: list[str]) -> list[str]:
    """What to compile for, the newest last."""
    asked = subprocess.run([*compiler, "--list-gpu-code"], capture_output=True, text=True)
    known = re.findall(r"sm_(\d+)\b", asked.stdout)
    if asked.returncode or not known:
        raise RuntimeError(f"{compiler[0]} --list-gpu-code names no GPU: {asked.stderr.strip() or asked.stdout!r}")
    variable = "FUSEDNORM_CUDA_ARCHITECTURES"
    if variable not in os.environ:
        named = [name for name in ARCHITECTURES if name.rstrip("a") in known]
        if not named:
            raise RuntimeError(
                f"{compiler[0]} compiles for {' '.join(known)}, and for none of {' '.join(ARCHITECTURES)}"
            )
        return named
    named = os.environ[variable].split()
    if named == ["native"]:
        question = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            answer = subprocess.run(question, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as fault:
            raise RuntimeError(f"{variable}=native: nvidia-smi does not answer: {fault}") from fault
        found = [line.strip().replace(".", "") for line in answer.splitlines() if line.strip()]
        named = [name for name in found if not name.isdecimal() or int(name) >= 80]
        named = ["90a" if name == "90" else name for name in named]
        if found and not named:
            raise RuntimeError(f"{variable}=native: this machine's GPUs, {' '.join(found)}, are older than 80")
    if not named or not all(re.fullmatch(r"\d+a?", name) for name in named):
        raise RuntimeError(f'{variable}: expected "native" or numbers such as "80 90", got {named}')
    if older := [name for name in named if int(name.rstrip("a")) < 80]:
        raise RuntimeError(f"{variable}: the kernels need 80 or newer, got {' '.join(older)}")
    if unknown := [name for name in named if name.rstrip("a") not in known]:
        raise RuntimeError(
            f"{variable}: {compiler[0]} does not compile for {' '.join(unknown)}, but for {' '.join(known)}; "
            "install a newer CUDA (12.8 or newer for 100 and 120), or name others"
        )
    return sorted(set(named), key=lambda name: (int(name.rstrip("a")), name))


def code_for(architectures: list[str]) -> list[str]:
    """nvcc's flags: machine code of each, and PTX where a generation may follow that has none."""
    flags = []
    for name, following in zip(architectures, [*architectures[1:], "990"]):
        flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        major, next_major = (int(n.rstrip("a")) // 10 for n in (name, following))
        if next_major > major + 1:  # 100 and 120: those of 110 have to compile what 100 is
            newer = name.rstrip("a")  # PTX of 90a runs on nothing newer
            flags += ["-gencode", f"arch=compute_{newer},code=compute_{newer}"]
    return flags


# what makes each object, and what links them (of the functions that return one: the libraries to link)
Commands = tuple[dict[Path, list[str]], list[str]]


def torch_flags(torch: Path) -> list[str]:
    return [f"-DTORCH_TARGET_VERSION=0x{TARGET[0]:02x}{TARGET[1]:02x}000000000000", "-isystem", str(torch / "include")]


def compiling(objects: Path, sources: Iterable[Path], command: list[str], suffix: str = "") -> dict[Path, list[str]]:
    """Large sources first: they take the longest."""
    ordered = sorted(sources, key=lambda source: (-source.stat().st_size, source))
    return {objects / f"{source.stem}{suffix}.o": [*command, "-c", str(source)] for source in ordered}


def cpu_commands(objects: Path, torch: Path, compiler: list[str]) -> Commands:
    kernels = set(CPU.rglob("*_kernels.cpp"))
    jobs = {}
    for name, flags in INSTRUCTION_SETS.items():
        command = [*compiler, *FLAGS, *KERNEL_FLAGS, f"-DFN_ISA={name}", *flags]
        jobs |= compiling(objects, kernels, command, f"_{name}")
    others = [*COMMON.glob("*.cpp"), *{*CPU.rglob("*.cpp")} - kernels]
    jobs |= compiling(objects, others, [*compiler, *FLAGS, *torch_flags(torch)])
    # the name that the fast path finds it by, which is linked to it
    return jobs, ["-Wl,-install_name,@rpath/libfusednorm_cpu.so" if MACOS else "-Wl,-soname,libfusednorm_cpu.so"]


def cuda_commands(objects: Path, torch: Path, compiler: list[str]) -> Commands:
    cuda = nvcc()
    homes = [Path(cuda[0]).resolve().parents[1], *map(Path, (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"))]
    folders = [home / folder for home in homes for folder in ("lib64", "lib")]
    runtime = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
    if runtime is None:
        raise RuntimeError(f"libcudart_static.a is in none of {', '.join(map(str, folders))} (CUDA_HOME names another)")
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *code_for(cuda_architectures(cuda))]
    jobs = compiling(objects, CUDA.rglob("*.cu"), [*cuda, *flags, "-ccbin", compiler[0]])
    others = [*COMMON.glob("*.cpp"), *CUDA.rglob("*.cpp")]
    jobs |= compiling(objects, others, [*compiler, *FLAGS, "-DUSE_CUDA", *torch_flags(torch)])
    # cudart inside: it shares the GPU's context with torch's own, of whatever version
    return jobs, [f"-L{runtime}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def torch_version(torch: Path) -> str:
    found = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError("torch/version.py does not say which version it is")
    return found[1]


def fastpath_name() -> str:
    """Of the file; fusednorm/dispatch/fastpath.py looks for the one of its own torch and Python."""
    return f"_fastpath.torch-{torch_version(torch_directory())}{EXTENSION_SUFFIXES[0]}"


def fastpath_commands(objects: Path, torch: Path, compiler: list[str], cpu_library: Path) -> Commands:
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise RuntimeError(f"Python.h is not in {python} (on Debian: apt install python3-dev)")
    headers = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include", python]
    flags = ["-std=c++20", *FLAGS[1:], *(word for path in headers for word in ("-isystem", str(path)))]
    jobs = compiling(objects, FASTPATH.glob("*.cpp"), [*compiler, *flags])
    origin = "@loader_path" if MACOS else "$ORIGIN"
    return jobs, ["-ltorch_python", str(cpu_library), f"-Wl,-rpath,{origin}"]


def cuda_is_wanted() -> bool:
    if CUDA_WANTED in ("0", "1"):
        return CUDA_WANTED == "1"
    try:
        nvcc()
    except RuntimeError:
        return False
    return (torch_directory() / "lib" / "libtorch_cuda.so").exists()


@functools.cache
def version_of(*compiler: str) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace").stdout


def identity(command: list[str], torch: Path) -> str:
    """What a command does not say: the versions of its compilers, torch's if it sees torch, what they take unasked.

    Times do not tell: files of an archive keep theirs, and so may be older than objects made with an older version.
    """
    versions = [version_of(*takewhile(lambda word: not word.startswith("-"), command))]
    versions += [version_of(host) for flag, host in pairwise(command) if flag == "-ccbin"]
    if any(str(torch) in word for word in command):
        versions.append(torch_version(torch))
    versions += [f"{name}={os.environ[name]}" for name in READ_BY_COMPILERS if os.environ.get(name)]
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()[:12]


def write_plan(file: Path, torch: Path, libraries: dict[Path, Commands]) -> None:
    """For ninja, which compares the times of all files read, and whole commands: comments in them too."""
    from ninja import ninja_syntax

    def quoted(command: list[str]) -> dict[str, str]:
        return {"call": ninja_syntax.escape(shlex.join(command)), "identity": identity(command, torch)}

    def path(given: Path | str) -> str:
        return ninja_syntax.escape(str(given))  # the writer itself escapes blanks and colons

    with file.open("w", encoding="utf-8") as text:
        plan = ninja_syntax.Writer(text)
        plan.variable("builddir", path(file.parent))
        compile_it = "$call -MD -MF $out.d -o $out  # $identity"
        plan.rule("compile", compile_it, "compile $out", depfile="$out.d", deps="gcc")
        # renamed, so that a process that has the old one loaded keeps it
        plan.rule("link", "$call -o $out.new && mv -f $out.new $out  # $identity", "link $out")
        for library, (jobs, link) in libraries.items():
            for made, command in jobs.items():
                source = command[command.index("-c") + 1]
                plan.build(path(made), "compile", path(source), variables=quoted(command))
            linked = [path(other) for other in libraries if str(other) in link]
            plan.build(path(library), "link", [path(made) for made in jobs], linked, variables=quoted(link))


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """Waits until no other process is between here and the end of its block; ninja does not."""
    import fcntl  # not on Windows, where there is nothing to build

    with file.open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def commands_for(library: Path, objects: Path, after_the_cpus: bool) -> Commands:
    torch, compiler = torch_directory(), cxx_compiler()
    objects.mkdir(parents=True, exist_ok=True)
    if library.stem == "libfusednorm_cpu":
        jobs, libraries = cpu_commands(objects, torch, compiler)
    elif library.stem == "libfusednorm_cuda":
        jobs, libraries = cuda_commands(objects, torch, compiler)
    elif after_the_cpus:
        jobs, libraries = fastpath_commands(objects, torch, compiler, library.with_name("libfusednorm_cpu.so"))
    else:
        raise RuntimeError("it needs libfusednorm_cpu.so, which is not built")
    torchs = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    return jobs, [*compiler, "-shared", *map(str, jobs), *torchs, *libraries]


class BuildNative(build_ext):
    """Compiles by ninja, not by setuptools' compiler classes, which have no flags for a single source."""

    def build_extensions(self) -> None:
        libraries = {extension.name: Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions}
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / "lock"):
            faults = self._build(folder, libraries)
            for name in faults:  # what an earlier build left there is not what was asked for
                libraries[name].unlink(missing_ok=True)
        said = [f"without {name.rpartition('.')[2]}: {fault}" for name, fault in faults.items()]
        if said and WANTED == "1":
            raise SystemExit(f"fusednorm: FUSEDNORM_NATIVE=1, and it would be {'; '.join(said)}")
        for text in said:
            print(f"fusednorm: installing {text}", file=sys.stderr)

    def _build(self, folder: Path, libraries: dict[str, Path]) -> dict[str, str]:
        """Builds them, and says what went wrong with which."""
        planned, faults = {}, {}
        for name, library in libraries.items():
            library.parent.mkdir(parents=True, exist_ok=True)
            try:
                planned[name] = commands_for(library, folder / name, "fusednorm.libfusednorm_cpu" in planned)
            except (RuntimeError, OSError) as fault:
                faults[name] = str(fault)
        plan = folder / "build.ninja"
        write_plan(plan, torch_directory(), {libraries[name]: planned[name] for name in planned})
        if self.force:
            (folder / ".ninja_log").unlink(missing_ok=True)
        ninja = [sys.executable, "-m", "ninja", "-f", str(plan)]
        processes = ["-j", str(self.parallel)] if isinstance(self.parallel, int) else []
        sys.stdout.flush()
        if subprocess.run([*ninja, *processes, "-k", "0"]).returncode:
            for name in planned:  # some may be whole
                left = subprocess.run([*ninja, "-n", str(libraries[name])], capture_output=True, text=True)
                if "no work to do" not in left.stdout:
                    faults[name] = "it could not be built; the compiler's messages stand above"
        return faults

    def copy_file(self, infile: str, outfile: str, *rest: object, **options: object) -> tuple[str, bool]:
        """Into a source checkout, where a process may be loading the old one, or another building."""
        unfinished = f"{outfile}.{os.getpid()}"
        shutil.copy2(infile, unfinished)
        os.replace(unfinished, outfile)
        return outfile, True

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        return os.path.join(*folders, fastpath_name() if name == "_fastpath" else f"{name}.so")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def check_tools() -> None:
    """RuntimeError where something is missing without which nothing is built."""
    torch_directory()
    if sys.platform not in ("linux", "darwin"):
        raise RuntimeError(f"it is for Linux and macOS, this is {sys.platform}")
    cxx_compiler()
    try:
        from ninja import ninja_syntax  # noqa: F401
    except ImportError:
        raise RuntimeError("ninja is not installed in the environment that builds: pip install ninja") from None


def extensions() -> list[Extension]:
    if WANTED == "0":
        return []
    try:
        check_tools()
    except RuntimeError as fault:
        if WANTED == "1":
            raise SystemExit(f"fusednorm: the native library cannot be built: {fault}") from fault
        print(f"fusednorm: pure Python, without the native library: {fault}", file=sys.stderr)
        return []
    names = ["libfusednorm_cpu", "_fastpath", *(["libfusednorm_cuda"] if cuda_is_wanted() else [])]
    return [Extension(f"fusednorm.{name}", sources=[], optional=True) for name in names]


def description() -> str:
    """README.md for a package index, which has neither the images nor the other files that it links to."""
    parts = (ROOT / "README.md").read_text(encoding="utf-8").split("```")
    for i in range(0, len(parts), 2):  # between them is code
        parts[i] = re.sub(r"^!\[[^]]*\]\([^)]*\)\n+", "", parts[i], flags=re.MULTILINE)
        parts[i] = re.sub(r"\[([^]]+)\]\((?!https?:)([^)]+)\)", r"\1 (\2)", parts[i])
    return "```".join(parts)


if __name__ == "__main__":  # tests/helpers/emulated.py takes the commands
    setup(
        long_description=description(),
        long_description_content_type="text/markdown",
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    )
