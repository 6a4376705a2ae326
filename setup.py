"""Builds the native libraries where torch and a compiler are at hand; everything declarative is in pyproject.toml.

The CPU library takes a C++ compiler; the CUDA library nvcc too, and a torch built for CUDA. FUSEDNORM_CUDA=1 builds the
latter against any torch, 0 skips it, and FUSEDNORM_CUDA_ARCHITECTURES names other GPUs than "80 90 100": "native" is
those of this machine alone, which is a third of the work.
``pip install --no-build-isolation .`` builds it, ``python setup.py build_ext --inplace`` serves a checkout. Without
torch or a compiler the package is pure Python. FUSEDNORM_NATIVE=1 makes a missing library an error, 0 skips it.

The libraries target torch's stable ABI and have no Python symbols: one build serves every Python, and every torch from
the targeted one on. The shortcut, a Python module over torch's own C++ interface, serves the torch and the Python that
it is built with; its file name says which.
"""

from __future__ import annotations

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
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # without build isolation nobody looks at what pyproject.toml requires
    raise SystemExit('fusednorm: this setuptools is too old: pip install "setuptools>=77.0.3,<82"') from None

ROOT = Path(__file__).parent
COMMON = ROOT / "csrc"
CPU = ROOT / "csrc" / "cpu"
CUDA = ROOT / "csrc" / "cuda"
SHORTCUT = ROOT / "csrc" / "shortcut"
TARGET = (2, 11)
MACOS = sys.platform == "darwin"
WANTED = os.environ.get("FUSEDNORM_NATIVE", "")
CUDA_WANTED = os.environ.get("FUSEDNORM_CUDA", "")

INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
            *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
        ],
    }
# No contraction: a * b + c rounds twice on every instruction set, so all of them give the same results.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += [
    "-Wall",
    "-Wextra",
    f"-fmacro-prefix-map={ROOT.resolve()}/=",
]  # error messages name sources as the repository does
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
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise RuntimeError("no C++ compiler is installed (c++, g++ and clang++ are not found; CXX names another)")


def nvcc() -> list[str]:
    for path in (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and Path(path).exists():
            return [path]
    raise RuntimeError("nvcc is not found (CUDACXX names one)")


def cuda_architectures() -> list[str]:
    """What to compile for, the newest last."""
    named = os.environ.get("FUSEDNORM_CUDA_ARCHITECTURES", "80 90 100").split()
    if named == ["native"]:
        question = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            answer = subprocess.run(question, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as fault:
            raise RuntimeError(f"FUSEDNORM_CUDA_ARCHITECTURES=native: nvidia-smi does not answer: {fault}") from fault
        named = [line.strip().replace(".", "") for line in answer.splitlines() if line.strip()]
    if not named or not all(re.fullmatch(r"\d+a?", name) for name in named):
        raise RuntimeError(f'FUSEDNORM_CUDA_ARCHITECTURES: expected "native" or numbers such as "80 90", got {named}')
    return sorted(set(named), key=lambda name: (int(name.rstrip("a")), name))


Commands = tuple[dict[Path, list[str]], list[str]]  # what makes each object, and the libraries to link


def torch_flags(torch: Path) -> list[str]:
    return [f"-DTORCH_TARGET_VERSION=0x{TARGET[0]:02x}{TARGET[1]:02x}000000000000", "-isystem", str(torch / "include")]


def cpu_commands(objects: Path, torch: Path, compiler: list[str]) -> Commands:
    kernels = sorted(CPU.glob("*_kernels.cpp"))
    jobs = {
        objects / f"{source.stem}_{name}.o": [
            *(*compiler, *FLAGS, *KERNEL_FLAGS, f"-DFN_ISA={name}", *flags, "-c", str(source))
        ]
        for source in kernels
        for name, flags in INSTRUCTION_SETS.items()
    } | {
        objects / f"{source.stem}.o": [*compiler, *FLAGS, *torch_flags(torch), "-c", str(source)]
        for source in sorted([*COMMON.glob("*.cpp"), *CPU.glob("*.cpp")])
        if source not in kernels
    }
    # the name that the shortcut finds it by, which is linked to it
    return jobs, ["-Wl,-install_name,@rpath/libfusednorm_cpu.so" if MACOS else "-Wl,-soname,libfusednorm_cpu.so"]


def cuda_commands(objects: Path, torch: Path, compiler: list[str]) -> Commands:
    cuda = nvcc()
    homes = [Path(cuda[0]).resolve().parents[1], *map(Path, (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"))]
    folders = [home / folder for home in homes for folder in ("lib64", "lib")]
    runtime = next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)
    if runtime is None:
        raise RuntimeError(f"libcudart_static.a is in none of {', '.join(map(str, folders))} (CUDA_HOME names another)")
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    architectures = cuda_architectures()
    for name in architectures:
        flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
    newest = architectures[-1]  # for GPUs to come
    flags += ["-gencode", f"arch=compute_{newest},code=compute_{newest}"]
    jobs = {
        objects / f"{source.stem}.o": [*cuda, *flags, "-ccbin", compiler[0], "-c", str(source)]
        for source in sorted(CUDA.glob("*.cu"), key=lambda source: -source.stat().st_size)
    } | {
        objects / f"{source.stem}.o": [*compiler, *FLAGS, "-DUSE_CUDA", *torch_flags(torch), "-c", str(source)]
        for source in sorted([*COMMON.glob("*.cpp"), *CUDA.glob("*.cpp")])
    }
    # cudart inside: it shares the GPU's context with torch's own, of whatever version
    return jobs, [f"-L{runtime}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def shortcut_name() -> str:
    """Of the file; fusednorm/_shortcut.py looks for the one of its own torch and Python."""
    found = re.search(r"__version__ = '([^']+)'", (torch_directory() / "version.py").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError("torch/version.py does not say which version it is")
    return f"_shortcut.torch-{found[1]}{EXTENSION_SUFFIXES[0]}"


def shortcut_commands(objects: Path, torch: Path, compiler: list[str], cpu_library: Path) -> Commands:
    if not cpu_library.exists():
        raise RuntimeError(f"the shortcut needs {cpu_library.name}, which was not built")
    headers = [
        torch / "include",
        torch / "include" / "torch" / "csrc" / "api" / "include",
        sysconfig.get_path("include"),
    ]
    if not (Path(headers[-1]) / "Python.h").exists():
        raise RuntimeError(f"Python.h is not in {headers[-1]} (on Debian: apt install python3-dev)")
    flags = ["-std=c++20", *FLAGS[1:], *(word for path in headers for word in ("-isystem", str(path)))]
    jobs = {
        objects / f"{source.stem}.o": [*compiler, *flags, "-c", str(source)]
        for source in sorted(SHORTCUT.glob("*.cpp"))
    }
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


class BuildNative(build_ext):
    """Compiles without setuptools' compiler classes, which have no flags for a single source."""

    def build_extension(self, extension: Extension) -> None:
        try:
            self._build(Path(self.build_temp) / extension.name, Path(self.get_ext_fullpath(extension.name)))
        except (RuntimeError, OSError, subprocess.CalledProcessError) as fault:
            said = getattr(fault, "stderr", None) or ""
            if WANTED == "1":
                raise SystemExit(f"{said}\nfusednorm: {extension.name} could not be built: {fault}") from fault
            print(f"{said}\nfusednorm: installing without {extension.name}: {fault}", file=sys.stderr)

    def _build(self, objects: Path, library: Path) -> None:
        torch, compiler = torch_directory(), cxx_compiler()
        if sys.platform not in ("linux", "darwin"):
            raise RuntimeError(f"the native library is for Linux and macOS, this is {sys.platform}")
        objects.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        if library.stem == "libfusednorm_cpu":
            jobs, libraries = cpu_commands(objects, torch, compiler)
        elif library.stem == "libfusednorm_cuda":
            jobs, libraries = cuda_commands(objects, torch, compiler)
        else:
            jobs, libraries = shortcut_commands(objects, torch, compiler, library.with_name("libfusednorm_cpu.so"))

        def compile_one(job: tuple[Path, list[str]]) -> None:
            out, command = job
            if self.force or outdated(out):
                listing, unfinished = out.with_suffix(".d"), out.with_suffix(f".{os.getpid()}")
                run([*command, "-MMD", "-MF", f"{listing}.{os.getpid()}", "-MT", str(out), "-o", str(unfinished)])
                os.replace(f"{listing}.{os.getpid()}", listing)
                unfinished.replace(out)  # whole or not at all, also with several processes building

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs.items()))
        link = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", *libraries]
        new = library.with_suffix(f".{os.getpid()}")  # renamed, so that a process that has the old one loaded keeps it
        run([*compiler, "-shared", "-o", str(new), *map(str, jobs), *link])
        new.replace(library)

    def copy_file(self, infile: str, outfile: str, *rest: object, **options: object) -> tuple[str, bool]:
        """Into a source checkout, where a process may be loading the old one, or another building."""
        unfinished = f"{outfile}.{os.getpid()}"
        shutil.copy2(infile, unfinished)
        os.replace(unfinished, outfile)
        return outfile, True

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        return os.path.join(*folders, shortcut_name() if name == "_shortcut" else f"{name}.so")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


def outdated(out: Path) -> bool:
    """Whether anything that the compiler read for this object (its .d file says what) is newer."""
    listing = out.with_suffix(".d")
    if not (out.exists() and listing.exists()):
        return True
    read = shlex.split(listing.read_text().replace("\\\n", " ").partition(": ")[2])
    made = out.stat().st_mtime
    return any(not Path(p).exists() or Path(p).stat().st_mtime > made for p in [*read, __file__])


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(result.stderr)
    result.check_returncode()


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def extensions() -> list[Extension]:
    if WANTED == "0":
        return []
    try:
        torch_directory()
    except RuntimeError as fault:
        if WANTED == "1":
            raise SystemExit(f"fusednorm: the native library cannot be built: {fault}") from fault
        print(f"fusednorm: pure Python, without the native library: {fault}", file=sys.stderr)
        return []
    names = ["libfusednorm_cpu", "_shortcut", *(["libfusednorm_cuda"] if cuda_is_wanted() else [])]
    return [Extension(f"fusednorm.{name}", sources=[], optional=True) for name in names]


if __name__ == "__main__":  # tests/emulated.py takes the commands
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel})
