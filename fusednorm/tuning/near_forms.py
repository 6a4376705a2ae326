"""The forms that are tried beside the table's own, for the CUDA kernels and for Triton's.

CUDA: of every form that holds a row, the nearest to the table's: those that the fewest halvings and doublings of its
numbers lead to. What the kernels cannot take after all fails when it is called. None names a number of programs: which
one is best depends on the number of rows, and a form serves every number.

Triton: a few steps from the table's form, each of which holds the row too. A step keeps the registers that one element
has, so programs of more elements are assumed to be fewer on a multiprocessor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from ..providers.triton.config import MOST_ELEMENTS, MOST_WARPS, Config, Form, Pinned, elements
from ..providers.triton.host import ceil

MOST_CUDA, MOST_TRITON = 8, 5  # beside the table's own
RANKS = (1, 2, 4, 8)
_WARP = 32
_LEAST_BLOCK = 64  # threads; less leaves a multiprocessor's places for warps empty
_FORWARD_BLOCK = 128  # most threads of a forward block, for each vector a thread holds
_BACKWARD_BLOCK = 512
_SLABS = (128, 256, 512)  # threads of a block that sees a slab of the row
_MOST_ELEMENTS_BACKWARD = 40  # of a Triton program, a thread
_MOST_PER_SM = 16
_REREAD = (Config(1, 4096, 0, 16, 1), Config(1, 8192, 0, 32, 1))  # the row is read again where it could be held

T = TypeVar("T")


class CudaForwardForm(NamedTuple):
    """How threads share a row in the CUDA forward."""

    chunks: int  # vectors of 16 bytes a thread
    threads: int  # of a block for one row
    rows: int  # a block
    ranks: int  # blocks of a cluster for one row

    @property
    def text(self) -> str:
        return f"c{self.chunks} t{self.threads} r{self.rows} k{self.ranks}"


class CudaBackwardForm(NamedTuple):
    """The same of the backward, where a thread has one vector."""

    threads: int
    rows: int
    ranks: int

    @property
    def text(self) -> str:
        return f"t{self.threads} r{self.rows} k{self.ranks}"


def distance(a: Sequence[int], b: Sequence[int]) -> float:
    """Halvings and doublings from one to the other."""
    return sum(abs(math.log2(x / y)) for x, y in zip(a, b))


def nearest(table: tuple[int, ...], found: Iterable[T]) -> list[T]:
    """Without the table's own, and each once."""
    others = dict.fromkeys(form for form in found if form != table)
    return sorted(others, key=lambda form: distance(form, table))  # type: ignore[arg-type]


def _threads(vectors: int) -> int:
    """That hold so many vectors, one each: a power of two within a warp, else whole warps."""
    return 1 << (vectors - 1).bit_length() if vectors <= _WARP else ceil(vectors, _WARP) * _WARP


def _rows(threads: int, ranks: int, most: int, several_warps: bool = False) -> Iterator[int]:
    """How many rows may share a block: no cluster's, and in the forward only where one takes no more than a warp."""
    if ranks > 1 or (threads > _WARP and not several_warps):
        yield from [1] if _LEAST_BLOCK <= threads <= most else []
        return
    block = max(_LEAST_BLOCK, threads)
    while block <= most:
        yield block // threads
        block *= 2


def cuda_forward(vectors: int, table: CudaForwardForm, most_ranks: int = 8) -> list[CudaForwardForm]:
    """For rows of so many vectors. In one tile; four vectors a thread also in several, which read the row again."""
    found = []
    for chunks in (1, 2, 4):
        most = _FORWARD_BLOCK * chunks
        for ranks in (r for r in RANKS if r <= most_ranks):
            threads = _threads(ceil(vectors, chunks * ranks))
            if chunks == 4:
                threads = min(threads, most)
            found += [CudaForwardForm(chunks, threads, rows, ranks) for rows in _rows(threads, ranks, most)]
    return nearest(table, found)[:MOST_CUDA]


def cuda_backward(vectors: int, table: CudaBackwardForm, slabs: bool, most_ranks: int = 8) -> list[CudaBackwardForm]:
    """`slabs`: the table has blocks that see a part of the row each, and know nothing of one another."""
    held, cut = [], []
    for ranks in (r for r in RANKS if r <= most_ranks):
        threads = _threads(ceil(vectors, ranks))
        held += [CudaBackwardForm(threads, rows, ranks) for rows in _rows(threads, ranks, _BACKWARD_BLOCK, True)]
    if slabs or table.ranks > 1:
        cut = [CudaBackwardForm(threads, 1, 1) for threads in _SLABS if threads < vectors]
    return list(dict.fromkeys([*nearest(table, held), *nearest(table, cut)]))[:MOST_CUDA]


# --- Triton ---


def triton_text(form: Form) -> str:
    tile = f"[{form.block_m}, {form.block_n}] w{form.warps} p{form.per_sm}"
    return f"{form.chunks or 'wide'} x {tile}"


def _shapes(n: int, base: Config, most: int) -> Iterator[Config]:
    """Twice and half the warps, more rows, and what else is near, of at most so many elements a thread."""
    m, columns, chunks, warps, _ = base

    def step(block_m: int, block_n: int, warps: int) -> list[Config]:
        """The tile, as often as a row takes; nothing where no such program can be."""
        new = Config(block_m, block_n, ceil(n, block_n) if chunks else 0, warps, 1)
        if min(block_m, block_n, warps) < 1 or warps > MOST_WARPS or elements(new) > most * 32 * warps:
            return []
        return [new._replace(per_sm=max(1, base.per_sm * elements(base) // elements(new)))]

    yield from step(2 * m, columns, 2 * warps) if chunks == 1 else step(m, 2 * columns, 2 * warps)
    yield from step(m // 2, columns, warps // 2) if m > 1 else step(m, columns // 2, warps // 2)
    if m > 1:
        yield from step(2 * m, columns, warps)
    elif chunks:  # more rows on the same threads, each of which then has more of a row
        yield from step(4, columns // 4, warps) or step(2, columns // 2, warps)
    yield from step(m, columns, warps // 2)
    if chunks > 2:
        yield from step(m, 4 * columns, 4 * warps)
    if not chunks:
        yield from step(m, 2 * columns, warps)
        yield from step(m, columns // 2, warps)


def _pruned(base: Config, found: Iterable[Form]) -> list[Form]:
    return [form for form in dict.fromkeys(found) if form != base][:MOST_TRITON]


def triton_forward(n: int, base: Config) -> list[Form]:
    reread = [form for form in _REREAD if base.chunks and n > form.block_n]
    return _pruned(base, [*_shapes(n, base, MOST_ELEMENTS), *reread])


def triton_backward(n: int, base: Config, slab: Config) -> list[Form]:
    """`slab` is the form of rows that are too wide to be held.

    Programs are counted by multiprocessor, and a launch has no more of them than its rows fill. So half or twice the
    table's number may be kept for every number of rows.
    """
    others = [p for p in (base.per_sm // 2, 2 * base.per_sm) if 0 < p <= _MOST_PER_SM]
    programs = [Pinned(*base[:4], per_sm, base.registers) for per_sm in others]
    slabs = [slab] if base.chunks and n >= 4 * slab.block_n else []
    return _pruned(base, [*programs, *slabs, *_shapes(n, base, _MOST_ELEMENTS_BACKWARD)])
