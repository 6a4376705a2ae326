"""Builds the CUDA sources for the host, once for each version of them: what runs the kernels without a GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "emulation"
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
SANITIZED = ("-g1", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
PLAIN = ("-O1",)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def compiler() -> str | None:
    return shutil.which("g++")


def build(name: str, sources: Sequence[Path], flags: Sequence[str], link: Sequence[str] = ()) -> Path:
    """The compiled `name`, from the cache where nothing that it is made of has changed."""
    gxx = compiler()
    assert gxx is not None
    digest = hashlib.sha256(repr((flags, link)).encode())
    for path in sorted({*sources, *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())}):
        digest.update(path.read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    target = folder / name
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    common = [gxx, "-std=c++17", "-x", "c++", *WARNINGS, *flags]

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.name}.{os.getpid()}.o"
        run([*common, "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = target.with_suffix(f".{os.getpid()}")
    run([gxx, *flags, *map(str, objects), *link, "-o", str(unfinished)])
    unfinished.replace(target)  # whole or not at all, also with several processes building
    for made in objects:
        made.unlink()
    return target


def build_provider(sanitized: bool) -> Path:
    """The provider's library with its kernels on the CPU."""
    torch = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    csrc = ROOT / "csrc"
    sources = [*(csrc / "cuda").glob("*.cu"), *csrc.glob("*.cpp"), *(csrc / "cuda").glob("*.cpp")]
    sources = [*filter(lambda path: path.name != "machine.cu", sources), csrc / "emulation" / "limits.cpp"]
    flags = ["-DFN_EMULATED", TORCH_TARGET, "-isystem", str(torch / "include"), "-fPIC"]
    flags += SANITIZED if sanitized else PLAIN
    link = ["-shared", f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    return build("libfusednorm_cuda.so", sorted(sources), flags, link)


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode or done.stderr.strip():  # a warning is a fault
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
