"""The code-generation gate of the CUDA kernels: what nvcc makes of them, without a GPU.

No spills, registers within what the table counts on, shared memory within a block's, and on the aligned path exactly
the 16-byte accesses of the byte model. One architecture and two dtypes in every run, all of them by `make test-all`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
_TRITON = find_spec("triton")
_BUNDLED = Path(_TRITON.origin).parent / "backends/nvidia/bin/cuobjdump" if _TRITON and _TRITON.origin else None
CUOBJDUMP = shutil.which("cuobjdump") or (str(_BUNDLED) if _BUNDLED and _BUNDLED.exists() else None)

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump: neither CUDA's nor Triton's"),
]

STAGED, VECTORS, ELEMENTS = range(3)  # how the backward reads its rows
REGISTER_FILE, SHARED_BYTES = 65536, 48 << 10
SIZES = {"float": 4, "double": 8, "BFloat16": 2, "Float16": 2}
# of each source, what its kernels are made for: rows of a dtype, and of the stream beside it
PAIRS = {
    "activation": [("float",), ("double",), ("BFloat16",), ("Float16",)],
    "partials": [("float",), ("double",)],
    "norm_float32": [("float", "float")],
    "norm_float64": [("double", "double")],
    "norm_bfloat16": [("BFloat16", "BFloat16"), ("BFloat16", "float")],
    "norm_float16": [("Float16", "Float16"), ("Float16", "float")],
}


@dataclass(frozen=True)
class Kernel:
    """One instantiation: which it is, and what it compiled to."""

    arch: str
    name: str  # of the op, without "kernel"
    types: tuple[str, ...]
    constants: tuple[int, ...]
    registers: int
    stack: int
    spilled: int
    shared: int
    accesses: tuple[tuple[str, int], ...]  # global, by opcode
    local: int = 0

    @property
    def aligned(self) -> bool:
        if self.name == "add_layer_norm_bwd":
            return self.constants[0] != ELEMENTS
        return self.name != "sum_partials" and bool(self.constants[-1])

    @property
    def plain(self) -> bool:
        """Of rows and a stream of one dtype, with nothing but a residual: what most calls take."""
        switch = {
            "add_layer_norm_fwd": self.constants[1:] == (0, 1),
            "add_layer_norm_bwd": self.constants == (STAGED, 0),
        }
        return switch.get(self.name, False) and SIZES[self.types[0]] == SIZES[self.types[1]]

    @property
    def bounds(self) -> tuple[int, int]:
        """(most threads of a block, blocks on a multiprocessor) that the tables of csrc/cuda count on."""
        if self.name == "add_layer_norm_fwd":
            chunks, epilogue, aligned = self.constants
            double = self.types[0] == "double"
            two = self.plain and not double and self.arch != "80"
            blocks = {1: 8, 2: 3, 4: 1} if epilogue else {1: 8 if double else 10, 2: 4, 4: 2 if two else 1}
            return (128 * chunks, blocks[chunks]) if aligned else (512, 1)
        if self.name.startswith("bias_act_dropout"):
            return 256, 2 if self.types[0] == "double" else 4
        return (256, 2) if self.name == "add_layer_norm_bwd_sums" else (512, 2 if self.plain else 1)

    def model(self) -> tuple[int, int]:
        """16-byte loads and stores in the program: each operand once on each of its paths, each result once.

        A parameter is read in the rows' dtype, or in float32: two paths beside 16-bit rows. So are what was saved and
        the residual, and its gradient is stored, where the stream is wider than the rows. What comes through shared
        memory is counted by `staged`.
        """
        row = SIZES[self.types[0]]
        sums, parameter = 16 // row * max(row, 4) // 16, 1 if row >= 4 else 3
        if self.name == "bias_act_dropout_fwd":
            return 1 + parameter, 1
        if self.name == "bias_act_dropout_bwd":
            return 2 + parameter, 1 + sums
        s = SIZES[self.types[1]] // row
        saved = s if s == 1 else s + 1
        if self.name == "add_layer_norm_fwd":  # z or x again where a row takes several tiles
            parameters = 4 if self.constants[1] else 2
            return self.constants[0] * (1 + saved + parameters * parameter + s + 1), self.constants[0] * (s + 1)
        if self.name == "add_layer_norm_bwd_sums":
            return 1 + saved + 2 * parameter, 0
        if self.constants[0] == STAGED:
            return parameter, saved + 1 + (3 if self.constants[1] else 2) * sums
        return 1 + saved + 2 * parameter + s + 1 + 2 * parameter, saved + 1 + 4 * sums

    def staged(self) -> int:
        """16-byte copies of a row to shared memory; they stand in the program for the first two rows, and for each."""
        if self.name != "add_layer_norm_bwd" or self.constants[0] != STAGED:
            return 0
        return 1 + 2 * SIZES[self.types[1]] // SIZES[self.types[0]]


def faults(k: Kernel) -> list[str]:
    found = []
    if k.stack or k.spilled or k.local:
        found.append(f"spills: {k.stack} bytes of stack, {k.spilled} spilled, {k.local} local accesses")
    threads, blocks = k.bounds
    if -(-k.registers // 8) * 8 * threads * blocks > REGISTER_FILE:
        found.append(f"{k.registers} registers: {blocks} blocks of {threads} threads do not fit")
    if k.shared > SHARED_BYTES:
        found.append(f"{k.shared} bytes of shared memory")
    if k.aligned:
        counts = Counter(dict(k.accesses))
        wide = tuple(
            sum(n for op, n in counts.items() if op.startswith(kind + ".") and ".128" in op) for kind in ("LDG", "STG")
        )
        if wide != k.model():
            found.append(f"128-bit loads and stores: {wide}, not {k.model()}; all: {dict(counts)}")
        copies = counts["LDGSTS.E.BYPASS.128"]
        if copies not in (2 * k.staged(), 3 * k.staged()):  # the first two are a loop, or not
            found.append(f"copies to shared memory: {copies}, not 2 or 3 times {k.staged()}")
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
    return name, tuple(types), tuple(int(n) for n in re.findall(r"L(?:[ib]|NS_\d+AccessE)(\d+)", arguments + "E"))


def compile_kernels(source: str, arch: str, folder: Path) -> list[Kernel]:
    cubin = folder / f"{source}_{arch}.cubin"
    made = subprocess.run(
        [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", "-o", cubin, CUDA / f"{source}.cu"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    assert "warning" not in made.stderr, made.stderr
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    opcodes = {
        part.split()[0]: Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?((?:LDG|STG|LDL|STL)[\w.]*)", part))
        for part in sass.split("Function : ")[1:]
    }
    kernels = []
    for part in made.stderr.split("Compiling entry function '")[1:]:
        mangled = part.split("'")[0]
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert numbers is not None and registers is not None, part
        ops = opcodes[mangled]
        kernels.append(
            Kernel(
                arch,
                *_identity(mangled),
                registers=int(registers[1]),
                stack=int(numbers[1]),
                spilled=int(numbers[2]) + int(numbers[3]),
                shared=int(shared[1]) if shared else 0,
                accesses=tuple(sorted((op, n) for op, n in ops.items() if op[2] == "G")),
                local=sum(n for op, n in ops.items() if op[2] == "L"),
            )
        )
    return kernels


def expected(source: str) -> set[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Every instantiation there should be, and no other."""
    forms: dict[str, tuple[tuple[int, ...], ...]] = {
        "add_layer_norm_fwd": (*((chunks, epilogue, 1) for chunks in (1, 2, 4) for epilogue in (0, 1)), (2, 1, 0)),
        "add_layer_norm_bwd": ((STAGED, 0), (STAGED, 1), (VECTORS, 1), (ELEMENTS, 1)),
        "add_layer_norm_bwd_sums": ((1,), (0,)),
    }
    if source == "activation":
        forms = {"bias_act_dropout_fwd": ((1,), (0,)), "bias_act_dropout_bwd": ((1,), (0,))}
    elif source == "partials":
        forms = {"sum_partials": ((),)}
    return {(name, pair, c) for pair in PAIRS[source] for name in forms for c in forms[name]}


def hold(sources: list[str], arch: str, folder: Path) -> list[Kernel]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = dict(zip(sources, pool.map(lambda source: compile_kernels(source, arch, folder), sources)))
    for source, kernels in made.items():
        assert {(k.name, k.types, k.constants) for k in kernels} == expected(source)
    kernels = [k for each in made.values() for k in each]
    broken = [f"{k.name}{k.types}{k.constants}: {fault}" for k in kernels for fault in faults(k)]
    assert not broken, "\n".join(broken)
    return kernels


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> list[Kernel]:
    return hold(["norm_bfloat16", "activation", "norm_float32", "partials"], "90a", tmp_path_factory.mktemp("hopper"))


def test_cuda_gate_on_hopper(hopper):
    assert len(hopper) == 26 + 13 + 16 + 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
@pytest.mark.parametrize("source", PAIRS)
def test_cuda_gate_everywhere(source, arch, tmp_path):
    hold([source], arch, tmp_path)


def test_backward_keeps_to_the_registers_that_the_table_counts_on(hopper):
    """The table makes as many programs as fit at this many registers."""
    table = (CUDA / "norm_table.h").read_text()
    counted = {name: int(n) for name, n in re.findall(r"\bk(Plain|Staged|Everything) = (\d+)", table)}
    most = dict.fromkeys(counted, 0)
    for k in hopper:
        if k.name == "add_layer_norm_bwd":
            kind = "Plain" if k.plain else "Staged" if k.constants[0] == STAGED else "Everything"
            most[kind] = max(most[kind], k.registers)
    assert all(counted[kind] - 16 <= n <= counted[kind] for kind, n in most.items()), most


PLANTED = {
    "spills": {"spilled": 8},
    "do not fit": {"registers": 136},
    "shared memory": {"shared": 49 << 10},
    "128-bit loads": {"accesses": (("LDG.E.128", 7),)},
    "narrow accesses": {"accesses": (("LDG.E.U16", 8),)},
    "copies to shared memory": {"accesses": (("LDGSTS.E.BYPASS.128", 4),)},
}


@pytest.mark.parametrize("said", PLANTED)
def test_cuda_gate_fails_on_what_is_planted(said, hopper):
    kernel = next(k for k in hopper if k.name == "add_layer_norm_bwd" and k.plain)
    assert any(said in fault for fault in faults(replace(kernel, **PLANTED[said])))
