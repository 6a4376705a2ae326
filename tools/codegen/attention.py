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

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton

from fusednorm.providers.triton import host as triton_host
from tools.codegen import attention_calls as calls
from tools.codegen import results
from tools.codegen.compile import Launch, in_processes, number, opcodes_of, read_binary, spilled

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"upper": True},
    "key_mask": {"key_mask": True},
    "causal_key_mask": {"upper": True, "key_mask": True},
    "dropout": {"dropout": True},
    "causal_dropout": {"upper": True, "dropout": True},
    "few": {"few": True},
    "few_causal_key_mask": {"upper": True, "lower_right": True, "key_mask": True, "few": True},
}
DIMS = (64, 128)
WITHOUT_PRODUCTS = ("attention_bwd_delta", "attention_fwd_merge")
TABULATED = (80, 90, 100)


class Variant(NamedTuple):
    """A launch, and the first call that was seen to make it."""

    launch: Launch
    mode: str
    d: int
    dtype: str

    @property
    def wants(self) -> str:
        """Of the kernel's results, where a launch leaves out some."""
        names = ("dk", "dv") if self.launch.kernel.endswith("dkv") else ()
        return "+".join(name for name, dtype in zip(names, self.launch.pointer_dtypes[-2:]) if dtype is not None)


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
    if f.arch == 90 and f.dtype in ("bfloat16", "float16") and f.kernel not in WITHOUT_PRODUCTS:
        if not f.hgmma:
            found.append("no asynchronous matrix instructions")
        elif 2 * f.depbar >= f.hgmma:
            found.append(f"{f.hgmma} matrix instructions wait {f.depbar} times")
    return found


def variants(named: Iterable[tuple[str, calls.Call]], arch: int) -> list[Variant]:
    """What the calls launch, each once."""
    found: dict[Launch, Variant] = {}
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


def tile(launch: Launch) -> str:
    """Queries by keys; of delta queries, and of what merges splits these."""
    sizes = launch.constants[-1:] if launch.kernel in WITHOUT_PRODUCTS else launch.constants[-2:]
    return " x ".join(map(str, sizes))


def figures(variant: Variant, arch: int) -> Figures:
    """Compile a variant for sm_<arch> and read the binary."""
    launch = variant.launch
    compiled = launch.compiled(arch)
    usage, sass = read_binary(compiled.asm["cubin"])
    opcodes = opcodes_of(sass)

    def count(*starts: str) -> int:
        return sum(n for opcode, n in opcodes.items() if opcode.startswith(starts))

    return Figures(
        kernel=launch.kernel,
        wants=variant.wants,
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


_HEADER = f"""# What the Triton attention kernels compile to

Triton {triton.__version__}, bfloat16, ahead of time; `python3 -m tools.codegen.attention --write` renews this
file.

Spilled: bytes of local memory. HGMMA are the asynchronous matrix instructions of sm_90, DEPBAR the waits for them: as
many of one as of the other would mean that they run one at a time. Where dK and dV stand alone, each has a launch of
its own: the accumulators of both, and what dropout needs, do not fit in the registers together.

"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = results.parser(__doc__, "codegen_attention.md")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], metavar="SM", help="default: 90")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument(
        "--cover", choices=["heaviest", "1", "2", "all"], help="in place of --modes: calls of all kinds"
    )
    parser.add_argument("--dims", nargs="+", default=DIMS, metavar="D", help="numbers, or all: a size of each class")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=[*calls.DTYPES, "all"])
    options = parser.parse_args(argv)
    dims = calls.head_dims() if "all" in options.dims else [int(d) for d in options.dims]
    dtypes = list(calls.DTYPES) if "all" in options.dtypes else options.dtypes
    if options.cover and not options.write:
        named = [described(call) for call in calls.chosen(dims, dtypes, options.cover)]
    else:
        named = modes(options.modes, dims, dtypes)
    architectures = TABULATED if options.write else options.arch
    found = list(in_processes(figures, [(v, arch) for arch in architectures for v in variants(named, arch)]))
    return results.finish(options, found, faults, markdown(found), _HEADER)


if __name__ == "__main__":
    sys.exit(main())
