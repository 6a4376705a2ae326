"""Launch configurations of the norm kernels: which tile holds a row of N columns, for each direction and epilogue.

A tile is BLOCK_M rows by BLOCK_N columns on a number of warps; a row takes ceil(N / BLOCK_N) tiles, held in registers.
The limits on that count come from compiled register figures, not from timing: `tests/test_codegen.py` compiles every
choice for sm_80, sm_90 and sm_100 and holds it to zero spills, and `benchmarks/codegen.py` prints the figures.
BLOCK_N is 8 columns for each lane: one 128-bit access of a 16-bit dtype.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    block_m: int
    block_n: int
    chunks: int  # tiles a row is held in; 0 = the wide form, which reads the row again
    warps: int
    per_sm: int  # persistent programs for each multiprocessor (backward)


# (block_m, block_n, warps, most chunks): earlier rows win ties of padded width
_FORWARD = (
    (16, 64, 4, 1),
    (8, 128, 4, 1),
    (1, 1024, 4, 5),
    (4, 256, 4, 6),
    (1, 2048, 8, 4),
    (1, 4096, 16, 4),
    (1, 8192, 32, 4),
)
_FORWARD_WIDE = Config(1, 8192, 0, 32, 0)

# Backward keeps an accumulator for each parameter gradient beside x̂ and g, and Philox needs registers of its own, so
# the most chunks depend on the load: light (two accumulators), medium (three, or dropout), heavy (layer scale).
# (block_m, block_n, warps, most chunks light / medium / heavy)
_BACKWARD = (
    (16, 64, 4, (1, 1, 1)),
    (8, 128, 4, (1, 1, 1)),
    (1, 1024, 4, (5, 3, 2)),
    (4, 256, 4, (4, 3, 2)),
    (1, 2048, 8, (3, 2, 0)),
    (1, 4096, 16, (2, 0, 1)),
)
_SLAB = ((1, 1024, 4), (1, 1024, 4), (1, 1024, 4))  # light, medium, heavy
SUMS = Config(1, 2048, 0, 8, 0)
FINALIZE = Config(128, 32, 0, 8, 0)  # block_m: partials summed at a step

# Registers a thread: (for each chunk, besides), light / medium / heavy: as compiled, rounded up.
_BACKWARD_REGISTERS = ((47, 20), (60, 16), (84, 40))
_REGISTERS = 65536  # of a multiprocessor
_MAX_WARPS_PER_SM = 64


def _best(n: int, tiles: list[tuple[int, int, int, int]]) -> tuple[int, int, int, int] | None:
    """The tile that pads a row the least, as (block_m, block_n, chunks, warps)."""
    fitting = [(m, b, -(-n // b), w) for m, b, w, most in tiles if -(-n // b) <= most]
    return min(fitting, key=lambda t: t[1] * t[2], default=None)


def forward(n: int) -> Config:
    """Forward configuration for rows of n columns."""
    best = _best(n, list(_FORWARD))
    return _FORWARD_WIDE if best is None else Config(*best, per_sm=0)


def load(accumulators: int, dropout: bool, layer_scale: bool) -> int:
    """0 light, 1 medium, 2 heavy: how many registers the backward's epilogue takes."""
    return 2 if layer_scale else 1 if dropout or accumulators > 2 else 0


def backward(n: int, weight_class: int) -> Config:
    """Backward configuration; `chunks` 0 means column slabs after a kernel that sums the rows."""
    best = _best(n, [(m, b, w, most[weight_class]) for m, b, w, most in _BACKWARD])
    if best is None:
        block_m, block_n, warps = _SLAB[weight_class]
        return Config(block_m, block_n, 0, warps, _programs_that_fit(1, warps, weight_class))
    return Config(*best, per_sm=_programs_that_fit(best[2], best[3], weight_class))


def _programs_that_fit(chunks: int, warps: int, weight_class: int) -> int:
    each_chunk, fixed = _BACKWARD_REGISTERS[weight_class]
    fitting = _REGISTERS // (32 * warps * (each_chunk * chunks + fixed))
    return max(1, min(fitting, _MAX_WARPS_PER_SM // warps, 8))
