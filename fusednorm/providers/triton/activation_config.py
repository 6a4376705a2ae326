"""Launch configurations of the activation kernels: one tile of a row of N columns, and how many programs fit.

A lane has 16 elements in the forward, two 128-bit accesses of a 16-bit dtype, and 8 in the backward, which keeps an
accumulator for each besides two operands; half of that where addresses or values take twice the registers (rows that
are not aligned, float64). `tests/tools/test_codegen_norms.py` holds every choice to zero spills and to the programs
assumed to fit.
"""

from __future__ import annotations

from .config import Config

_WARPS = 4
_NARROWEST = 64  # columns of a tile
# programs on a multiprocessor, and so registers a thread: the most that compile without a spill
_FORWARD_PER_SM, _BACKWARD_PER_SM, _SMALL_PER_SM, _FLOAT64_PER_SM = 6, 8, 4, 2
_FORWARD_TWO_STRIDES_PER_SM, _BACKWARD_TWO_STRIDES_PER_SM = 5, 6  # each operand's offsets take registers of their own
_FORWARD_FLOAT32_PER_SM = 5  # GELU with dropout and a bias spills at 6, on sm_120 in rows of 8 columns


def _tile(n: int, elements: int) -> tuple[int, int]:
    """The widest tile that pads a row by an eighth at most, for neighbours to read on in a row; else the narrowest."""
    size = 32 * _WARPS * elements
    width = size
    while width > _NARROWEST and -(-n // width) * width > n + n // 8:
        width //= 2
    return size // width, width


def _per_sm(small: bool, itemsize: int, otherwise: int) -> int:
    return _FLOAT64_PER_SM if itemsize == 8 else _SMALL_PER_SM if small else otherwise


def forward(n: int, small: bool, itemsize: int, two_strides: bool) -> Config:
    """Forward configuration for rows of n columns; `small` for rows that are not aligned, and for float64."""
    aligned = (
        _FORWARD_TWO_STRIDES_PER_SM if two_strides else _FORWARD_FLOAT32_PER_SM if itemsize == 4 else _FORWARD_PER_SM
    )
    return Config(*_tile(n, 8 if small else 16), 1, _WARPS, _per_sm(small, itemsize, aligned))


def backward(n: int, small: bool, itemsize: int, two_strides: bool) -> Config:
    aligned = _BACKWARD_TWO_STRIDES_PER_SM if two_strides else _BACKWARD_PER_SM
    return Config(*_tile(n, 4 if small else 8), 1, _WARPS, _per_sm(small, itemsize, aligned))
