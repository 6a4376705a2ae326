"""Compiling one variant of a Triton kernel ahead of time, reading its binary, and what counts as a fault."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from fusednorm.providers.triton import activation_kernels as triton_activation_kernels
from fusednorm.providers.triton import launch as triton_launch
from fusednorm.providers.triton import norm_bwd as triton_norm_bwd
from fusednorm.providers.triton import norm_config as table
from fusednorm.providers.triton import norm_fwd as triton_norm_fwd
from fusednorm.providers.triton import partials


class Device(NamedTuple):
    """What programs share on a multiprocessor of one architecture."""

    shared: int  # bytes of shared memory
    warps: int
    registers: int = 65536

    @property
    def shared_of_a_program(self) -> int:
        return self.shared - RESERVED


RESERVED = 1024  # bytes of shared memory that the system takes for each program
DEVICES = {
    80: Device(167936, 64),
    86: Device(102400, 48),
    89: Device(102400, 48),
    90: Device(233472, 64),
    100: Device(233472, 64),
    120: Device(102400, 48),
}
KERNELS = {
    name: kernel
    for module in (triton_norm_fwd, triton_norm_bwd, triton_activation_kernels, partials)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}
Job, Result = TypeVar("Job"), TypeVar("Result")
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Variant(NamedTuple):
    """One kernel as one call launches it, and the 16-byte accesses a thread must make for it by the byte model."""

    kernel: str
    mode: str
    layout: str
    dtype: str
    n: int
    pointer_dtypes: tuple[torch.dtype | None, ...]
    constants: tuple[Any, ...]
    warps: int
    registers: int
    aligned: bool
    config: table.Config
    loads: int | None = None  # None: the model has no number for this call
    stores: int | None = None

    @property
    def compiled_as(self) -> tuple[Any, ...]:
        """What the compiler is told, and how many programs are to fit: two variants alike in it are one."""
        return self.kernel, *self[5:11]


@dataclass
class Figures:
    """What one variant compiled to."""

    kernel: str
    mode: str
    layout: str
    dtype: str
    n: int
    arch: int
    tile: str
    warps: int
    per_sm: int
    model_loads: int | None
    model_stores: int | None
    failure: str = ""  # of the compiler
    registers: int = 0
    stack: int = 0
    local: int = 0  # instructions that read or write local memory
    shared: int = 0
    instructions: int = 0
    per_element: float = 0.0
    loads: int = 0
    stores: int = 0
    narrow: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.mode} {self.layout} {self.dtype} N={self.n} sm_{self.arch}"


def faults(f: Figures) -> list[str]:
    """What is wrong with a variant.

    It does not compile, it spills, fewer programs fit on a multiprocessor than the table assumes, or it makes needless
    accesses to memory.
    """
    if f.failure:
        return [f"does not compile: {f.failure}"]
    found = []
    device = DEVICES[f.arch]
    if f.stack or f.local:
        found.append(f"spills: {f.stack} bytes of stack, {f.local} local accesses")
    allocated = -(-f.registers // 8) * 8 * 32 * f.warps
    if allocated * f.per_sm > device.registers:
        fitting = device.registers // allocated
        found.append(f"{f.registers} registers: {fitting} programs fit, the table assumes {f.per_sm}")
    if f.warps * f.per_sm > device.warps:
        fitting = device.warps // f.warps
        found.append(f"{f.warps} warps: {fitting} programs fit, the table assumes {f.per_sm}")
    if (f.shared + RESERVED) * f.per_sm > device.shared:
        fitting = device.shared // (f.shared + RESERVED)
        found.append(f"{f.shared} bytes of shared memory: {fitting} programs fit, the table assumes {f.per_sm}")
    if f.model_loads is not None and (f.loads, f.stores) != (f.model_loads, f.model_stores):
        found.append(
            f"128-bit accesses: {f.loads} loads and {f.stores} stores, not {f.model_loads} and {f.model_stores}; "
            f"narrower: {f.narrow}"
        )
    return found


def figures(variant: Variant, arch: int) -> Figures:
    """Compile a variant for sm_<arch> and read the binary; its instructions only where the byte model has a number."""
    config = variant.config
    found = Figures(
        kernel=variant.kernel,
        mode=variant.mode,
        layout=variant.layout,
        dtype=variant.dtype,
        n=variant.n,
        arch=arch,
        tile=tile(config),
        warps=variant.warps,
        per_sm=config.per_sm,
        model_loads=variant.loads,
        model_stores=variant.stores,
    )
    try:
        compiled = triton_launch.compile_kernel(
            KERNELS[f"_{variant.kernel}_kernel"],
            variant.pointer_dtypes,
            variant.constants,
            warps=variant.warps,
            registers=variant.registers,
            aligned=variant.aligned,
            target=GPUTarget("cuda", arch, 32),
        )
    except Exception as error:  # whatever it is, no launch would get further
        found.failure = f"{type(error).__name__}: {error}"[-300:]
        return found
    found.shared = compiled.metadata.shared
    usage, sass = read_binary(compiled.asm["cubin"], disassemble=variant.loads is not None)
    found.registers, found.stack, found.local = (number(name, usage) for name in ("REG", "STACK", "LOCAL"))
    if sass:
        _count(found, variant, sass)
    return found


def _count(found: Figures, variant: Variant, sass: str) -> None:
    """Count instructions and accesses to memory."""
    opcodes = opcodes_of(sass)
    wide, narrow = Counter[str](), Counter[str]()
    for opcode, count in opcodes.items():
        if opcode.startswith(("LDG", "STG")):
            (wide if ".128" in opcode else narrow)[opcode if ".128" not in opcode else opcode[:3]] += count
    config = variant.config
    elements = config.block_m * config.block_n * max(config.chunks, 1)
    found.local += sum(count for opcode, count in opcodes.items() if opcode.startswith(("LDL", "STL")))
    found.instructions = sum(opcodes.values())
    found.per_element = round(found.instructions * 32 * variant.warps / elements, 1)
    found.loads, found.stores, found.narrow = wide["LDG"], wide["STG"], dict(narrow)


def read_binary(cubin: bytes, disassemble: bool = True) -> tuple[str, str]:
    """What cuobjdump says of the resources, and the instructions. Disassembling takes as long as compiling."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        return usage, tool("nvdisasm", file.name) if disassemble else ""


def opcodes_of(sass: str) -> Counter[str]:
    """How often each instruction stands in a program; a NOP fills up and is none."""
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass))
    opcodes.pop("NOP", None)
    return opcodes


def number(name: str, usage: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no {name}: {usage}")
    return int(match[1])


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def tile(config: table.Config) -> str:
    return f"{max(config.chunks, 1)} x [{config.block_m}, {config.block_n}]"


def _compile(job: tuple[Variant, int]) -> Figures:
    return figures(*job)


def compile_all(jobs: Sequence[tuple[Variant, int]], processes: int | None = None) -> Iterator[Figures]:
    """Figures of every variant for its architecture, compiled by a process for each core."""
    yield from in_processes(_compile, jobs, processes)


def in_processes(work: Callable[[Job], Result], jobs: Sequence[Job], processes: int | None = None) -> Iterator[Result]:
    """The result of each job, in order, by a process for each core."""
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from tqdm(pool.map(work, jobs), total=len(jobs), desc="compiled", file=sys.stderr)
