"""Triton kernels of bias_act_dropout: elementwise forward, and a backward that sums the bias' gradient in registers.

Program (s, p) visits row groups p, p + P, ... of columns s * BLOCK_N onward, so the bias is read once a program.
"""

# fmt: off
# One line a group of arguments: one line an argument would bury the kernels under their own signatures.

from __future__ import annotations

import math

import triton
import triton.language as tl

from .partials import flush
from .tile import keep_mask, load_vector, row_offsets, tile_pointers

_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_DENSITY = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))  # of the normal distribution at 0
_SATURATED = tl.constexpr(1000.0)  # past where sigmoid(w), with a cube in w, is 0 or 1; its own cube is finite


@triton.jit
def _activate(u, ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(u <= 0, 0.0, u)  # NaN stays NaN
    elif ACTIVATION == "gelu":
        y = 0.5 * u * (1.0 + tl.math.erf(u * _ROOT_HALF))
    else:  # u sigmoid(w), w = u (LINEAR + CUBIC u^2)
        tl.static_assert(LINEAR > 0, "an activation that is not u sigmoid(w) needs a branch of its own")
        if CUBIC == 0:
            y = u / (1.0 + tl.exp(-u * LINEAR))
        else:
            y = u / (1.0 + tl.exp(-u * (LINEAR + CUBIC * u * u)))
    return y


@triton.jit
def _sigmoid_and_slope(w, sign):
    """sigmoid(w) and its derivative, neither with a cancellation nor an overflow; `sign` is any number of w's sign."""
    small = tl.exp(-tl.abs(w))
    larger = 1.0 / (1.0 + small)
    return tl.where(sign >= 0, larger, small * larger), small * larger * larger


@triton.jit
def _slope(u, ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == "relu":
        slope = tl.where(u <= 0, 0.0, 1.0).to(u.dtype)
    elif ACTIVATION == "gelu":
        slope = 0.5 * (1.0 + tl.math.erf(u * _ROOT_HALF)) + u * (tl.exp(-0.5 * u * u) * _DENSITY)
    else:
        tl.static_assert(LINEAR > 0, "an activation that is not u sigmoid(w) needs a branch of its own")
        if CUBIC == 0:
            sigmoid, derivative = _sigmoid_and_slope(u * LINEAR, u)  # with w itself it spilled
            slope = sigmoid + LINEAR * (u * derivative)  # in this order no finite u gives 0 times infinity
        else:
            if u.dtype == tl.float64:  # Triton 3.9 makes min.xorsign.abs of a clamp on sm_90; float64 does not have it
                v = tl.maximum(u, -_SATURATED, propagate_nan=tl.PropagateNan.ALL)
                v = tl.minimum(v, _SATURATED, propagate_nan=tl.PropagateNan.ALL)
            else:  # one instruction less an element
                v = tl.clamp(u, -_SATURATED, _SATURATED, propagate_nan=tl.PropagateNan.ALL)
            square = v * v
            sigmoid, derivative = _sigmoid_and_slope(v * (LINEAR + CUBIC * square), v)
            slope = sigmoid + v * (LINEAR + 3.0 * CUBIC * square) * derivative
    return slope


@triton.jit
def _bias_act_dropout_fwd_kernel(
    x_ptr, bias_ptr, seed_ptr, y_ptr,
    M, n_units, rows_inner, stride_x_outer, stride_x_row, stride_x_col, threshold, scale,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr, DROPOUT: tl.constexpr,
    LAYOUT: tl.constexpr, VEC: tl.constexpr, ROWS_2D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr,
):
    N = n_units * VEC if LAYOUT == 0 else n_units
    first_col = tl.program_id(0) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    lanes = tl.arange(0, BLOCK_M)
    if bias_ptr is not None:
        bias = load_vector(bias_ptr, tl.zeros_like(lanes), cols, (cols < N)[None, :], ACC)
    for group in tl.range(tl.program_id(1), (M + BLOCK_M - 1) // BLOCK_M, tl.num_programs(1), num_stages=1):
        rows = group * BLOCK_M + lanes.to(tl.int64)
        mask = (rows < M)[:, None] if EVEN_N else (rows < M)[:, None] & (cols < N)[None, :]
        x_offset = row_offsets(rows, stride_x_outer, stride_x_row, rows_inner, ROWS_2D, LAYOUT, VEC)
        u = tl.load(tile_pointers(x_ptr, x_offset, cols, stride_x_col, LAYOUT), mask=mask, other=0.0).to(ACC)
        if bias_ptr is not None:
            u += bias
        y = _activate(u, ACTIVATION, LINEAR, CUBIC)
        if DROPOUT:
            y = tl.where(keep_mask(seed, rows, first_col, threshold, BLOCK_M, BLOCK_N), y * scale, 0.0)
        out_offset = row_offsets(rows, 0, n_units, 1, False, LAYOUT, VEC)
        tl.store(y_ptr + out_offset[:, None] + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_act_dropout_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, seed_ptr, dx_ptr, partials_ptr,
    M, n_units, rows_inner,
    stride_dy_outer, stride_dy_row, stride_dy_col, stride_x_outer, stride_x_row, stride_x_col, threshold, scale,
    ACC: tl.constexpr, ACTIVATION: tl.constexpr, LINEAR: tl.constexpr, CUBIC: tl.constexpr, DROPOUT: tl.constexpr,
    LAYOUT: tl.constexpr, VEC: tl.constexpr, ROWS_2D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr,
):
    N = n_units * VEC if LAYOUT == 0 else n_units
    first_col = tl.program_id(0) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    lanes = tl.arange(0, BLOCK_M)
    if bias_ptr is not None:
        bias = load_vector(bias_ptr, tl.zeros_like(lanes), cols, (cols < N)[None, :], ACC)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for group in tl.range(tl.program_id(1), (M + BLOCK_M - 1) // BLOCK_M, tl.num_programs(1), num_stages=1):
        rows = group * BLOCK_M + lanes.to(tl.int64)
        mask = (rows < M)[:, None] if EVEN_N else (rows < M)[:, None] & (cols < N)[None, :]
        dy_offset = row_offsets(rows, stride_dy_outer, stride_dy_row, rows_inner, ROWS_2D, LAYOUT, VEC)
        x_offset = row_offsets(rows, stride_x_outer, stride_x_row, rows_inner, ROWS_2D, LAYOUT, VEC)
        du = tl.load(tile_pointers(dy_ptr, dy_offset, cols, stride_dy_col, LAYOUT), mask=mask, other=0.0).to(ACC)
        u = tl.load(tile_pointers(x_ptr, x_offset, cols, stride_x_col, LAYOUT), mask=mask, other=0.0).to(ACC)
        if bias_ptr is not None:
            u += bias
        du *= _slope(u, ACTIVATION, LINEAR, CUBIC)
        if DROPOUT:
            # rows past the last one count as dropped: a NaN in the bias must not come into the sums by them
            keep = mask & keep_mask(seed, rows, first_col, threshold, BLOCK_M, BLOCK_N)
            du = tl.where(keep, du * scale, 0.0)
        if dx_ptr is not None:
            out_offset = row_offsets(rows, 0, n_units, 1, False, LAYOUT, VEC)
            tl.store(dx_ptr + out_offset[:, None] + cols[None, :], du.to(dx_ptr.dtype.element_ty), mask=mask)
        if partials_ptr is not None:
            dbias += du
    if partials_ptr is not None:
        flush(partials_ptr, None, (dbias,), 0, tl.program_id(1), tl.num_programs(1), first_col, N, BLOCK_N, 1)
