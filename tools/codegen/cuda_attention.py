"""What nvcc makes of the attention kernels of csrc/cuda: registers, spills, matrix instructions. No GPU is needed.

    python3 -m tools.codegen.cuda_attention                                  # bfloat16, sm_90a
    python3 -m tools.codegen.cuda_attention --arch 80 120 --sources attention_float32
    python3 -m tools.codegen.cuda_attention --write                          # the page, in twenty minutes of one core

Exit status: 0; 1 when a kernel breaks the gate (see `faults`); 2 when nvcc or cuobjdump is missing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tools.codegen import results
from tools.codegen.cuda import compile_kernels, missing, version
from tools.codegen.cuda_forms import resident_blocks
from tools.codegen.cuda_kernel import SIZES, Kernel

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
SOURCES = {"attention_bfloat16": "BFloat16", "attention_float16": "Float16", "attention_float32": "float"}
NAMES = ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkv", "attention_bwd_dmask")
COLUMNS = (64, 128, 256)
PAGE = "codegen_cuda_attention.md"


def expected(source: str) -> set[tuple[str, int, bool]]:
    """(name, columns, whether it has every mask) of each instantiation there should be; a mask's gradient has one."""
    bodies = (True,) if SOURCES[source] == "float" else (False, True)
    return {
        (name, columns, general)
        for name in NAMES
        for columns in COLUMNS
        for general in ((True,) if name == "attention_bwd_dmask" else bodies)
    }


def identity(k: Kernel) -> tuple[str, int, bool]:
    return k.name, k.constants[0], k.name == "attention_bwd_dmask" or bool(k.constants[1])


def described(k: Kernel) -> tuple[str, ...]:
    """The first cells of its row: name, columns, what it takes, dtype."""
    name, columns, general = identity(k)
    return name, str(columns), "every mask" if general else "causality, windows", k.types[0]


def threads(k: Kernel) -> int:
    """Shape of csrc/cuda/attention/attention_shape.h: two warps where rows are a KiB, else four."""
    return 64 if SIZES[k.types[0]] * k.constants[0] >= 1024 else 128


PRODUCTS = {  # of a tile: logits' and their gradients', and those of weights
    "attention_fwd": (1, 1),
    "attention_bwd_dq": (2, 1),
    "attention_bwd_dkv": (2, 2),
    "attention_bwd_dmask": (2, 0),
}


def tile(k: Kernel) -> int:
    """Keys, or queries, at a time, as Shape of csrc/cuda/attention/attention_shape.h has them."""
    row = SIZES[k.types[0]] * k.constants[0]
    return (64 if row < 256 else 32) if k.name == "attention_fwd" else 16 if row >= 512 else 32


def of_warpgroups(k: Kernel) -> bool:
    """Whether its products are a warpgroup's: kOfWarpgroups of csrc/cuda/attention/attention_tile.cuh."""
    return k.arch == "90a" and SIZES[k.types[0]] == 2


def warp_products(k: Kernel) -> int:
    """`mma` of a warp's tile: each is 16 rows by 8 columns, and sums over 16."""
    columns = k.constants[0]
    delta = columns // 16 * 2 if k.name == "attention_bwd_dq" else 0  # is 16 x 16
    return delta + (0 if of_warpgroups(k) else sum(PRODUCTS[k.name]) * columns // 16 * (tile(k) // 8))


def group_products(k: Kernel) -> int:
    """`wgmma` of a block's tile: each is 64 rows by the tile or by 64 columns, and sums over 16."""
    columns, (logits, weights) = k.constants[0], PRODUCTS[k.name]
    return logits * columns // 16 + weights * (columns // 64) * (tile(k) // 16) if of_warpgroups(k) else 0


def faults(k: Kernel) -> list[str]:
    found = []
    if k.stack or k.spilled or k.local:
        found.append(f"spills: {k.stack} bytes of stack, {k.spilled} spilled, {k.local} local accesses")
    if not resident_blocks(k.registers, threads(k)):
        found.append(f"{k.registers} registers: no block of {threads(k)} threads fits")
    counts = dict(k.units)
    if not any(op.startswith("LDGSTS") and ".128" in op for op in counts):
        found.append(f"no 16-byte copies to shared memory: {counts}")
    matrices, loads, groups = (counted(k, start) for start in ("HMMA", "LDSM", "HGMMA"))
    begun, waits, fences = (counted(k, start) for start in ("WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR", "FENCE.VIEW.ASYNC"))
    if SIZES[k.types[0]] == 2:
        if (matrices, groups) != (warp_products(k), group_products(k)):
            wanted = f"{warp_products(k)} and {group_products(k)}"
            found.append(f"{matrices} matrix instructions of warps and {groups} of warpgroups, not {wanted}")
        if matrices > 2 * loads:
            found.append(f"{loads} loads of matrices for {matrices} products")
        each = sum(PRODUCTS[k.name]) if of_warpgroups(k) else 0
        if (begun, waits) != (each, each):
            found.append(f"products of warpgroups begin {begun} times and wait {waits} times, not {each} times")
        if fences != of_warpgroups(k):
            found.append(f"{fences} fences between copies and matrix instructions of warpgroups")
    elif matrices or groups:
        found.append(f"{matrices} matrix instructions, which round float32")
    return found


def counted(k: Kernel, start: str) -> int:
    return sum(n for op, n in k.units if op.startswith(start))


def compile_source(source: str, arch: str, folder: Path) -> list[Kernel]:
    """Every kernel of the source, none missing and none besides."""
    compiled = compile_kernels(source, arch, folder)
    assert {identity(k) for k in compiled} == expected(source)
    return compiled


def broken(compiled: Iterable[Kernel]) -> list[str]:
    return [f"{identity(k)} {k.types[0]} sm_{k.arch}: {fault}" for k in compiled for fault in faults(k)]


def markdown(compiled: Iterable[Kernel]) -> str:
    lines = [
        "| kernel | columns | takes | dtype | sm | registers | spilled | threads | blocks | wgmma | mma | ldmatrix |",
        "|---|--:|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for k in sorted(compiled, key=lambda k: (k.arch, NAMES.index(k.name), identity(k)[1:])):
        lines.append(
            f"| {' | '.join(described(k))} | {k.arch} "
            f"| {k.registers} | {max(k.stack, k.spilled)} | {threads(k)} | {resident_blocks(k.registers, threads(k))} "
            f"| {' | '.join(str(counted(k, start)) for start in ('HGMMA', 'HMMA', 'LDSM'))} |"
        )
    return "\n".join(lines) + "\n"


def registers(compiled: Sequence[Kernel]) -> str:
    """Of each kernel, an architecture a column."""
    architectures = sorted({k.arch for k in compiled}, key=lambda arch: int(arch.rstrip("a")))
    rows: dict[tuple[str, ...], dict[str, int]] = {}
    for k in sorted(compiled, key=lambda k: (k.types[0], NAMES.index(k.name), identity(k)[1:])):
        rows.setdefault(described(k), {})[k.arch] = k.registers
    lines = [
        "| " + " | ".join(["kernel", "columns", "takes", "dtype", *(f"sm_{arch}" for arch in architectures)]) + " |",
        "|---|--:|---|---|" + "--:|" * len(architectures),
    ]
    lines += ["| " + " | ".join([*row, *(str(of[arch]) for arch in architectures)]) + " |" for row, of in rows.items()]
    return "\n".join(lines) + "\n"


_HEADER = """# What the CUDA C++ attention kernels compile to

{version}, ahead of time; `python3 -m tools.codegen.cuda_attention --write` renews this file.

**Nothing on this page is a measurement of speed.** No kernel here spills, on any of the architectures.

Heads of up to 64, 128 and 256 columns share kernels. Those without every mask have causality and windows alone; in
float32 one body has all. Blocks are as many as a multiprocessor's registers hold. Matrix instructions of warpgroups
(`wgmma`) and of warps (`mma`) and loads for these (`ldmatrix`) are those in the binary of one tile. A `wgmma` is 64
rows by the keys of a tile or by 64 columns, an `mma` 16 by 8; each sums over 16.
`NOTES.md` derives from them which fraction of the matrix units' rate the kernels can reach at most.

## sm_90a

"""


def page(compiled: Sequence[Kernel]) -> str:
    shown = [k for k in compiled if k.arch == "90a" and k.types[0] != "Float16"]
    return _HEADER.format(version=version()) + markdown(shown) + "\n## Registers of a thread\n\n" + registers(compiled)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["90a"], choices=ARCHITECTURES, help="default: 90a")
    parser.add_argument("--sources", nargs="+", default=["attention_bfloat16"], choices=SOURCES)
    parser.add_argument("--write", action="store_true", help=f"renew {PAGE}, which has every architecture and source")
    options = parser.parse_args(argv)
    if missing():
        print(missing(), file=sys.stderr)
        return 2
    jobs = [(source, arch) for arch in options.arch for source in options.sources]
    if options.write:
        jobs = [(source, arch) for arch in ARCHITECTURES for source in SOURCES]
    from tqdm import tqdm

    compiled: list[Kernel] = []
    with tempfile.TemporaryDirectory() as folder:
        for source, arch in tqdm(jobs, desc="compiled", disable=len(jobs) == 1):
            compiled += compile_source(source, arch, Path(folder))
    if not options.write:
        sys.stdout.write(markdown(compiled))
    written = (PAGE, page(compiled)) if options.write else ()
    return results.conclude(f"{len(compiled)} kernels", broken(compiled), *written)


if __name__ == "__main__":
    sys.exit(main())
