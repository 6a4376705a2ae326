"""Compiling one variant of a Triton kernel ahead of time, reading its binary, and what counts as a fault."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from fusednorm.providers.triton import (
    activation_kernels,
    attention_bwd_dkv,
    attention_bwd_dq,
    attention_fwd,
    norm_bwd,
    norm_fwd,
    partials,
)
from fusednorm.providers.triton import launch as triton_launch
from fusednorm.providers.triton import norm_config as table


class Device(NamedTuple):
    """What programs share on a multiprocessor of one architecture."""

    shared: int  # bytes of shared memory
    warps: int
    registers: int = 65536


FEW = 12  # variants: they are compiled before another process has imported what it needs
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
    for module in (
        *(norm_fwd, norm_bwd, activation_kernels, partials),
        *(attention_fwd, attention_bwd_dkv, attention_bwd_dq),
    )
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}
Result = TypeVar("Result")
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Launch(NamedTuple):
    """A kernel as one call launches it: what the compiler is told."""

    kernel: str
    pointer_dtypes: tuple[torch.dtype | None, ...]
    constants: tuple[Any, ...]
    warps: int
    stages: int
    registers: int
    aligned: bool

    def compiled(self, arch: int) -> Any:
        """What Triton makes of it for sm_<arch>."""
        return triton_launch.compile_kernel(
            *(KERNELS[f"_{self.kernel}_kernel"], self.pointer_dtypes, self.constants),
            warps=self.warps,
            stages=self.stages,
            registers=self.registers,
            aligned=self.aligned,
            target=GPUTarget("cuda", arch, 32),
        )


def launches(take: Callable[[Launch], None]) -> AbstractContextManager[Any]:
    """A context in which nothing is launched: `take` gets what would be."""

    def launch(self: triton_launch.Variant, grid: Any, pointers: Any, numbers: Any) -> None:
        kernel = self.function.__name__.strip("_").removesuffix("_kernel")
        dtypes = tuple(None if t is None else t.dtype for t in pointers)
        take(Launch(kernel, dtypes, self.constants, self.warps, self.stages, self.registers, self.aligned))

    return mock.patch.object(triton_launch.Variant, "launch", launch)


class Variant(NamedTuple):
    """A launch of a call, and the 16-byte accesses that a thread must make for it by the byte model."""

    launch: Launch
    mode: str
    dtype: str
    n: int
    config: table.Config
    loads: int | None = None  # None: the model has no number for this call
    stores: int | None = None

    @property
    def kernel(self) -> str:
        return self.launch.kernel

    @property
    def compiled_as(self) -> tuple[Any, ...]:
        """What the compiler is told, and how many programs are to fit: two variants alike in it are one."""
        return self.launch, self.config


@dataclass
class Figures:
    """What one variant compiled to."""

    kernel: str
    mode: str
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
    stack: int = 0  # bytes spilled
    shared: int = 0
    instructions: int = 0
    per_element: float = 0.0
    loads: int = 0
    stores: int = 0
    narrow: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.mode} {self.dtype} N={self.n} sm_{self.arch}"


def faults(f: Figures) -> list[str]:
    """What is wrong with a variant.

    It does not compile, it spills, fewer programs fit on a multiprocessor than the table assumes, or it makes needless
    accesses to memory.
    """
    if f.failure:
        return [f"does not compile: {f.failure}"]
    found = []
    device = DEVICES[f.arch]
    if f.stack:
        found.append(f"spills: {f.stack} bytes of stack")
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
    launch, config = variant.launch, variant.config
    found = Figures(
        *(launch.kernel, variant.mode, variant.dtype, variant.n, arch),
        *(tile(config), launch.warps, config.per_sm, variant.loads, variant.stores),
    )
    try:
        compiled = launch.compiled(arch)
    except Exception as error:  # whatever it is, no launch would get further
        found.failure = f"{type(error).__name__}: {error}"[-300:]
        return found
    found.shared = compiled.metadata.shared
    usage, sass = read_binary(compiled.asm["cubin"], disassemble=variant.loads is not None)
    found.registers, found.stack = number("REG", usage), spilled(usage, sass)
    if variant.loads is not None:
        _count(found, config, sass)
    return found


def _count(found: Figures, config: table.Config, sass: str) -> None:
    """Count instructions and accesses to memory."""
    opcodes = opcodes_of(sass)
    wide, narrow = Counter[str](), Counter[str]()
    for opcode, count in opcodes.items():
        if opcode.startswith(("LDG", "STG")):
            (wide if ".128" in opcode else narrow)[opcode if ".128" not in opcode else opcode[:3]] += count
    elements = config.block_m * config.block_n * max(config.chunks, 1)
    found.instructions = sum(opcodes.values())
    found.per_element = round(found.instructions * 32 * found.warps / elements, 1)
    found.loads, found.stores, found.narrow = wide["LDG"], wide["STG"], dict(narrow)


def read_binary(cubin: bytes, disassemble: bool = True) -> tuple[str, str]:
    """What cuobjdump says of the resources, and the instructions.

    Disassembling takes as long as compiling. It is left out only where it is not asked for and there is no stack.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        return usage, tool("nvdisasm", file.name) if disassemble or number("STACK", usage) else ""


def spilled(usage: str, sass: str) -> int:
    """Bytes of stack, or how many instructions use it where that is more.

    ptxas may reserve a frame of 8 bytes and touch it nowhere: R1, its address, is then read by its own setting alone.
    Without a frame R1 is a register like others.
    """
    stack = number("STACK", usage)
    accesses = len(re.findall(r"\*/\s+(?:@\S+\s+)?(?:LDL|STL)\b", sass))
    addressed = re.search(r"\*/\s+(?:@\S+\s+)?[A-Z][\w.]*\s+(?!R1,)[^;]*\bR1\b", sass)
    return max(stack, accesses) if accesses or (addressed and stack) else 0


def opcodes_of(sass: str) -> Counter[str]:
    """How often each instruction stands in a program; a NOP fills up and is none."""
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass))
    opcodes.pop("NOP", None)
    return opcodes


def fused_sums(sass: str) -> list[str]:
    """Multiply-adds of a product and what a shuffle brought: lanes that add the same products differ by a rounding."""
    brought, found = set[str](), []
    for opcode, operands in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s+([^;]*);", sass):
        registers = re.findall(r"\bR(?:\d+|Z)\b", operands)
        if opcode.startswith("SHFL"):
            brought.add(registers[0])
        elif opcode.startswith(("FFMA", "DFMA")) and "RZ" not in registers[1:3] and registers[-1] in brought:
            found.append(f"{opcode} {operands.strip()}")
        if registers and registers[0] != "RZ" and not opcode.startswith(("SHFL", "ST")):
            written = 4 if ".128" in opcode else 2 if re.search(r"^D|^CS2R|\.64|WIDE", opcode) else 1
            brought -= {f"R{int(registers[0][1:]) + n}" for n in range(written)}
    return found


def number(name: str, usage: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no {name}: {usage}")
    return int(match[1])


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def tile(config: table.Config) -> str:
    return f"{max(config.chunks, 1)} x [{config.block_m}, {config.block_n}]"


def in_processes(
    figures: Callable[[Any, int], Result], jobs: Sequence[tuple[Any, int]], processes: int | None = None
) -> Iterator[Result]:
    """Figures of each variant for its architecture, in order, compiled by a process for each core; few by this one."""
    from tqdm import tqdm

    shown = functools.partial(tqdm, total=len(jobs), desc="compiled", file=sys.stderr)
    if (processes or len(jobs) // FEW) <= 1:
        yield from shown(itertools.starmap(figures, jobs))
        return
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        yield from shown(pool.map(figures, *zip(*jobs)))
