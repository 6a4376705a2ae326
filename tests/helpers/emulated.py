"""Builds native sources for tests, once for each version of them.

The CUDA sources for the host, which runs their kernels without a GPU; the CUDA library without its runtime; and the CPU
library under sanitizers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulation"
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
SANITIZED = ("-g1", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
PLAIN = ("-O1",)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def compiler() -> str | None:
    return shutil.which("g++")


def build(name: str, sources: Sequence[Path], flags: Sequence[str], link: Sequence[str] = ()) -> Path:
    """`name` of sources that are all compiled alike."""
    common = [str(compiler()), "-std=c++17", "-x", "c++", *WARNINGS, *flags]
    jobs = {source.name: [*common, "-c", str(source)] for source in sources}
    return build_from(name, jobs, [*flags, *link])


def build_from(name: str, jobs: Mapping[str, Sequence[str]], link: Sequence[str]) -> Path:
    """`name`, linked of what the jobs' commands make, from the cache where nothing that it is made of has changed.

    It is made of the commands, and of the files that the compiler lists: sources and what they include.
    """
    gxx = compiler()
    assert gxx is not None
    script, torch = setup_script(), torch_directory()
    commands = [(list(command), script.identity(list(command), torch)) for command in jobs.values()]
    of_commands = hashlib.sha256(repr((name, commands, link)).replace(f"{ROOT}{os.sep}", "").encode())
    folder = CACHE / of_commands.hexdigest()[:16]
    for listing in folder.glob("*/files.json"):
        if (listing.parent / name).exists() and unchanged(json.loads(listing.read_text())):
            return listing.parent / name
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(job: tuple[str, Sequence[str]]) -> Path:
        made = folder / f"{job[0]}.{os.getpid()}.o"
        run([*job[1], "-MMD", "-MF", f"{made}.d", "-o", str(made)])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs.items()))
    unfinished = folder / f"{name}.{os.getpid()}"
    run([gxx, *map(str, objects), *link, "-o", str(unfinished)])
    files = {file: digest_of(file) for made in objects for file in files_read(Path(f"{made}.d"))}
    target = folder / hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16] / name
    target.parent.mkdir(exist_ok=True)
    unfinished.replace(target)  # whole or not at all, also with several processes building
    listing = target.with_name(f"files.{os.getpid()}")
    listing.write_text(json.dumps(files))
    listing.replace(target.with_name("files.json"))
    for made in objects:
        made.unlink()
        Path(f"{made}.d").unlink()
    return target


def files_read(dependencies: Path) -> set[str]:
    """The files of a compiler's list, without headers of the system and of torch; below ROOT relative to it."""
    listed = dependencies.read_text().partition(": ")[2].replace("\\\n", " ")
    found = (word.replace("\\ ", " ") for word in re.split(r"(?<!\\)\s+", listed) if word)
    return {os.path.relpath(file, ROOT) if Path(file).is_relative_to(ROOT) else file for file in found}


def digest_of(file: str) -> str | None:
    path = ROOT / file
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def unchanged(files: Mapping[str, str]) -> bool:
    return all(digest_of(file) == digest for file, digest in files.items())


def build_provider(sanitized: bool, warpgroups: bool = False) -> Path:
    """The provider's library with its kernels on the CPU; with `warpgroups` those that nvcc compiles for sm_90a."""
    torch = torch_directory()
    sources = [path for pattern in ("*.cu", "*.cpp") for path in (CSRC / "cuda").rglob(pattern)]
    sources += [*(CSRC / "common").glob("*.cpp"), CSRC / "emulation" / "limits.cpp"]
    sources = [source for source in sources if source.name != "machine.cu"]
    flags = ["-DFN_EMULATED", TORCH_TARGET, "-isystem", str(torch / "include"), "-fPIC"]
    flags += (SANITIZED if sanitized else PLAIN) + (("-DFN_EMULATED_WARPGROUPS",) if warpgroups else ())
    return build("libfusednorm_cuda.so", sorted(sources), flags, link_torch(torch))


def build_cuda(with_runtime: bool = False) -> Path:
    """The CUDA library, linked as setup.py links it, or to whatever runtime is there when it is loaded.

    Its kernels are PTX that nobody optimised.
    """
    torch, script = torch_directory(), setup_script()
    commands, runtime = script.cuda_commands(Path(), torch, [str(compiler())])
    jobs = {made.stem: command for made, command in commands.items() if command[-1].endswith(".cpp")}
    kernels = sorted(command[-1] for command in commands.values() if command[-1].endswith(".cu"))
    flags = ["-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-ccbin", str(compiler()), "-Xcicc", "-O0"]
    flags += ["-gencode", "arch=compute_90,code=compute_90", "--no-compress"]
    for half, sources in enumerate((kernels[::2], kernels[1::2])):  # nvcc reads its own headers for seconds
        together = [part for source in sources[:-1] for part in ("-include", source)]
        jobs[f"kernels_{half}"] = [*script.nvcc(), *flags, *together, "-c", sources[-1]]
    objects = build_from("cuda.o", jobs, ["-r", "-nostdlib"])
    name = "with_runtime.so" if with_runtime else "libfusednorm_cuda.so"
    unfinished = objects.with_name(f"{name}.{os.getpid()}")
    link = [*link_torch(torch), *(runtime if with_runtime else [])]
    run([str(compiler()), str(objects), *link, "-o", str(unfinished)])
    return unfinished.replace(objects.with_name(name))


def build_cpu(flags: Sequence[str], vector_flags: Sequence[str] | None = None, csrc: Path = CSRC) -> Path:
    """The CPU library by the commands of setup.py, with more flags: these come last and so prevail.

    The kernels for more than the baseline take `vector_flags`, if given.
    """
    torch = torch_directory()
    script = setup_script()
    commands, link = script.cpu_commands(Path(), torch, [str(compiler())])
    jobs = {}
    for made, command in commands.items():
        vector = "_kernels_" in made.stem and not made.stem.endswith("_baseline")
        last = vector_flags if vector and vector_flags is not None else flags
        jobs[made.stem] = [*(part.replace(str(script.CSRC), str(csrc)) for part in command), *last]
    return build_from("libfusednorm_cpu.so", jobs, [*flags, *link, *link_torch(torch)])


def torch_directory() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]


def link_torch(torch: Path) -> list[str]:
    return ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]


def setup_script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode or done.stderr.strip():  # a warning is a fault
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
