"""What follows for each width from what the CUDA norm kernels compile to: a table of forms, blocks and bytes.

Arithmetic on compiled figures, for a multiprocessor as the GPU's documentation describes it; nothing is measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.cases import OPS
from fusednorm.providers.triton.host import ceil

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
REGISTER_FILE, MOST_THREADS, MOST_BLOCKS, WARP = 65536, 2048, 32, 32  # of a multiprocessor
PROCESSORS = 132  # of an H100 or H200
BANDWIDTH = 4.3e12  # bytes a second that an H200 is assumed to copy at
INPUT_BYTES = 64 << 20
WIDTHS = tuple(1 << k for k in range(8, 19))
OPERATION = "add_layer_norm"
N_SUMS = 2  # of the weight's and the bias' gradient
ITEM_BYTES, SUM_BYTES = 2, 4


Registers = Mapping[tuple[str, tuple[str, ...], tuple[int, ...]], int]  # of a kernel's name, types and constants


class Form(NamedTuple):
    """How threads share a row; see csrc/cuda/support/args.h."""

    chunks: int
    threads: int
    rows: int
    ranks: int
    tiles: int

    @property
    def block(self) -> int:
        return self.threads * self.rows


def resident_blocks(registers: int, threads: int) -> int:
    """Blocks on a multiprocessor: its registers, handed out 256 a warp, its threads and its places for blocks."""
    warps = ceil(threads, WARP)
    a_warp = ceil(registers, 8) * 8 * WARP
    return min(REGISTER_FILE // (a_warp * warps), MOST_THREADS // (warps * WARP), MOST_BLOCKS)


def constant(header: str, name: str) -> int:
    """A number of csrc/cuda."""
    found = re.search(rf"\b{name} = (\d+)", (CUDA / header).read_text())
    if found is None:
        raise RuntimeError(f"csrc/cuda/{header} has no {name}")
    return int(found[1])


def load_library() -> None:
    """The emulation of the CUDA library, if nobody has loaded it: it chooses forms without a GPU."""
    if not hasattr(torch.ops.fusednorm_cuda, "emulate"):
        from tests.helpers.emulated import build_provider

        torch.ops.load_library(str(build_provider(sanitized=False)))


def forms(n: int) -> dict[str, Form]:
    """The table's form of each kernel for aligned rows of n columns in bfloat16, on a GPU with clusters."""
    torch.ops.fusednorm_cuda.emulate(128, 512, 8, PROCESSORS, 1)
    lines = torch.ops.fusednorm_cuda.forms(torch.empty(1, n, dtype=torch.bfloat16), True).splitlines()
    return {kernel: Form(*map(int, numbers)) for kernel, *numbers in map(str.split, lines)}


def programs(form: Form, n_rows: int, processors: int = PROCESSORS) -> int:
    """Blocks, clusters or sets of slabs that visit a plain backward's rows in turns, as support/forms.h counts them.

    Of clusters the most there can be: the launch asks the GPU, whose groups of multiprocessors may leave a rest.
    """
    if form.rows > 1 and ceil(n_rows, form.rows) < processors:
        raise ValueError(f"{n_rows} rows are so few that the table puts fewer in a block")
    fitting = REGISTER_FILE // (constant("norm/norm_table.h", "kPlain") * form.block)
    blocks = processors * max(1, min(fitting, constant("support/forms.h", "kProgramsPerProcessor")))
    return max(1, min(blocks // (form.ranks * form.tiles), ceil(n_rows, form.rows), 65535))


def partial_bytes(form: Form, n_rows: int, n: int, processors: int = PROCESSORS) -> int:
    """Of the partial sums of the parameters' gradients, which are written once and read once."""
    return N_SUMS * programs(form, n_rows, processors) * n * SUM_BYTES


class Width(NamedTuple):
    """What follows at one width in one direction."""

    n: int
    n_rows: int
    direction: str
    form: Form
    at_a_time: int  # blocks, or clusters
    visited: int  # rows, by each
    moved: int
    partials: int  # bytes written and read
    again: int  # bytes of rows that are read again
    launches: int

    @property
    def floor(self) -> float:
        """Microseconds."""
        return 1e6 * self.moved / BANDWIDTH

    @property
    def text(self) -> str:
        f = self.form
        parts = [f"{f.rows} x {f.threads} threads x {f.chunks}"]
        if f.ranks > 1:
            parts.append(f"cluster of {f.ranks}")
        if f.tiles > 1:
            parts.append(f"{f.tiles} {'tiles' if self.direction == 'forward' else 'slabs'}")
        return ", ".join(parts)

    def share(self, some: int) -> str:
        return f"{100 * some / self.moved:.1f} %" if some else ""


def widths(registers: Registers) -> list[Width]:
    found = []
    load_library()
    for n in WIDTHS:
        n_rows, chosen = INPUT_BYTES // ITEM_BYTES // n, forms(n)
        plain = {"forward": ("fwd", (chosen["forward"].chunks, 0, 1)), "backward": ("bwd", (0, 0))}
        for direction, (which, constants) in plain.items():
            form = chosen[direction]
            kernel = f"{OPERATION}_{which}", ("BFloat16", "BFloat16"), constants
            blocks = PROCESSORS * resident_blocks(registers[kernel], form.block)
            found.append(_width(n, n_rows, direction, form, blocks))
    return found


def _width(n: int, n_rows: int, direction: str, form: Form, blocks: int) -> Width:
    moved = OPS[OPERATION].bytes_moved((n_rows, n), ITEM_BYTES, direction)
    several = form.tiles > 1
    if direction == "forward":
        at_a_time = min(blocks // form.ranks, ceil(n_rows, form.rows))
        return Width(n, n_rows, direction, form, at_a_time, form.rows, moved, 0, INPUT_BYTES * several, 1)
    count = programs(form, n_rows)
    at_a_time = min(count * form.tiles, blocks // form.ranks)
    visited = ceil(n_rows, count * form.rows) * form.rows
    partials = 2 * partial_bytes(form, n_rows, n)
    return Width(
        n, n_rows, direction, form, at_a_time, visited, moved, partials, 2 * INPUT_BYTES * several, 2 + several
    )


HEAD = f"""## What follows for each width

add + LayerNorm in bfloat16, with weight and bias, on {INPUT_BYTES >> 20} MiB of x. The form is the one that
`csrc/cuda/norm/norm_table.h` chooses: rows of a block x threads of a row x vectors a thread. At a time: the blocks that
are resident on {PROCESSORS} multiprocessors; of clusters it is the most, as the GPU's groups of multiprocessors may
leave a rest. Each visits so many rows, or fewer. MB are those of `benchmarks/cases`, the least that must move, and
the floor is their time at {BANDWIDTH / 1e12} TB/s, **an assumed copy bandwidth of an H200, which this project has not
measured**. No kernel is said to be that fast.

In percent of these bytes, what moves besides: partial sums, written and read, and rows that are read again (z by a
forward in tiles; cotangent and z by a backward in slabs). Caches may hold either.

"""


def markdown(registers: Registers) -> str:
    lines = [
        "| width | rows | direction | form | at a time | rows each | MB | floor (us) | partial sums | read again "
        "| launches |",
        "|--:|--:|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for w in widths(registers):
        lines.append(
            f"| {w.n} | {w.n_rows} | {w.direction} | {w.text} | {w.at_a_time}{' clusters' * (w.form.ranks > 1)} "
            f"| {w.visited} | {w.moved / 1e6:.1f} | {w.floor:.1f} | {w.share(w.partials)} | {w.share(w.again)} "
            f"| {w.launches} |"
        )
    return "\n".join(lines) + "\n"
