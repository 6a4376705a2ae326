"""Launch configurations of the norm kernels: which tile holds a row of N columns, for each direction and epilogue.

A tile is BLOCK_M rows by BLOCK_N columns on a number of warps; a row takes ceil(N / BLOCK_N) tiles, held in registers.
The limits on that count come from compiled register figures, not from timing. `tests/tools/test_codegen_norms.py`
compiles choices for every architecture and fails on a spill; `tools/codegen/norms.py` and `norm_calls.py` print the
figures. One table serves all architectures: a multiprocessor has 65536 registers on each of them, and warps are counted
by the fewest.

An aligned tile has 8 columns for each lane: one 128-bit access of a 16-bit dtype. Where addresses or values take twice
the registers (rows that are not aligned, float64) it has 4: the "small" tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..forms import DIRECTIONS, Place
from .config import MAX_PROGRAMS, REGISTERS, Form
from .config import Config as Config

_Tile = tuple[int, int, int, tuple[int, ...]]

# (block_m, block_n, warps, most chunks light / heavy / wide parameters): earlier rows win ties of padded width. Heavy:
# with dropout, or of 32-bit rows. Wide parameters: three of 32 bits beside 16-bit rows.
_FORWARD = (
    (16, 64, 4, (1, 1, 1)),
    (8, 128, 4, (1, 1, 1)),
    (1, 1024, 4, (5, 5, 5)),
    (4, 256, 4, (5, 5, 5)),
    (2, 512, 4, (3, 3, 3)),
    (1, 2048, 8, (4, 4, 4)),
    (1, 4096, 16, (4, 4, 4)),
    (1, 8192, 16, (4, 3, 2)),
)
_FORWARD_SMALL = (
    (8, 64, 4, (1, 1, 1)),
    (4, 128, 4, (1, 1, 1)),
    (2, 256, 4, (2, 2, 2)),
    (1, 512, 4, (4, 4, 4)),
    (1, 1024, 8, (4, 4, 4)),
    (1, 2048, 16, (4, 3, 4)),
)
_FORWARD_WIDE = (1, 8192, 32)
_FORWARD_WIDE_SMALL = (1, 2048, 16)
_WARPS = 48  # that a multiprocessor of 8.6, 8.9 and 12.0 holds; of 8.0, 9.0 and 10.0 it is 64
_FORWARD_WARPS = 16  # a multiprocessor should hold at least as many: 128 registers a thread

# Backward keeps an accumulator for each parameter gradient beside x̂ and g, and Philox needs registers of its own, so
# the most chunks depend on the load: light (two accumulators), medium (three, or dropout, 32-bit rows, or x̂ rebuilt
# from the output), several (two of dropout, 32-bit rows and x̂ rebuilt), heavy (all three; layer scale; dropout of rows
# wider than normed).
# (block_m, block_n, warps, most chunks light / medium / several / heavy)
_BACKWARD = (
    (16, 64, 4, (1, 1, 1, 1)),
    (8, 128, 4, (1, 1, 1, 1)),
    (1, 1024, 4, (5, 3, 3, 2)),
    (4, 256, 4, (4, 3, 3, 2)),
    (1, 2048, 8, (3, 2, 2, 0)),
    (1, 4096, 16, (2, 0, 0, 1)),
)
_BACKWARD_SMALL = (
    (4, 64, 4, (1, 1, 1, 1)),
    (2, 128, 4, (1, 1, 1, 1)),
    (2, 256, 4, (1, 1, 1, 1)),
    (1, 512, 4, (2, 2, 2, 1)),
    (1, 1024, 8, (2, 2, 1, 1)),
)
# Rows with two strides: the offsets of each operand take registers of their own, and a division. And vectors of samples
# beside dropout.
_BACKWARD_TWO_STRIDES: tuple[_Tile, ...] = (*_BACKWARD[:-1], (1, 4096, 16, (2, 0, 0, 0)))
_BACKWARD_SMALL_TWO_STRIDES: tuple[_Tile, ...] = (
    (4, 64, 4, (1, 1, 1, 1)),
    (2, 128, 4, (1, 1, 1, 1)),
    (1, 256, 4, (1, 1, 1, 1)),
    (1, 512, 4, (2, 1, 1, 1)),
    (1, 1024, 8, (2, 1, 1, 1)),
)
_SLAB = (1, 1024, 4)
_SLAB_SMALL = (1, 512, 4)
SUMS = Config(1, 2048, 0, 8, 2)
SUMS_FLOAT64 = Config(1, 1024, 0, 8, 2)

# Registers a thread in the backward: (for each chunk, besides), for each load: as compiled, rounded up.
_BACKWARD_REGISTERS = ((47, 20), (60, 28), (60, 44), (84, 48))
_BACKWARD_REGISTERS_SMALL = ((80, 40), (96, 40), (84, 88), (128, 56))
_OFFSETS_REGISTERS = (24, 40)  # besides them, aligned / small: of rows with two strides, and of vectors of samples


def _best(n: int, tiles: tuple[_Tile, ...], weight_class: int) -> tuple[int, int, int, int] | None:
    """The tile that pads a row the least, as (block_m, block_n, chunks, warps)."""
    fitting = [(m, b, -(-n // b), w) for m, b, w, most in tiles if -(-n // b) <= most[weight_class]]
    return min(fitting, key=lambda t: t[1] * t[2], default=None)


# What takes the place of the tables' configurations: those that are tried (`norm.try_forms`), then those that a GPU's
# user keeps. Dispatch sets `kept`, which is given the GPU's index, or -1 for a CPU.
tried: Mapping[Place, Form] = {}
kept: Callable[[int], Mapping[Place, Form]] | None = None


def chosen(place: Place, index: int, layout: tuple[int, int, bool], own: Config) -> Form:
    """The configuration of a launch; `own` is the table's. Rows that are not aligned, or have two strides, keep it."""
    if layout[0] != 0 or layout[2]:
        return own
    return tried.get(place) or (kept(index).get(place) if kept is not None else None) or own


def check(place: Place, form: Form) -> None:
    """Raise ValueError if a form does not hold the rows that it is to be for."""
    width = form.chunks * form.block_n
    if place.direction not in DIRECTIONS or place.itemsize not in (2, 4, 8) or not 0 <= place.load <= 3:
        raise ValueError(f"{place}: there is no such kernel")
    if place.columns < 1 or (form.chunks and not width - form.block_n < place.columns <= width):
        raise ValueError(f"{form} does not hold a row of {place.columns} columns, or has tiles without any")


def itemsize(wide_rows: bool, float64: bool) -> int:
    """Of a place."""
    return 8 if float64 else 4 if wide_rows else 2


def forward_load(dropout: bool, wide_rows: bool, wide_parameters: bool) -> int:
    """0 light, 1 heavy, 2 with wide parameters: how many registers a forward takes."""
    return 1 if dropout or wide_rows else 2 if wide_parameters else 0


def forward(
    n: int, dropout: bool, wide_rows: bool, wide_parameters: bool, small: bool, per_sample: bool = False
) -> Config:
    """Forward configuration for rows of n columns; `small` for rows that are not aligned, and for float64."""
    block_m, block_n, warps = _FORWARD_WIDE_SMALL if small else _FORWARD_WIDE
    weight_class = forward_load(dropout, wide_rows, wide_parameters) or int(per_sample)
    best = _best(n, _FORWARD_SMALL if small else _FORWARD, weight_class) or (block_m, block_n, 0, warps)
    # float64 of strided rows with dropout and vectors of samples: 128 registers would spill two
    warps = _FORWARD_WARPS // 2 if small and dropout and per_sample else _FORWARD_WARPS
    return Config(*best, per_sm=max(1, warps // best[3]))


def load(
    accumulators: int, dropout: bool, layer_scale: bool, wide_rows: bool, narrowed: bool, from_normed: bool
) -> int:
    """0 light, 1 medium, 2 several, 3 heavy: how many registers the backward's epilogue takes.

    `narrowed`: normed has fewer bits than x.
    """
    together = dropout + wide_rows + from_normed
    if layer_scale or (dropout and narrowed) or together > 2:
        return 3
    if together > 1:
        return 2
    return 1 if dropout or accumulators > 2 or wide_rows or from_normed else 0


def backward(n: int, weight_class: int, small: bool, two_strides: bool = False, per_sample: bool = False) -> Config:
    """Backward configuration; `chunks` 0 means column slabs after a kernel that sums the rows."""
    tiles: tuple[_Tile, ...]
    if small:
        tiles = _BACKWARD_SMALL_TWO_STRIDES if two_strides else _BACKWARD_SMALL
        (block_m, block_n, warps), registers = _SLAB_SMALL, _BACKWARD_REGISTERS_SMALL[weight_class]
    else:
        tiles = _BACKWARD_TWO_STRIDES if two_strides else _BACKWARD
        (block_m, block_n, warps), registers = _SLAB, _BACKWARD_REGISTERS[weight_class]
    best = _best(n, tiles, weight_class) or (block_m, block_n, 0, warps)
    each_chunk, besides = registers
    besides += _OFFSETS_REGISTERS[small] * (two_strides + per_sample)
    fitting = REGISTERS // (32 * best[3] * (each_chunk * max(best[2], 1) + besides))
    return Config(*best, per_sm=max(1, min(fitting, _WARPS // best[3], MAX_PROGRAMS)))
