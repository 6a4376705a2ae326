"""What the Triton norm kernels share: addresses of a tile, parameters, and the regenerated masks.

Absent arguments are None. LAYOUT says what is known of the operands: 0 = columns contiguous, every row on a 16-byte
boundary, with strides, N and the bases in units of VEC elements (the multiplication by VEC is what lets the compiler
use 128-bit accesses); 1 = columns contiguous; 2 = any strides. Outputs and what we kept are contiguous. ACC is the
dtype of every intermediate value: that of the statistics.
"""

# fmt: off
# One line a group of arguments: one line an argument would bury the kernels under their own signatures.

from __future__ import annotations

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def divide(a, b):
    """Correctly rounded: a GPU's float32 division is not, unless it is asked."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def inverse_sqrt(a):
    """Two correct roundings: a GPU's own float32 rsqrt takes a subnormal number for zero."""
    if a.dtype == tl.float32:
        return tl.div_rn(tl.full(a.shape, 1.0, tl.float32), tl.sqrt_rn(a))
    return tl.rsqrt(a)


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
def load_vector(ptr, rows, cols, mask, ACC: tl.constexpr):
    """A parameter's columns, loaded at the tile's shape: a [1, N] load would be converted through shared memory."""
    return tl.load(ptr + cols[None, :] + tl.zeros_like(rows)[:, None], mask=mask, other=0.0).to(ACC)


@triton.jit
def load_weight(weight_ptr, rows, cols, mask, ZERO_CENTERED: tl.constexpr, ACC: tl.constexpr):
    weight = load_vector(weight_ptr, rows, cols, mask, ACC)
    if ZERO_CENTERED:
        weight += 1.0
    return weight


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


@triton.jit
def draw_path_factor(seed, samples, threshold, scale, BLOCK_M: tl.constexpr):
    """Drop path's factor for each row of a tile: 0, or 1/(1-p)."""
    zero = tl.zeros([BLOCK_M], tl.uint32)
    low = (samples & 0xFFFFFFFF).to(tl.uint32)
    high = (samples >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, zero, low, high, zero + 1, n_rounds=PHILOX_ROUNDS)
    return tl.where(word >= threshold, scale, 0.0)


@triton.jit
def load_dropped(
    x_tile, x_bias_ptr, seed, rows, cols, first_col, mask, threshold, scale,
    ACC: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dropout(x + x_bias) of a tile, in the precision of every intermediate value."""
    value = tl.load(x_tile, mask=mask, other=0.0).to(ACC)
    if x_bias_ptr is not None:
        value += load_vector(x_bias_ptr, rows, cols, mask, ACC)
    if DROPOUT:
        keep = keep_mask(seed, rows, first_col, threshold, BLOCK_M, BLOCK_N)
        value = tl.where(keep, value * scale, 0.0)
    return value
