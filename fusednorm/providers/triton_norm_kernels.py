"""Triton kernels of the norm family: one body forward and one backward, each with a form for wide rows.

A row of N columns is held as CHUNKS tiles [BLOCK_M, BLOCK_N] in registers; BLOCK_M narrow rows share a program. Absent
arguments are None. LAYOUT says what is known of the operands: 0 = columns contiguous, every row on a 16-byte boundary,
with strides, N and the bases in units of VEC elements (the multiplication by VEC is what lets the compiler use 128-bit
accesses); 1 = columns contiguous; 2 = any strides. Outputs and what we kept are contiguous.
"""

# fmt: off
# One line a group of arguments: one line an argument would bury the kernels under their own signatures.

from __future__ import annotations

import torch
import triton
import triton.language as tl

TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64,
}
PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def _row_offset(
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
def _tile(ptr, row_offset, cols, stride_col, LAYOUT: tl.constexpr):
    """Pointers to a tile, given its rows' offsets."""
    if LAYOUT == 2:
        return ptr + row_offset[:, None] + (cols.to(tl.int64) * stride_col)[None, :]
    else:
        return ptr + row_offset[:, None] + cols[None, :]


@triton.jit
def _vector(ptr, rows, cols, mask, ACC: tl.constexpr):
    """A parameter's columns, loaded at the tile's shape: a [1, N] load would be converted through shared memory."""
    return tl.load(ptr + cols[None, :] + tl.zeros_like(rows)[:, None], mask=mask, other=0.0).to(ACC)


@triton.jit
def _weight(weight_ptr, rows, cols, mask, ZERO_CENTERED: tl.constexpr, ACC: tl.constexpr):
    weight = _vector(weight_ptr, rows, cols, mask, ACC)
    if ZERO_CENTERED:
        weight += 1.0
    return weight


@triton.jit
def _keep(seed, rows, first_col, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements of a tile are kept: one Philox call for four neighbouring columns."""
    quads = (first_col // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
    low = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (rows >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, zero + quads, zero + low, zero + high, zero, n_rounds=PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_N)
    return words >= threshold


@triton.jit
def _path_factor(seed, samples, threshold, scale, BLOCK_M: tl.constexpr):
    """Drop path's factor for each row of a tile: 0, or 1/(1-p)."""
    zero = tl.zeros([BLOCK_M], tl.uint32)
    low = (samples & 0xFFFFFFFF).to(tl.uint32)
    high = (samples >> 32).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, zero, low, high, zero + 1, n_rounds=PHILOX_ROUNDS)
    return tl.where(word >= threshold, scale, 0.0)


@triton.jit
def _dropped(
    x_tile, x_bias_ptr, seed, rows, cols, first_col, mask, threshold, scale,
    ACC: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dropout(x + x_bias) of a tile, in the precision of every intermediate value."""
    value = tl.load(x_tile, mask=mask, other=0.0).to(ACC)
    if x_bias_ptr is not None:
        value += _vector(x_bias_ptr, rows, cols, mask, ACC)
    if DROPOUT:
        keep = _keep(seed, rows, first_col, threshold, BLOCK_M, BLOCK_N)
        value = tl.where(keep, value * scale, 0.0)
    return value


@triton.jit
def _stream(
    x_ptr, residual_ptr, x_bias_ptr, layer_scale_ptr, residual_out_ptr, seed, path_factor,
    rows, first_col, cols, mask, x_offset, residual_offset, out_offset, stride_x_col, stride_residual_col,
    threshold, scale,
    ACC: tl.constexpr, Z_DTYPE: tl.constexpr, DROPOUT: tl.constexpr, DROP_PATH: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """A tile of z, rounded to the dtype it is stored in, and stored where that is asked for."""
    x_tile = _tile(x_ptr, x_offset, cols, stride_x_col, LAYOUT)
    z = _dropped(
        x_tile, x_bias_ptr, seed, rows, cols, first_col, mask, threshold, scale, ACC, DROPOUT, BLOCK_M, BLOCK_N
    )
    if layer_scale_ptr is not None:
        z *= _vector(layer_scale_ptr, rows, cols, mask, ACC)
    if DROP_PATH:
        z = tl.where(path_factor[:, None] > 0, z * path_factor[:, None], 0.0)
    if residual_ptr is not None:
        residual_tile = _tile(residual_ptr, residual_offset, cols, stride_residual_col, LAYOUT)
        z += tl.load(residual_tile, mask=mask, other=0.0).to(ACC)
    z = z.to(Z_DTYPE)
    if residual_out_ptr is not None:
        tl.store(residual_out_ptr + out_offset[:, None] + cols[None, :], z, mask=mask)
    return z.to(ACC)


@triton.jit
def _store_normed(
    normed_ptr, weight_ptr, bias_ptr, z, mean, rstd, rows, cols, mask, out_offset,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, ACC: tl.constexpr,
):
    normed = z * rstd[:, None] if RMS else (z - mean[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        normed *= _weight(weight_ptr, rows, cols, mask, ZERO_CENTERED, ACC)
    if bias_ptr is not None:
        normed += _vector(bias_ptr, rows, cols, mask, ACC)
    tl.store(normed_ptr + out_offset[:, None] + cols[None, :], normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, layer_scale_ptr, seed_ptr,
    normed_ptr, residual_out_ptr, stats_ptr,
    M, n_units, rows_inner, rows_per_sample,
    stride_x_outer, stride_x_row, stride_x_col, stride_residual_outer, stride_residual_row, stride_residual_col,
    eps, threshold, scale, path_threshold, path_scale,
    Z_DTYPE: tl.constexpr, RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr, LAYOUT: tl.constexpr, VEC: tl.constexpr, ROWS_2D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, EVEN_N: tl.constexpr,
):
    """Rows that fit in registers: z is read or made once, kept, and normalized."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N = n_units * VEC if LAYOUT == 0 else n_units
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    path_factor = None
    if DROP_PATH:
        path_factor = _path_factor(seed, rows // rows_per_sample, path_threshold, path_scale, BLOCK_M)
    x_offset = _row_offset(rows, stride_x_outer, stride_x_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    residual_offset = _row_offset(rows, stride_residual_outer, stride_residual_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    out_offset = _row_offset(rows, 0, n_units, 1, False, LAYOUT, VEC)
    inverse_n = 1.0 / N.to(ACC)

    tiles = ()
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for c in tl.static_range(CHUNKS):
        cols = c * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] if EVEN_N else row_mask[:, None] & (cols < N)[None, :]
        z = _stream(
            x_ptr, residual_ptr, x_bias_ptr, layer_scale_ptr, residual_out_ptr, seed, path_factor,
            rows, c * BLOCK_N, cols, mask, x_offset, residual_offset, out_offset, stride_x_col, stride_residual_col,
            threshold, scale, ACC, Z_DTYPE, DROPOUT, DROP_PATH, LAYOUT, BLOCK_M, BLOCK_N,
        )
        if not EVEN_N:
            z = tl.where(mask, z, 0.0)
        tiles += (z,)
        total += z * inverse_n  # scaled first: the sum of finite values near the largest float would overflow
    mean = tl.sum(total, axis=1)

    squares = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for c in tl.static_range(CHUNKS):
        centred = tiles[c] if RMS else tiles[c] - mean[:, None]
        if not EVEN_N:
            cols = c * BLOCK_N + tl.arange(0, BLOCK_N)
            centred = tl.where((cols < N)[None, :], centred, 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, axis=1) * inverse_n + eps)
    if RMS:
        tl.store(stats_ptr + rows, rstd, mask=row_mask)
    else:
        tl.store(stats_ptr + rows, mean, mask=row_mask)
        tl.store(stats_ptr + M + rows, rstd, mask=row_mask)

    for c in tl.static_range(CHUNKS):
        cols = c * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] if EVEN_N else row_mask[:, None] & (cols < N)[None, :]
        _store_normed(
            normed_ptr, weight_ptr, bias_ptr, tiles[c], mean, rstd, rows, cols, mask, out_offset,
            RMS, ZERO_CENTERED, ACC,
        )


@triton.jit
def _add_layer_norm_fwd_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, x_bias_ptr, layer_scale_ptr, seed_ptr,
    normed_ptr, residual_out_ptr, stats_ptr,
    M, n_units, rows_inner, rows_per_sample,
    stride_x_outer, stride_x_row, stride_x_col, stride_residual_outer, stride_residual_row, stride_residual_col,
    eps, threshold, scale, path_threshold, path_scale,
    Z_DTYPE: tl.constexpr, RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr, LAYOUT: tl.constexpr, VEC: tl.constexpr, ROWS_2D: tl.constexpr,
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
        path_factor = _path_factor(seed, rows // rows_per_sample, path_threshold, path_scale, BLOCK_M)
    x_offset = _row_offset(rows, stride_x_outer, stride_x_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    residual_offset = _row_offset(rows, stride_residual_outer, stride_residual_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    out_offset = _row_offset(rows, 0, n_units, 1, False, LAYOUT, VEC)

    mean = tl.zeros([BLOCK_M], ACC)
    squares = tl.zeros([BLOCK_M], ACC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < N)[None, :]
        z = _stream(
            x_ptr, residual_ptr, x_bias_ptr, layer_scale_ptr, residual_out_ptr, seed, path_factor,
            rows, start, cols, mask, x_offset, residual_offset, out_offset, stride_x_col, stride_residual_col,
            threshold, scale, ACC, Z_DTYPE, DROPOUT, DROP_PATH, LAYOUT, BLOCK_M, BLOCK_N,
        )
        z = tl.where(mask, z, 0.0)
        if RMS:
            squares += tl.sum(z * z, axis=1)
        else:
            count = tl.minimum(N - start, BLOCK_N).to(ACC)
            tile_mean = tl.sum(z * (1.0 / count), axis=1)
            centred = tl.where(mask, z - tile_mean[:, None], 0.0)
            share = count / (start + count)
            delta = tile_mean - mean
            mean += delta * share
            squares += tl.sum(centred * centred, axis=1) + delta * delta * (start * share)
    rstd = tl.rsqrt(squares / N.to(ACC) + eps)
    if RMS:
        tl.store(stats_ptr + rows, rstd, mask=row_mask)
    else:
        tl.store(stats_ptr + rows, mean, mask=row_mask)
        tl.store(stats_ptr + M + rows, rstd, mask=row_mask)

    tl.debug_barrier()  # z may be read by another thread than the one that stored it
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < N)[None, :]
        if residual_out_ptr is not None:
            z_tile = residual_out_ptr + out_offset[:, None] + cols[None, :]
        else:
            z_tile = _tile(x_ptr, x_offset, cols, stride_x_col, LAYOUT)
        z = tl.load(z_tile, mask=mask, other=0.0).to(ACC)
        _store_normed(
            normed_ptr, weight_ptr, bias_ptr, z, mean, rstd, rows, cols, mask, out_offset, RMS, ZERO_CENTERED, ACC
        )


@triton.jit
def _xhat_and_g(
    saved_ptr, dnormed_ptr, weight_ptr, bias_ptr, mean, rstd, rows, cols, mask,
    saved_offset, dnormed_offset, stride_saved_col, stride_dnormed_col,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, FROM_NORMED: tl.constexpr, LAYOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """A tile of the normalized rows, of the cotangent dy, and of g = w dy; masked lanes are 0 in all three."""
    saved = tl.load(_tile(saved_ptr, saved_offset, cols, stride_saved_col, LAYOUT), mask=mask, other=0.0).to(ACC)
    dy = tl.load(_tile(dnormed_ptr, dnormed_offset, cols, stride_dnormed_col, LAYOUT), mask=mask, other=0.0)
    dy = dy.to(ACC)
    g = dy
    if weight_ptr is not None:
        weight = _weight(weight_ptr, rows, cols, mask, ZERO_CENTERED, ACC)
        g = dy * weight
    if FROM_NORMED:
        xhat = saved
        if bias_ptr is not None:
            xhat -= _vector(bias_ptr, rows, cols, mask, ACC)
        if weight_ptr is not None:
            xhat /= tl.where(mask, weight, 1.0)
    elif RMS:
        xhat = saved * rstd[:, None]
    else:
        xhat = (saved - mean[:, None]) * rstd[:, None]
    return tl.where(mask, xhat, 0.0), dy, g


@triton.jit
def _row_statistics(stats_ptr, rows, row_mask, M, RMS: tl.constexpr):
    if RMS:
        rstd = tl.load(stats_ptr + rows, mask=row_mask, other=0.0)
        return rstd, rstd
    return tl.load(stats_ptr + rows, mask=row_mask, other=0.0), tl.load(stats_ptr + M + rows, mask=row_mask, other=0.0)


@triton.jit
def _add_layer_norm_bwd_sums_kernel(
    dnormed_ptr, saved_ptr, stats_ptr, weight_ptr, bias_ptr, sums_ptr,
    M, n_units, rows_inner,
    stride_dnormed_outer, stride_dnormed_row, stride_dnormed_col,
    stride_saved_outer, stride_saved_row, stride_saved_col,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, FROM_NORMED: tl.constexpr, LAYOUT: tl.constexpr,
    VEC: tl.constexpr, ROWS_2D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """The two row means of the backward, mean(g x̂) and mean(g), for rows too wide to hold: (2, M)."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N = n_units.to(tl.int64) * VEC if LAYOUT == 0 else n_units.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    mean, rstd = _row_statistics(stats_ptr, rows, row_mask, M, RMS)
    dnormed_offset = _row_offset(rows, stride_dnormed_outer, stride_dnormed_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    saved_offset = _row_offset(rows, stride_saved_outer, stride_saved_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    sum_gx = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    sum_g = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < N)[None, :]
        xhat, _, g = _xhat_and_g(
            saved_ptr, dnormed_ptr, weight_ptr, bias_ptr, mean, rstd, rows, cols, mask,
            saved_offset, dnormed_offset, stride_saved_col, stride_dnormed_col, RMS, ZERO_CENTERED, FROM_NORMED, LAYOUT,
            ACC,
        )
        sum_gx += g * xhat
        sum_g += g
    tl.store(sums_ptr + rows, tl.sum(sum_gx, axis=1) / N.to(ACC), mask=row_mask)
    if not RMS:
        tl.store(sums_ptr + M + rows, tl.sum(sum_g, axis=1) / N.to(ACC), mask=row_mask)


@triton.jit
def _add_pair(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _flush(partials_ptr, accumulators, plane, program, column, N, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, P):
    """One program's partial sums of one parameter gradient: row `program` of plane `plane` of (K, P, N)."""
    base = (plane * P + program).to(tl.int64) * N
    for c in tl.static_range(CHUNKS):
        cols = column + c * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(partials_ptr + base + cols, tl.sum(accumulators[c], axis=0), mask=cols < N)


@triton.jit
def _add_layer_norm_bwd_kernel(
    dnormed_ptr, dresidual_out_ptr, saved_ptr, stats_ptr, sums_ptr, weight_ptr, bias_ptr,
    x_ptr, x_bias_ptr, layer_scale_ptr, seed_ptr, dx_ptr, dresidual_ptr, partials_ptr,
    M, n_units, rows_inner, rows_per_sample,
    stride_dnormed_outer, stride_dnormed_row, stride_dnormed_col,
    stride_dresidual_outer, stride_dresidual_row, stride_dresidual_col,
    stride_saved_outer, stride_saved_row, stride_saved_col, stride_x_outer, stride_x_row, stride_x_col,
    threshold, scale, path_threshold, path_scale,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, FROM_NORMED: tl.constexpr, DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, DX_BIAS: tl.constexpr,
    DLAYER_SCALE: tl.constexpr, LAYOUT: tl.constexpr, VEC: tl.constexpr, ROWS_2D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, EVEN_N: tl.constexpr, STAGES: tl.constexpr,
):
    """Persistent over rows: dx and dresidual a row at a time, parameter gradients summed in registers.

    Program (p, s) visits row groups p, p + P, ... of columns s * CHUNKS * BLOCK_N onward: all of them, or, where a row
    does not fit, a slab, with the row means made before by the sums kernel.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N = n_units * VEC if LAYOUT == 0 else n_units
    program, P = tl.program_id(0), tl.num_programs(0)
    first_column = tl.program_id(1) * (CHUNKS * BLOCK_N) if sums_ptr is not None else 0
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    inverse_n = 1.0 / N.to(ACC)
    dweight, dbias, dx_bias, dlayer_scale = (), (), (), ()
    for c in tl.static_range(CHUNKS):
        zero = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        if DWEIGHT:
            dweight += (zero,)
        if DBIAS:
            dbias += (zero,)
        if DX_BIAS:
            dx_bias += (zero,)
        if DLAYER_SCALE:
            dlayer_scale += (zero,)

    for group in tl.range(program, (M + BLOCK_M - 1) // BLOCK_M, P, num_stages=STAGES):
        rows = group * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        row_mask = rows < M
        mean, rstd = _row_statistics(stats_ptr, rows, row_mask, M, RMS)
        dnormed_offset = _row_offset(rows, stride_dnormed_outer, stride_dnormed_row, rows_inner, ROWS_2D, LAYOUT, VEC)
        saved_offset = _row_offset(rows, stride_saved_outer, stride_saved_row, rows_inner, ROWS_2D, LAYOUT, VEC)
        dresidual_offset = _row_offset(
            rows, stride_dresidual_outer, stride_dresidual_row, rows_inner, ROWS_2D, LAYOUT, VEC
        )
        x_offset = _row_offset(rows, stride_x_outer, stride_x_row, rows_inner, ROWS_2D, LAYOUT, VEC)
        out_offset = _row_offset(rows, 0, n_units, 1, False, LAYOUT, VEC)
        if DROP_PATH:
            path_factor = _path_factor(seed, rows // rows_per_sample, path_threshold, path_scale, BLOCK_M)

        xhats, gs = (), ()
        new_dweight, new_dbias, new_dx_bias, new_dlayer_scale = (), (), (), ()
        sum_gx = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        sum_g = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        for c in tl.static_range(CHUNKS):
            cols = first_column + c * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = row_mask[:, None] if EVEN_N else row_mask[:, None] & (cols < N)[None, :]
            xhat, dy, g = _xhat_and_g(
                saved_ptr, dnormed_ptr, weight_ptr, bias_ptr, mean, rstd, rows, cols, mask, saved_offset,
                dnormed_offset, stride_saved_col, stride_dnormed_col, RMS, ZERO_CENTERED, FROM_NORMED, LAYOUT,
                ACC,
            )
            if DWEIGHT:
                new_dweight += (dweight[c] + dy * xhat,)
            if DBIAS:
                new_dbias += (dbias[c] + dy,)
            sum_gx += g * xhat
            sum_g += g
            xhats += (xhat,)
            gs += (g,)
        if sums_ptr is not None:
            mean_gx = tl.load(sums_ptr + rows, mask=row_mask, other=0.0)
            mean_g = mean_gx if RMS else tl.load(sums_ptr + M + rows, mask=row_mask, other=0.0)
        elif RMS:
            mean_gx = tl.sum(sum_gx, axis=1) * inverse_n
            mean_g = mean_gx
        else:  # both in one reduction: half the barriers
            mean_gx, mean_g = tl.reduce((sum_gx, sum_g), 1, _add_pair)
            mean_gx, mean_g = mean_gx * inverse_n, mean_g * inverse_n

        for c in tl.static_range(CHUNKS):
            first_col = first_column + c * BLOCK_N
            cols = first_col + tl.arange(0, BLOCK_N)
            mask = row_mask[:, None] if EVEN_N else row_mask[:, None] & (cols < N)[None, :]
            dz = gs[c] - xhats[c] * mean_gx[:, None]
            if not RMS:
                dz -= mean_g[:, None]
            dz *= rstd[:, None]
            if dresidual_out_ptr is not None:
                tile = _tile(dresidual_out_ptr, dresidual_offset, cols, stride_dresidual_col, LAYOUT)
                dz += tl.load(tile, mask=mask, other=0.0).to(ACC)
            if dresidual_ptr is not None:
                tile = dresidual_ptr + out_offset[:, None] + cols[None, :]
                tl.store(tile, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
            dx = dz
            if DROP_PATH:
                dx = tl.where(path_factor[:, None] > 0, dx * path_factor[:, None], 0.0)
            if DLAYER_SCALE:
                x_tile = _tile(x_ptr, x_offset, cols, stride_x_col, LAYOUT)
                dropped = _dropped(
                    x_tile, x_bias_ptr, seed, rows, cols, first_col, mask, threshold, scale,
                    ACC, DROPOUT, BLOCK_M, BLOCK_N,
                )
                new_dlayer_scale += (dlayer_scale[c] + tl.where(mask, dx * dropped, 0.0),)
            if layer_scale_ptr is not None:
                dx *= _vector(layer_scale_ptr, rows, cols, mask, ACC)
            if DROPOUT:
                dx = tl.where(_keep(seed, rows, first_col, threshold, BLOCK_M, BLOCK_N), dx * scale, 0.0)
            if DX_BIAS:
                new_dx_bias += (dx_bias[c] + tl.where(mask, dx, 0.0),)
            if dx_ptr is not None:
                tl.store(dx_ptr + out_offset[:, None] + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight, dbias, dx_bias, dlayer_scale = new_dweight, new_dbias, new_dx_bias, new_dlayer_scale

    if DWEIGHT:
        _flush(partials_ptr, dweight, 0, program, first_column, N, BLOCK_N, CHUNKS, P)
    if DBIAS:
        _flush(partials_ptr, dbias, DWEIGHT, program, first_column, N, BLOCK_N, CHUNKS, P)
    if DX_BIAS:
        _flush(partials_ptr, dx_bias, DWEIGHT + DBIAS, program, first_column, N, BLOCK_N, CHUNKS, P)
    if DLAYER_SCALE:
        _flush(partials_ptr, dlayer_scale, DWEIGHT + DBIAS + DX_BIAS, program, first_column, N, BLOCK_N, CHUNKS, P)


@triton.jit
def _add_layer_norm_bwd_finalize_kernel(
    partials_ptr, dweight_ptr, dbias_ptr, dx_bias_ptr, dlayer_scale_ptr, P, N,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Sums the P partials of each column, always in the same order; one parameter a plane (second grid axis)."""
    plane = tl.program_id(1)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    base = plane.to(tl.int64) * P * N
    total = tl.zeros([BLOCK_P, BLOCK_N], partials_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK_P):
        partial_rows = start + tl.arange(0, BLOCK_P)
        mask = (partial_rows < P)[:, None] & (cols < N)[None, :]
        offset = base + partial_rows.to(tl.int64)[:, None] * N + cols[None, :]
        total += tl.load(partials_ptr + offset, mask=mask, other=0.0)
    gradient = tl.sum(total, axis=0)
    col_mask = cols < N
    index = 0
    if dweight_ptr is not None:
        if plane == index:
            tl.store(dweight_ptr + cols, gradient.to(dweight_ptr.dtype.element_ty), mask=col_mask)
        index += 1
    if dbias_ptr is not None:
        if plane == index:
            tl.store(dbias_ptr + cols, gradient.to(dbias_ptr.dtype.element_ty), mask=col_mask)
        index += 1
    if dx_bias_ptr is not None:
        if plane == index:
            tl.store(dx_bias_ptr + cols, gradient.to(dx_bias_ptr.dtype.element_ty), mask=col_mask)
        index += 1
    if dlayer_scale_ptr is not None:
        if plane == index:
            tl.store(dlayer_scale_ptr + cols, gradient.to(dlayer_scale_ptr.dtype.element_ty), mask=col_mask)
