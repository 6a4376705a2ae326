"""What the Triton norm kernels share: divisions, weights, drop path, the dropped branch.

ACC, the dtype of every intermediate value, is that of the statistics.
"""

# fmt: off
# One line a group of arguments: one line an argument would bury the kernels under their own signatures.

from __future__ import annotations

import triton
import triton.language as tl

from .tile import PHILOX_ROUNDS, keep_mask, load_vector, row_offsets


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
def vector_offsets(
    rows, rows_per_sample, stride, PER_SAMPLE: tl.constexpr, LAYOUT: tl.constexpr, VEC: tl.constexpr,
):
    """Where each row's vector of a parameter begins: its sample's, or the one that all rows have.

    `stride`: from a sample's vector to the next, in the units of LAYOUT; 0 where a parameter is shared beside others.
    """
    if PER_SAMPLE:
        return row_offsets(rows // rows_per_sample, 0, stride, 1, False, LAYOUT, VEC)
    return tl.zeros_like(rows)


@triton.jit
def load_weight(weight_ptr, offsets, cols, mask, ZERO_CENTERED: tl.constexpr, ACC: tl.constexpr):
    weight = load_vector(weight_ptr, offsets, cols, mask, ACC)
    if ZERO_CENTERED:
        weight += 1.0
    return weight


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
        value += load_vector(x_bias_ptr, tl.zeros_like(rows), cols, mask, ACC)
    if DROPOUT:
        keep = keep_mask(seed, rows, first_col, threshold, BLOCK_M, BLOCK_N)
        value = tl.where(keep, value * scale, 0.0)
    return value
