"""What nvcc makes of the CUDA C++ kernels: registers, spills, access widths, instructions. No GPU is needed.

    python3 -m tools.codegen.cuda               # sm_90a, most sources: tables
    python3 -m tools.codegen.cuda --arch 80 90a 100 --sources norm_float64
    python3 -m tools.codegen.cuda --write       # renew benchmarks/results/codegen_cuda.md

Exit status: 0; 1 when a kernel breaks the gate (see `faults`), which `tests/tools/test_codegen_cuda.py` holds; 2 when
nvcc or cuobjdump is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from tools.codegen import cuda_forms as forms
from tools.codegen import results
from tools.codegen.cuda_forms import CUDA, MOST_THREADS, REGISTER_FILE, resident_blocks
from tools.codegen.cuda_kernel import PAIRS, SHARED_BYTES, Kernel, expected
from tools.codegen.cuda_sass import hot_loop, kernels

ARCHITECTURES = ("80", "90a", "100")
PAGE = results.FOLDER / "codegen_cuda.md"
UNITS = ("HMMA", "LDSM", "LDGSTS", "HGMMA", "WARPGROUP", "FENCE")  # the matrix units', and copies to shared memory
ON_PAGE, ARCH_ON_PAGE = ["norm_bfloat16", "activation", "norm_float32", "partials"], "90a"
NVCC = shutil.which("nvcc")
_TRITON = find_spec("triton")
_BUNDLED = Path(_TRITON.origin).parent / "backends/nvidia/bin/cuobjdump" if _TRITON and _TRITON.origin else None
CUOBJDUMP = shutil.which("cuobjdump") or (str(_BUNDLED) if _BUNDLED and _BUNDLED.exists() else None)


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if NVCC is None:
        return "nvcc is not installed"
    return None if CUOBJDUMP else "no cuobjdump: neither CUDA's nor Triton's"


def faults(k: Kernel) -> list[str]:
    found = []
    if k.stack or k.spilled or k.local:
        found.append(f"spills: {k.stack} bytes of stack, {k.spilled} spilled, {k.local} local accesses")
    threads, blocks = k.bounds
    if resident_blocks(k.registers, threads) < blocks:
        found.append(f"{k.registers} registers: {blocks} blocks of {threads} threads do not fit")
    if k.shared > SHARED_BYTES:
        found.append(f"{k.shared} bytes of shared memory")
    if k.aligned:
        counts = dict(k.accesses)
        if k.wide != k.model():
            found.append(f"128-bit loads and stores: {k.wide}, not {k.model()}; all: {counts}")
        if k.copies not in (2 * k.staged(), 3 * k.staged()):  # the first two are a loop, or not
            found.append(f"copies to shared memory: {k.copies}, not 2 or 3 times {k.staged()}")
        # statistics, sums and the seed; partial sums of narrow rows
        narrow = {op: n for op, n in counts.items() if ".128" not in op}
        if any(".U16" in op or ".U8" in op for op in narrow) or sum(narrow.values()) > 16:
            found.append(f"narrow accesses: {narrow}")
    return found


def _identity(mangled: str) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    name, arguments = re.search(r"fusednorm_cuda\d+(\w+?)_kernelI(.*?)EEv", mangled).groups()  # type: ignore[union-attr]
    types: list[str] = []
    while found := re.match(r"NS_\d+(B?Float16)E|([fd])|(S\d?_)", arguments):
        types.append(found[1] or {"f": "float", "d": "double"}.get(found[2]) or types[0])
        arguments = arguments[found.end() :]
    return (
        name,
        tuple(types),
        tuple(int(n) for n in re.findall(r"L(?:[ib]|NS_\d+(?:Access|Epilogue)E)(\d+)", arguments + "E")),
    )


def compile_kernels(source: str, arch: str, folder: Path) -> list[Kernel]:
    assert NVCC is not None and CUOBJDUMP is not None, missing()
    cubin = folder / f"{source}_{arch}.cubin"
    (path,) = CUDA.rglob(f"{source}.cu")
    made = subprocess.run(
        [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", "-o", cubin, path],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    assert "warning" not in made.stderr, made.stderr
    programs = kernels(subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout)
    found = []
    for part in made.stderr.split("Compiling entry function '")[1:]:
        mangled = part.split("'")[0]
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert numbers is not None and registers is not None, part
        program = programs[mangled]
        ops = Counter(i.opcode for i in program if i.opcode.startswith(("LDG", "STG", "LDL", "STL")))
        name, types, constants = _identity(mangled)
        hot = program if name == "add_layer_norm_fwd" else hot_loop(program)
        found.append(
            Kernel(
                arch,
                name,
                types,
                constants,
                registers=int(registers[1]),
                stack=int(numbers[1]),
                spilled=int(numbers[2]) + int(numbers[3]),
                shared=int(shared[1]) if shared else 0,
                accesses=tuple(sorted((op, n) for op, n in ops.items() if op[2] == "G")),
                local=sum(n for op, n in ops.items() if op[2] == "L"),
                hot=len(hot),
                hot_loads=sum(i.reads_memory for i in hot),
                units=tuple(sorted(Counter(i.opcode for i in program if i.stem in UNITS).items())),
            )
        )
    return found


def compile_sources(sources: Iterable[str], arch: str, folder: Path) -> list[Kernel]:
    """Every kernel of these sources, none missing and none besides."""
    sources = list(sources)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(sources, pool.map(lambda source: compile_kernels(source, arch, folder), sources)))
    for source, each in made.items():
        assert {(k.name, k.types, k.constants) for k in each} == expected(source)
    return [k for each in made.values() for k in each]


def broken(compiled: Iterable[Kernel]) -> list[str]:
    return [f"{k.name}{k.types}{k.constants} sm_{k.arch}: {fault}" for k in compiled for fault in faults(k)]


def hold(sources: list[str], arch: str, folder: Path) -> list[Kernel]:
    compiled = compile_sources(sources, arch, folder)
    assert not broken(compiled), "\n".join(broken(compiled))
    return compiled


# --- reporting ---

_DTYPES = {"BFloat16": "bfloat16", "Float16": "float16", "float": "float32", "double": "float64"}


def start(k: Kernel) -> str:
    """The columns that say which kernel it is."""
    dtypes = " / ".join(_DTYPES[t] for t in k.types)
    return f"| {k.name} | {k.takes} | {k.chunks} | {dtypes} | {k.arch} |"


def row(k: Kernel) -> str:
    model = [f" ({n})" for n in k.model()] if k.aligned else ["", ""]
    loads, stores = (f"{n}{asked}" for n, asked in zip(k.wide, model))
    copies = f"{k.copies} ({k.staged()} a row)" if k.copies else ""
    return (
        f"{start(k)} {k.registers} | {max(k.stack, k.spilled)} | {k.bounds[0]} | {k.resident} | {loads} | {stores} "
        f"| {copies} | {k.per_element:.1f} | {k.in_flight / 1024:.0f} |"
    )


def markdown(compiled: Iterable[Kernel]) -> str:
    lines = [
        "| kernel | takes | vectors | rows / stream | sm | registers | spilled | threads | resident "
        "| 128-bit loads (model) | stores (model) | copies | instr./element | reads in flight (KiB) |",
        "|---|---|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    return "\n".join([*lines, *map(row, sorted(compiled, key=lambda k: (k.arch, k.order)))]) + "\n"


def version() -> str:
    assert NVCC is not None, missing()
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV([\d.]+)", said)
    return f"nvcc {found[1] if found else said}"


def for_widths(compiled: Iterable[Kernel]) -> str:
    return forms.markdown({(k.name, k.types, k.constants): k.registers for k in compiled if k.arch == ARCH_ON_PAGE})


def page(compiled: Sequence[Kernel]) -> str:
    head = HEAD.format(version=version(), registers=REGISTER_FILE, threads=MOST_THREADS)
    return f"{head}{markdown(compiled)}\n{forms.HEAD}{for_widths(compiled)}"


HEAD = """# What the CUDA C++ kernels compile to

{version}, sm_90a, ahead of time; `python3 -m tools.codegen.cuda --write` renews this file.

**Nothing on this page is a measurement of speed.** The first table is read from the binary, the second follows from
it.

A kernel takes `plain` calls, which have nothing but a residual; those with an `epilogue` (in the forward also layer
scale, drop path and a second row stride); or `everything`. Those of `samples` take everything, with a weight, bias or
layer scale that is one vector for each sample. Vectors are those of 16 bytes of a row that a thread has
at a time. Threads are the most of a block, resident those of a multiprocessor in blocks of so many: {registers}
registers, which a thread takes in units of 8 (a warp 256), and at most {threads} threads. Shared memory does not
bind: the staged backward, which takes the most, has its two blocks of 512 threads in less than half of it.

128-bit loads, stores and copies to shared memory are those of one thread in the binary, beside what the byte model
asks for: every operand once on each of its paths, every result once, each copy for the first rows and in the loop.
Rows that are not aligned are read an element at a time. Spilled: bytes of local memory.

Instructions an element are those of the loop over rows (of `sums` over columns, of `sum_partials` and
`sum_sample_partials` over rows of partial sums), divided by the elements that a thread has in it. They are static,
NOPs left out: branches that a call does not take are counted (clusters, parameters in float32, every activation, the
waits that are kept behind the kernel's end), and so this is an upper bound; set-up, the end, and subroutines (the
division of unusual numbers) are not. A thread of the forward has one row and so no such loop: there it is the whole
program, with all of these, and its loops over tiles once.

Reads in flight are the rows that the resident threads have asked for before they wait: 16 bytes of each operand of
the rows' dtype, as many elements of the stream. Of the rows that come through shared memory, one or two are on their
way at a time; this is one. Parameters and statistics, which caches hold, are left out.

"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=[ARCH_ON_PAGE], choices=ARCHITECTURES, help="default: 90a")
    parser.add_argument("--sources", nargs="+", default=ON_PAGE, choices=PAIRS, help=f"default: {' '.join(ON_PAGE)}")
    parser.add_argument("--write", action="store_true", help="renew the page, which has the defaults")
    options = parser.parse_args(argv)
    if missing():
        print(missing(), file=sys.stderr)
        return 2
    architectures, sources = ([ARCH_ON_PAGE], ON_PAGE) if options.write else (options.arch, options.sources)
    with tempfile.TemporaryDirectory() as folder:
        compiled = [k for arch in architectures for k in compile_sources(sources, arch, Path(folder))]
    if not options.write:
        sys.stdout.write(markdown(compiled))
        if ARCH_ON_PAGE in architectures and "norm_bfloat16" in sources:
            sys.stdout.write("\n" + for_widths(compiled))
    written = (PAGE.name, page(compiled)) if options.write else ()
    return results.conclude(f"{len(compiled)} kernels", broken(compiled), *written)


if __name__ == "__main__":
    sys.exit(main())
