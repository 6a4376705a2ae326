"""What every Triton kernel shares: addresses of a tile, vectors along its columns, and the regenerated mask.

Absent arguments are None. LAYOUT says what is known of the operands: 0 = columns contiguous, every row on a 16-byte
boundary, with strides, N and the bases in units of VEC elements (the multiplication by VEC is what lets the compiler
use 128-bit accesses); 1 = columns contiguous; 2 = any strides. Outputs and what we kept are contiguous. ACC is the
dtype of every intermediate value.
"""

# fmt: off
# One line a group of arguments: one line an argument would bury the kernels under their own signatures.

from __future__ import annotations

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def row_offsets(
    rows, stride_outer, stride_row, rows_inner, ROWS_2D: tl.constexpr, LAYOUT: tl.constexpr, VEC: tl.constexpr,
):
    """Offset of each row's first element; a leading dimension that cannot be folded has a stride of its own."""
    if ROWS_2D:
        outer = rows // rows_inner
        offset = outer * stride_outer + (rows - outer * rows_inner) * stride_row
    else:
        offset = rows * stride_row
    if LAYOUT == 0:
        offset = offset * VEC
    return offset


@triton.jit
def tile_pointers(ptr, row_offset, cols, stride_col, LAYOUT: tl.constexpr):
    """Pointers to a tile, given its rows' offsets."""
    if LAYOUT == 2:
        return ptr + row_offset[:, None] + (cols.to(tl.int64) * stride_col)[None, :]
    else:
        return ptr + row_offset[:, None] + cols[None, :]


@triton.jit
def load_vector(ptr, offsets, cols, mask, ACC: tl.constexpr):
    """A parameter's columns, loaded at the tile's shape: a [1, N] load would be converted through shared memory.

    `offsets`: where each row's vector begins; zeros where all rows have one.
    """
    return tl.load(ptr + cols[None, :] + offsets[:, None], mask=mask, other=0.0).to(ACC)


@triton.jit
def keep_mask(seed, rows, first_col, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements of a tile are kept: one Philox call for four neighbouring columns."""
    quads = (first_col // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
    low = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (rows >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, zero + quads, zero + low, zero + high, zero, n_rounds=PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N)
    return words >= threshold
