"""What the Triton attention kernels compile to: registers, spills, matrix instructions. No GPU is needed.

    PYTHONPATH=. python3 benchmarks/codegen_attention.py                      # sm_90, a table
    PYTHONPATH=. python3 benchmarks/codegen_attention.py --arch 80 90 100 --dims 64 128
    PYTHONPATH=. python3 benchmarks/codegen_attention.py --write              # renew results/codegen_attention.md

What is compiled is what a launch would compile, as in `codegen.py`. Exit status: 0; 1 when a kernel breaks the gate
(see `faults`), which `tests/test_codegen_attention.py` holds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from benchmarks.codegen import ARCHITECTURES, DTYPES, number, tool
from fusednorm.providers import (
    triton_attention,
    triton_attention_bwd,
    triton_attention_bwd_dq,
    triton_attention_fwd,
    triton_launch,
)

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "key_mask": {"key_mask": True},
    "causal_key_mask": {"causal": True, "key_mask": True},
    "dropout": {"dropout_p": 0.1},
    "causal_dropout": {"causal": True, "dropout_p": 0.1},
}
DIMS = (64, 128)
SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes that a program may have
_KERNELS = {
    name: kernel
    for module in (triton_attention_fwd, triton_attention_bwd, triton_attention_bwd_dq)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}
_LENGTH, _BATCH, _HEADS = 512, 2, 2


class Variant(NamedTuple):
    """One kernel as one call launches it."""

    kernel: str
    wants: str  # of the kernel's results, where a launch leaves out some
    mode: str
    d: int
    dtype: str
    pointer_dtypes: tuple[torch.dtype | None, ...]
    constants: tuple[Any, ...]
    warps: int
    stages: int
    registers: int
    aligned: bool


@dataclass
class Figures:
    """What one variant compiled to."""

    kernel: str
    wants: str
    mode: str
    d: int
    dtype: str
    arch: int
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int
    local: int  # instructions that read or write local memory
    shared: int
    hgmma: int
    depbar: int  # waits for them
    instructions: int

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.wants} {self.mode} {self.dtype} D={self.d} sm_{self.arch}".replace("  ", " ")


def faults(f: Figures) -> list[str]:
    """What is wrong with a variant: spills, too much shared memory, matrix instructions one at a time."""
    found = []
    if f.stack or f.local:
        found.append(f"spills: {f.stack} bytes of stack, {f.local} local accesses")
    if f.shared > SHARED[f.arch]:
        found.append(f"{f.shared} bytes of shared memory, there are {SHARED[f.arch]}")
    if f.arch == 90 and f.dtype in ("bfloat16", "float16") and f.kernel != "attention_bwd_delta":
        if not f.hgmma:
            found.append("no asynchronous matrix instructions")
        elif 2 * f.depbar >= f.hgmma:
            found.append(f"{f.hgmma} matrix instructions wait {f.depbar} times")
    return found


def note(d: int, mode: str, dtype: str, capability: tuple[int, int]) -> list[Variant]:
    """The variants that a forward and a backward launch."""
    noted: list[Variant] = []

    def launch(self: triton_launch.Variant, grid: Any, pointers: Any, numbers: Any) -> None:
        kernel = self.function.__name__.strip("_").removesuffix("_kernel")
        wants = "+".join(
            name for name, t in zip(("dk", "dv"), pointers[-2:]) if kernel.endswith("dkv") and t is not None
        )
        dtypes = tuple(None if t is None else t.dtype for t in pointers)
        options = (self.constants, self.warps, self.stages, self.registers, self.aligned)
        noted.append(Variant(kernel, wants, mode, d, dtype, dtypes, *options))

    q = torch.zeros(_BATCH, _HEADS, _LENGTH, d, dtype=DTYPES[dtype])
    switches = MODES[mode]
    p = switches.get("dropout_p", 0.0)
    arguments = (
        *(None, torch.ones(_BATCH, _LENGTH, dtype=torch.bool) if "key_mask" in switches else None),
        *(torch.zeros(1, dtype=torch.int64) if p else None, None, None, _LENGTH, _LENGTH),
        *(d**-0.5, p, switches.get("causal", False), False, -1, -1, 0.0),
    )
    replaced = triton_launch.Variant.launch, triton_attention.INTERPRETED
    triton_launch.Variant.launch, triton_attention.INTERPRETED = launch, capability  # type: ignore[method-assign]
    try:
        out, lse = triton_attention.attention_fwd(q, q, q, *arguments)
        triton_attention.attention_bwd(q, None, q, q, q, out, lse, *arguments, [True, True, True, False])
    finally:
        triton_launch.Variant.launch, triton_attention.INTERPRETED = replaced  # type: ignore[method-assign]
    return noted


def variants(modes: Iterable[str], dims: Iterable[int], dtypes: Iterable[str], arch: int) -> list[Variant]:
    found: dict[tuple[Any, ...], Variant] = {}
    for d, dtype, mode in ((d, dtype, mode) for d in dims for dtype in dtypes for mode in modes):
        for v in note(d, mode, dtype, divmod(arch, 10)):
            found.setdefault((v.kernel, *v[5:]), v)
    return list(found.values())


def tile(variant: Variant) -> str:
    """Queries by keys."""
    sizes = variant.constants[-1:] if variant.kernel.endswith("delta") else variant.constants[-2:]
    return " x ".join(map(str, sizes))


def figures(variant: Variant, arch: int) -> Figures:
    """Compile a variant for sm_<arch> and read the binary."""
    compiled = triton_launch.compile_kernel(
        _KERNELS[f"_{variant.kernel}_kernel"],
        variant.pointer_dtypes,
        variant.constants,
        warps=variant.warps,
        registers=variant.registers,
        aligned=variant.aligned,
        stages=variant.stages,
        target=GPUTarget("cuda", arch, 32),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", file.name)
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass))
    opcodes.pop("NOP", None)

    def count(*starts: str) -> int:
        return sum(n for opcode, n in opcodes.items() if opcode.startswith(starts))

    return Figures(
        kernel=variant.kernel,
        wants=variant.wants,
        mode=variant.mode,
        d=variant.d,
        dtype=variant.dtype,
        arch=arch,
        tile=tile(variant),
        warps=variant.warps,
        stages=variant.stages,
        registers=number("REG", usage),
        stack=number("STACK", usage),
        local=count("LDL", "STL"),
        shared=compiled.metadata.shared,
        hgmma=count("HGMMA"),
        depbar=count("WARPGROUP.DEPBAR"),
        instructions=sum(opcodes.values()),
    )


def _compile(job: tuple[Variant, int]) -> Figures:
    return figures(*job)


def compile_all(
    modes: Iterable[str], dims: Iterable[int], dtypes: Iterable[str], architectures: Iterable[int]
) -> list[Figures]:
    """Figures of every variant on every architecture, compiled by a process for each core."""
    modes, dims, dtypes = list(modes), list(dims), list(dtypes)
    jobs = [(variant, arch) for arch in architectures for variant in variants(modes, dims, dtypes, arch)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(tqdm(pool.map(_compile, jobs), total=len(jobs), desc="compiled", file=sys.stderr))


def row(kernel: str, wants: str, mode: str, d: int, arch: int, tile: str, warps: int, stages: int) -> str:
    """What of a line of the table follows without compiling."""
    return f"| {kernel} {wants}".rstrip() + f" | {mode} | {d} | {arch} | {tile} | {warps} | {stages} |"


def markdown(results: Sequence[Figures]) -> str:
    lines = [
        "| kernel | mode | D | sm | tile (queries x keys) | warps | stages | registers | spilled | shared memory "
        "| HGMMA / DEPBAR | instructions |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for f in results:
        start = row(f.kernel, f.wants, f.mode, f.d, f.arch, f.tile, f.warps, f.stages)
        waits = f"{f.hgmma} / {f.depbar}" if f.hgmma else ""
        lines.append(f"{start} {f.registers} | {f.stack} | {f.shared} | {waits} | {f.instructions} |")
    return "\n".join(lines) + "\n"


_HEADER = """# What the Triton attention kernels compile to

Triton {version}, bfloat16, ahead of time; `PYTHONPATH=. python3 benchmarks/codegen_attention.py --write` renews this
file.

Spilled: bytes of local memory. HGMMA are the asynchronous matrix instructions of sm_90, DEPBAR the waits for them: as
many of one as of the other would mean that they run one at a time. Where dK and dV stand alone, each has a launch of
its own: the accumulators of both, and what dropout needs, do not fit in the registers together.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], metavar="SM", help="default: 90")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, metavar="D")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--json", type=Path, help="write the figures here instead of a table")
    parser.add_argument("--write", action="store_true", help="renew benchmarks/results/codegen_attention.md")
    options = parser.parse_args()
    architectures = ARCHITECTURES if options.write else options.arch
    results = compile_all(options.modes, options.dims, options.dtypes, architectures)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "figures": [asdict(f) for f in results]}))
    elif options.write:
        path = Path(__file__).parent / "results" / "codegen_attention.md"
        path.write_text(_HEADER.format(version=triton.__version__) + markdown(results))
    else:
        sys.stdout.write(markdown(results))
    broken = [f"{f.name}: {fault}" for f in results for fault in faults(f)]
    print(f"{len(results)} variants, {len(broken)} faults", *broken, sep="\n", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
