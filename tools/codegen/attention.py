"""What the Triton attention kernels compile to: registers, spills, matrix instructions. No GPU is needed.

    python3 -m tools.codegen.attention                      # sm_90, the modes most used: a table
    python3 -m tools.codegen.attention --arch 80 86 89 90 100 120 --cover 2 --dims all --dtypes all
    python3 -m tools.codegen.attention --write              # renew results/codegen_attention.md

What is compiled is what a launch would compile, as in `norms.py`; `attention_calls.py` enumerates the calls.
`--cover 1` compiles calls among which each value of each switch stands, `--cover 2` each pair of values, `--cover all`
every call (thousands of variants for a head dim and dtype). Triton keeps what it compiled, so a run that was stopped
goes on where it was. Exit status: 0; 1 when a kernel breaks the gate (see `faults`), which
`tests/tools/test_codegen_attention.py` holds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from fusednorm.providers.triton import attention_bwd_dkv as triton_attention_bwd
from fusednorm.providers.triton import attention_bwd_dq as triton_attention_bwd_dq
from fusednorm.providers.triton import attention_fwd as triton_attention_fwd
from fusednorm.providers.triton import host as triton_host
from fusednorm.providers.triton import launch as triton_launch
from tools.codegen import attention_calls as calls
from tools.codegen.compile import in_processes, number, opcodes_of, read_binary
from tools.codegen.results import conclude

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"upper": True},
    "key_mask": {"key_mask": True},
    "causal_key_mask": {"upper": True, "key_mask": True},
    "dropout": {"dropout": True},
    "causal_dropout": {"upper": True, "dropout": True},
}
DIMS = (64, 128)
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TABULATED = (80, 90, 100)
_KERNELS = {
    name: kernel
    for module in (triton_attention_fwd, triton_attention_bwd, triton_attention_bwd_dq)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}


class Variant(NamedTuple):
    """A launch, and the first call that was seen to make it."""

    launch: calls.Launch
    mode: str
    d: int
    dtype: str


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
    shared: int
    hgmma: int
    depbar: int  # waits for them
    instructions: int

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.wants} {self.mode} {self.dtype} D={self.d} sm_{self.arch} {self.tile}"


def faults(f: Figures) -> list[str]:
    """What is wrong with a variant: spills, too much shared memory, matrix instructions one at a time."""
    found = []
    if f.stack:
        found.append(f"spills: {f.stack} bytes of stack")
    available = triton_host.SHARED[divmod(f.arch, 10)]
    if f.shared > available:
        found.append(f"{f.shared} bytes of shared memory, there are {available}")
    if f.arch == 90 and f.dtype in ("bfloat16", "float16") and f.kernel != "attention_bwd_delta":
        if not f.hgmma:
            found.append("no asynchronous matrix instructions")
        elif 2 * f.depbar >= f.hgmma:
            found.append(f"{f.hgmma} matrix instructions wait {f.depbar} times")
    return found


def variants(named: Iterable[tuple[str, calls.Call]], arch: int) -> list[Variant]:
    """What the calls launch, each once."""
    found: dict[calls.Launch, Variant] = {}
    for name, call in named:
        for launch in calls.launches(call, divmod(arch, 10)):
            found.setdefault(launch, Variant(launch, name, call.d, call.dtype))
    return list(found.values())


def modes(names: Iterable[str], dims: Iterable[int], dtypes: Iterable[str]) -> list[tuple[str, calls.Call]]:
    """The modes most used, by name."""
    products = [(d, dtype, mode) for d in dims for dtype in dtypes for mode in names]
    apart = {True: {"logits": "apart"}, False: {}}  # float32's scale is
    return [
        (mode, calls.Call(d, d, dtype, **{**apart[dtype == "float32"], **MODES[mode]})) for d, dtype, mode in products
    ]


def described(call: calls.Call) -> tuple[str, calls.Call]:
    """A call with what it differs in from the plain one as its name."""
    own = [
        name if value is True else f"{name}={value}"
        for name, value in call._asdict().items()
        if name not in ("d", "dtype") and value != getattr(call.plain, name)
    ]
    return " ".join(own) or "full", call


def tile(launch: calls.Launch) -> str:
    """Queries by keys."""
    sizes = launch.constants[-1:] if launch.kernel.endswith("delta") else launch.constants[-2:]
    return " x ".join(map(str, sizes))


def spilled(usage: str, sass: str) -> int:
    """Bytes of stack, or how many instructions use it where that is more.

    ptxas may reserve a frame of 8 bytes and touch it nowhere: R1, its address, is then read by its own setting alone.
    Without a frame R1 is a register like others.
    """
    stack = number("STACK", usage)
    accesses = len(re.findall(r"\*/\s+(?:@\S+\s+)?(?:LDL|STL)\b", sass))
    addressed = re.search(r"\*/\s+(?:@\S+\s+)?[A-Z][\w.]*\s+(?!R1,)[^;]*\bR1\b", sass)
    return max(stack, accesses) if accesses or (addressed and stack) else 0


def figures(variant: Variant, arch: int) -> Figures:
    """Compile a variant for sm_<arch> and read the binary."""
    launch = variant.launch
    compiled = triton_launch.compile_kernel(
        _KERNELS[f"_{launch.kernel}_kernel"],
        launch.pointer_dtypes,
        launch.constants,
        warps=launch.warps,
        registers=launch.registers,
        aligned=launch.aligned,
        stages=launch.stages,
        target=GPUTarget("cuda", arch, 32),
    )
    usage, sass = read_binary(compiled.asm["cubin"])
    opcodes = opcodes_of(sass)

    def count(*starts: str) -> int:
        return sum(n for opcode, n in opcodes.items() if opcode.startswith(starts))

    return Figures(
        kernel=launch.kernel,
        wants=launch.wants,
        mode=variant.mode,
        d=variant.d,
        dtype=variant.dtype,
        arch=arch,
        tile=tile(launch),
        warps=launch.warps,
        stages=launch.stages,
        registers=number("REG", usage),
        stack=spilled(usage, sass),
        shared=compiled.metadata.shared,
        hgmma=count("HGMMA"),
        depbar=count("WARPGROUP.DEPBAR"),
        instructions=sum(opcodes.values()),
    )


def _compile(job: tuple[Variant, int]) -> Figures:
    return figures(*job)


def compile_all(named: Sequence[tuple[str, calls.Call]], architectures: Iterable[int]) -> list[Figures]:
    """Figures of every variant on every architecture, compiled by a process for each core."""
    jobs = [(variant, arch) for arch in architectures for variant in variants(named, arch)]
    return list(in_processes(_compile, jobs))


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


def worst(found: Iterable[tuple[str, Figures]]) -> str:
    """Of each kernel on each architecture under each Triton: how many variants, and the most that one takes."""
    lines = [
        "| kernel | sm | Triton | variants | most registers | most spilled | most shared memory | there is |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[str, int, str], list[Figures]] = {}
    for version, f in found:
        groups.setdefault((f.kernel, f.arch, version), []).append(f)
    for (kernel, arch, version), group in sorted(groups.items()):
        most = [max(getattr(f, name) for f in group) for name in ("registers", "stack", "shared")]
        available = triton_host.SHARED[divmod(arch, 10)]
        lines.append(f"| {kernel} | {arch} | {version} | {len(group)} | {' | '.join(map(str, most))} | {available} |")
    return "\n".join(lines) + "\n"


_HEADER = """# What the Triton attention kernels compile to

Triton {version}, bfloat16, ahead of time; `python3 -m tools.codegen.attention --write` renews this
file.

Spilled: bytes of local memory. HGMMA are the asynchronous matrix instructions of sm_90, DEPBAR the waits for them: as
many of one as of the other would mean that they run one at a time. Where dK and dV stand alone, each has a launch of
its own: the accumulators of both, and what dropout needs, do not fit in the registers together.

"""

_WORST = """
## Calls of every kind

Of calls that `--cover` chose, the most that any variant takes; `--write --figures FILE ...` reads what `--json` wrote.

"""


def read(path: Path) -> list[tuple[str, Figures]]:
    found = json.loads(path.read_text())
    return [(found["triton"], Figures(**f)) for f in found["figures"]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], metavar="SM", help="default: 90")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument(
        "--cover", choices=["heaviest", "1", "2", "all"], help="in place of --modes: calls of all kinds"
    )
    parser.add_argument("--dims", nargs="+", default=DIMS, metavar="D", help="numbers, or all: a size of each class")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=[*calls.DTYPES, "all"])
    parser.add_argument("--json", type=Path, help="write the figures here instead of a table")
    parser.add_argument("--write", action="store_true", help="renew benchmarks/results/codegen_attention.md")
    parser.add_argument("--figures", type=Path, nargs="+", default=[], help="with --write: summarise these too")
    options = parser.parse_args(argv)
    dims = calls.head_dims() if "all" in options.dims else [int(d) for d in options.dims]
    dtypes = list(calls.DTYPES) if "all" in options.dtypes else options.dtypes
    if options.cover and not options.write:
        named = [described(call) for call in calls.chosen(dims, dtypes, options.cover)]
    else:
        named = modes(options.modes, dims, dtypes)
    results = compile_all(named, TABULATED if options.write else options.arch)
    page, text = None, ""
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "figures": [asdict(f) for f in results]}))
    elif options.write:
        page = "codegen_attention.md"
        covered = [pair for file in options.figures for pair in read(file)]
        more = _WORST + worst(covered) if covered else ""
        text = _HEADER.format(version=triton.__version__) + markdown(results) + more
    else:
        sys.stdout.write(markdown(results))
    broken = [f"{f.name}: {fault}" for f in results for fault in faults(f)]
    return conclude(f"{len(results)} variants", broken, page, text)


if __name__ == "__main__":
    sys.exit(main())
