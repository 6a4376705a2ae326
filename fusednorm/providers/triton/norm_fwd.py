"""Forward Triton kernels of the norm family: rows held in registers, and rows too wide for that.

A row of N columns is held as CHUNKS tiles [BLOCK_M, BLOCK_N] in registers; BLOCK_M narrow rows share a program.
"""

# fmt: off
# One line a group of arguments: one line an argument would bury the kernels under their own signatures.

from __future__ import annotations

import triton
import triton.language as tl

from .norm_common import divide, draw_path_factor, inverse_sqrt, load_dropped, load_weight, vector_offsets
from .tile import load_vector, row_offsets, tile_pointers


@triton.jit
def _stream(
    x_ptr, residual_ptr, x_bias_ptr, layer_scale_ptr, residual_out_ptr, seed, path_factor,
    rows, first_col, cols, mask, x_offset, residual_offset, out_offset, layer_scale_offset,
    stride_x_col, stride_residual_col, threshold, scale,
    ACC: tl.constexpr, Z_DTYPE: tl.constexpr, DROPOUT: tl.constexpr, DROP_PATH: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """A tile of z, rounded to the dtype it is stored in, and stored where that is asked for."""
    x_tile = tile_pointers(x_ptr, x_offset, cols, stride_x_col, LAYOUT)
    z = load_dropped(
        x_tile, x_bias_ptr, seed, rows, cols, first_col, mask, threshold, scale, ACC, DROPOUT, BLOCK_M, BLOCK_N
    )
    if layer_scale_ptr is not None:
        z *= load_vector(layer_scale_ptr, layer_scale_offset, cols, mask, ACC)
    if DROP_PATH:
        z = tl.where(path_factor[:, None] > 0, z * path_factor[:, None], 0.0)
    if residual_ptr is not None:
        residual_tile = tile_pointers(residual_ptr, residual_offset, cols, stride_residual_col, LAYOUT)
        z += tl.load(residual_tile, mask=mask, other=0.0).to(ACC)
    z = z.to(Z_DTYPE)
    if residual_out_ptr is not None:
        tl.store(residual_out_ptr + out_offset[:, None] + cols[None, :], z, mask=mask)
    return z.to(ACC)


@triton.jit
def _store_normed(
    normed_ptr, weight_ptr, bias_ptr, z, mean, rstd, cols, mask, out_offset, weight_offset, bias_offset,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, ACC: tl.constexpr,
):
    normed = z * rstd[:, None] if RMS else (z - mean[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        normed *= load_weight(weight_ptr, weight_offset, cols, mask, ZERO_CENTERED, ACC)
    if bias_ptr is not None:
        normed += load_vector(bias_ptr, bias_offset, cols, mask, ACC)
    tl.store(normed_ptr + out_offset[:, None] + cols[None, :], normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, layer_scale_ptr, seed_ptr,
    normed_ptr, residual_out_ptr, stats_ptr,
    M, n_units, rows_inner, rows_per_sample,
    stride_x_outer, stride_x_row, stride_x_col, stride_residual_outer, stride_residual_row, stride_residual_col,
    stride_weight, stride_bias, stride_layer_scale, eps, threshold, scale, path_threshold, path_scale,
    Z_DTYPE: tl.constexpr, RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr, PER_SAMPLE: tl.constexpr, LAYOUT: tl.constexpr, VEC: tl.constexpr, ROWS_2D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_POWER_OF_TWO: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """Rows that fit in registers: z is read or made once, kept, and normalized."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N = n_units * VEC if LAYOUT == 0 else n_units
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    path_factor = None
    if DROP_PATH:
        path_factor = draw_path_factor(seed, rows // rows_per_sample, path_threshold, path_scale, BLOCK_M)
    x_offset = row_offsets(rows, stride_x_outer, stride_x_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    residual_offset = row_offsets(rows, stride_residual_outer, stride_residual_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    out_offset = row_offsets(rows, 0, n_units, 1, False, LAYOUT, VEC)
    layer_scale_offset = vector_offsets(rows, rows_per_sample, stride_layer_scale, PER_SAMPLE, LAYOUT, VEC)
    # finite rows near the largest float do not overflow, and a power of two rounds nothing
    SCALE: tl.constexpr = 1.0 / (BLOCK_N * CHUNKS_POWER_OF_TWO)
    count = N.to(ACC)

    tiles = ()
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for c in tl.static_range(CHUNKS):
        cols = c * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] if EVEN_N else row_mask[:, None] & (cols < N)[None, :]
        z = _stream(
            x_ptr, residual_ptr, x_bias_ptr, layer_scale_ptr, residual_out_ptr, seed, path_factor,
            rows, c * BLOCK_N, cols, mask, x_offset, residual_offset, out_offset, layer_scale_offset,
            stride_x_col, stride_residual_col, threshold, scale,
            ACC, Z_DTYPE, DROPOUT, DROP_PATH, LAYOUT, BLOCK_M, BLOCK_N,
        )
        if not EVEN_N:
            z = tl.where(mask, z, 0.0)
        tiles += (z,)
        total += z * SCALE
    mean = divide(tl.sum(total, axis=1), count * SCALE)

    squares = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for c in tl.static_range(CHUNKS):
        centred = tiles[c] if RMS else tiles[c] - mean[:, None]
        if not EVEN_N:
            cols = c * BLOCK_N + tl.arange(0, BLOCK_N)
            centred = tl.where((cols < N)[None, :], centred, 0.0)
        if LAYOUT != 0 and CHUNKS == 1:
            # A lane may hold one element of a row. The compiler would drop the sum with zero and fuse the product with
            # what a shuffle brings: lanes of a row would then differ by a rounding.
            squares = tl.fma(centred, centred, squares)
        else:
            squares += centred * centred
    rstd = inverse_sqrt(divide(tl.sum(squares, axis=1), count) + eps)
    if RMS:
        tl.store(stats_ptr + rows, rstd, mask=row_mask)
    else:
        tl.store(stats_ptr + rows, mean, mask=row_mask)
        tl.store(stats_ptr + M + rows, rstd, mask=row_mask)

    weight_offset = vector_offsets(rows, rows_per_sample, stride_weight, PER_SAMPLE, LAYOUT, VEC)
    bias_offset = vector_offsets(rows, rows_per_sample, stride_bias, PER_SAMPLE, LAYOUT, VEC)
    for c in tl.static_range(CHUNKS):
        cols = c * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] if EVEN_N else row_mask[:, None] & (cols < N)[None, :]
        _store_normed(
            normed_ptr, weight_ptr, bias_ptr, tiles[c], mean, rstd, cols, mask, out_offset, weight_offset, bias_offset,
            RMS, ZERO_CENTERED, ACC,
        )


@triton.jit
def _add_layer_norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, layer_scale_ptr, seed_ptr,
    normed_ptr, residual_out_ptr, stats_ptr,
    M, n_units, rows_inner, rows_per_sample,
    stride_x_outer, stride_x_row, stride_x_col, stride_residual_outer, stride_residual_row, stride_residual_col,
    stride_weight, stride_bias, stride_layer_scale, eps, threshold, scale, path_threshold, path_scale,
    Z_DTYPE: tl.constexpr, RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr, PER_SAMPLE: tl.constexpr, LAYOUT: tl.constexpr, VEC: tl.constexpr, ROWS_2D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """A row wider than registers: tiles of z are merged (Chan's formula), then read again, from L2, and normalized.

    Without anything added z is x itself: residual_out is absent and x is what is read again.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N = n_units.to(tl.int64) * VEC if LAYOUT == 0 else n_units.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    path_factor = None
    if DROP_PATH:
        path_factor = draw_path_factor(seed, rows // rows_per_sample, path_threshold, path_scale, BLOCK_M)
    x_offset = row_offsets(rows, stride_x_outer, stride_x_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    residual_offset = row_offsets(rows, stride_residual_outer, stride_residual_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    out_offset = row_offsets(rows, 0, n_units, 1, False, LAYOUT, VEC)
    layer_scale_offset = vector_offsets(rows, rows_per_sample, stride_layer_scale, PER_SAMPLE, LAYOUT, VEC)

    mean = tl.zeros([BLOCK_M], ACC)
    squares = tl.zeros([BLOCK_M], ACC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < N)[None, :]
        z = _stream(
            x_ptr, residual_ptr, x_bias_ptr, layer_scale_ptr, residual_out_ptr, seed, path_factor,
            rows, start, cols, mask, x_offset, residual_offset, out_offset, layer_scale_offset,
            stride_x_col, stride_residual_col, threshold, scale,
            ACC, Z_DTYPE, DROPOUT, DROP_PATH, LAYOUT, BLOCK_M, BLOCK_N,
        )
        z = tl.where(mask, z, 0.0)
        if RMS:
            squares += tl.sum(z * z, axis=1)
        else:
            count = tl.minimum(N - start, BLOCK_N).to(ACC)
            tile_mean = divide(tl.sum(z * (1.0 / BLOCK_N), axis=1), count * (1.0 / BLOCK_N))
            centred = tl.where(mask, z - tile_mean[:, None], 0.0)
            share = count / (start + count)
            delta = tile_mean - mean
            mean += delta * share
            # in this order: delta * delta may overflow where the product with start = 0 must not
            squares += tl.sum(centred * centred, axis=1) + delta * (delta * (start * share))
    rstd = inverse_sqrt(divide(squares, N.to(ACC)) + eps)
    if RMS:
        tl.store(stats_ptr + rows, rstd, mask=row_mask)
    else:
        tl.store(stats_ptr + rows, mean, mask=row_mask)
        tl.store(stats_ptr + M + rows, rstd, mask=row_mask)

    tl.debug_barrier()  # z may be read by another thread than the one that stored it
    weight_offset = vector_offsets(rows, rows_per_sample, stride_weight, PER_SAMPLE, LAYOUT, VEC)
    bias_offset = vector_offsets(rows, rows_per_sample, stride_bias, PER_SAMPLE, LAYOUT, VEC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < N)[None, :]
        if residual_out_ptr is not None:
            z_tile = residual_out_ptr + out_offset[:, None] + cols[None, :]
        else:
            z_tile = tile_pointers(x_ptr, x_offset, cols, stride_x_col, LAYOUT)
        z = tl.load(z_tile, mask=mask, other=0.0).to(ACC)
        _store_normed(
            normed_ptr, weight_ptr, bias_ptr, z, mean, rstd, cols, mask, out_offset, weight_offset, bias_offset,
            RMS, ZERO_CENTERED, ACC,
        )
