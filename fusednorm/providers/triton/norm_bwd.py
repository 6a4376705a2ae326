"""Backward Triton kernels of the norm family: persistent over rows, with column slabs where a row is too wide.

As in the forward a row is held as CHUNKS tiles [BLOCK_M, BLOCK_N]. No atomics: each program writes its partial sums of
the parameter gradients once, and another kernel adds them in a fixed order.
"""

# fmt: off
# One line a group of arguments: one line an argument would bury the kernels under their own signatures.

from __future__ import annotations

import triton
import triton.language as tl

from .norm_common import divide, draw_path_factor, load_dropped, load_weight, vector_offsets
from .partials import flush
from .tile import keep_mask, load_vector, row_offsets, tile_pointers


@triton.jit
def _xhat_and_g(
    saved_ptr, dnormed_ptr, weight_ptr, bias_ptr, mean, rstd, cols, mask,
    saved_offset, dnormed_offset, weight_offset, bias_offset, stride_saved_col, stride_dnormed_col,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, FROM_NORMED: tl.constexpr, LAYOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """A tile of the normalized rows, of the cotangent dy, and of g = w dy; masked lanes are 0 in all three."""
    saved = tl.load(tile_pointers(saved_ptr, saved_offset, cols, stride_saved_col, LAYOUT), mask=mask, other=0.0)
    saved = saved.to(ACC)
    dy = tl.load(tile_pointers(dnormed_ptr, dnormed_offset, cols, stride_dnormed_col, LAYOUT), mask=mask, other=0.0)
    dy = dy.to(ACC)
    g = dy
    if weight_ptr is not None:
        weight = load_weight(weight_ptr, weight_offset, cols, mask, ZERO_CENTERED, ACC)
        g = dy * weight
    if FROM_NORMED:
        xhat = saved
        if bias_ptr is not None:
            xhat -= load_vector(bias_ptr, bias_offset, cols, mask, ACC)
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
    M, n_units, rows_inner, rows_per_sample,
    stride_dnormed_outer, stride_dnormed_row, stride_dnormed_col,
    stride_saved_outer, stride_saved_row, stride_saved_col, stride_weight, stride_bias,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, FROM_NORMED: tl.constexpr, PER_SAMPLE: tl.constexpr,
    LAYOUT: tl.constexpr, VEC: tl.constexpr, ROWS_2D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """The two row means of the backward, mean(g x̂) and mean(g), for rows too wide to hold: (2, M)."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N = n_units.to(tl.int64) * VEC if LAYOUT == 0 else n_units.to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    mean, rstd = _row_statistics(stats_ptr, rows, row_mask, M, RMS)
    dnormed_offset = row_offsets(rows, stride_dnormed_outer, stride_dnormed_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    saved_offset = row_offsets(rows, stride_saved_outer, stride_saved_row, rows_inner, ROWS_2D, LAYOUT, VEC)
    weight_offset = vector_offsets(rows, rows_per_sample, stride_weight, PER_SAMPLE, LAYOUT, VEC)
    bias_offset = vector_offsets(rows, rows_per_sample, stride_bias, PER_SAMPLE, LAYOUT, VEC)
    sum_gx = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    sum_g = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (cols < N)[None, :]
        xhat, _, g = _xhat_and_g(
            saved_ptr, dnormed_ptr, weight_ptr, bias_ptr, mean, rstd, cols, mask,
            saved_offset, dnormed_offset, weight_offset, bias_offset, stride_saved_col, stride_dnormed_col,
            RMS, ZERO_CENTERED, FROM_NORMED, LAYOUT, ACC,
        )
        sum_gx += g * xhat
        sum_g += g
    tl.store(sums_ptr + rows, divide(tl.sum(sum_gx, axis=1), N.to(ACC)), mask=row_mask)
    if not RMS:
        tl.store(sums_ptr + M + rows, divide(tl.sum(sum_g, axis=1), N.to(ACC)), mask=row_mask)


@triton.jit
def _add_pair(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add_layer_norm_bwd_kernel(
    dnormed_ptr, dresidual_out_ptr, saved_ptr, stats_ptr, sums_ptr, weight_ptr, bias_ptr,
    x_ptr, x_bias_ptr, layer_scale_ptr, seed_ptr, dx_ptr, dresidual_ptr, partials_ptr,
    dweight_ptr, dbias_ptr, dlayer_scale_ptr,
    M, n_units, rows_inner, rows_per_sample,
    stride_dnormed_outer, stride_dnormed_row, stride_dnormed_col,
    stride_dresidual_outer, stride_dresidual_row, stride_dresidual_col,
    stride_saved_outer, stride_saved_row, stride_saved_col, stride_x_outer, stride_x_row, stride_x_col,
    stride_weight, stride_bias, stride_layer_scale, threshold, scale, path_threshold, path_scale,
    RMS: tl.constexpr, ZERO_CENTERED: tl.constexpr, FROM_NORMED: tl.constexpr, DROPOUT: tl.constexpr,
    DROP_PATH: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, DX_BIAS: tl.constexpr,
    DLAYER_SCALE: tl.constexpr, PER_SAMPLE: tl.constexpr, LAYOUT: tl.constexpr, VEC: tl.constexpr,
    ROWS_2D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, EVEN_N: tl.constexpr,
):
    """Persistent over rows: dx and dresidual a row at a time, parameter gradients summed in registers.

    Program (s, p) visits row groups p, p + P, ... of columns s * CHUNKS * BLOCK_N onward: all of them, or, where a row
    does not fit, a slab, with the row means made before by the sums kernel.

    With parameters of samples the first axis has the slabs of each sample, and row groups are those of one sample.
    Where P is 1, its gradients are written whole, to dweight, dbias and dlayer_scale; else these are absent.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N = n_units * VEC if LAYOUT == 0 else n_units
    program, P = tl.program_id(1), tl.num_programs(1)
    slab, first_row, last_row, row_of_partials, rows_of_partials = tl.program_id(0), 0, M, program, P
    if PER_SAMPLE:
        slabs = tl.cdiv(N, CHUNKS * BLOCK_N) if sums_ptr is not None else 1
        sample = (slab // slabs).to(tl.int64)
        slab = slab % slabs
        first_row = sample * rows_per_sample
        last_row = first_row + rows_per_sample
        row_of_partials = sample * P + program
        rows_of_partials = (tl.num_programs(0) // slabs).to(tl.int64) * P
        unit: tl.constexpr = VEC if LAYOUT == 0 else 1
        if weight_ptr is not None:
            weight_ptr += sample * stride_weight * unit
        if bias_ptr is not None:
            bias_ptr += sample * stride_bias * unit
        if layer_scale_ptr is not None:
            layer_scale_ptr += sample * stride_layer_scale * unit
    first_column = slab * (CHUNKS * BLOCK_N) if sums_ptr is not None else 0
    seed = tl.load(seed_ptr) if seed_ptr is not None else 0
    count = N.to(ACC)
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

    for group in tl.range(program, (last_row - first_row + BLOCK_M - 1) // BLOCK_M, P, num_stages=1):
        rows = first_row + group * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        row_mask = rows < last_row
        shared = tl.zeros_like(rows)
        mean, rstd = _row_statistics(stats_ptr, rows, row_mask, M, RMS)
        dnormed_offset = row_offsets(rows, stride_dnormed_outer, stride_dnormed_row, rows_inner, ROWS_2D, LAYOUT, VEC)
        saved_offset = row_offsets(rows, stride_saved_outer, stride_saved_row, rows_inner, ROWS_2D, LAYOUT, VEC)
        dresidual_offset = row_offsets(
            rows, stride_dresidual_outer, stride_dresidual_row, rows_inner, ROWS_2D, LAYOUT, VEC
        )
        x_offset = row_offsets(rows, stride_x_outer, stride_x_row, rows_inner, ROWS_2D, LAYOUT, VEC)
        out_offset = row_offsets(rows, 0, n_units, 1, False, LAYOUT, VEC)
        if DROP_PATH:
            path_factor = draw_path_factor(seed, rows // rows_per_sample, path_threshold, path_scale, BLOCK_M)

        xhats, gs = (), ()
        new_dweight, new_dbias, new_dx_bias, new_dlayer_scale = (), (), (), ()
        sum_gx = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        sum_g = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        for c in tl.static_range(CHUNKS):
            cols = first_column + c * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = row_mask[:, None] if EVEN_N else row_mask[:, None] & (cols < N)[None, :]
            xhat, dy, g = _xhat_and_g(
                saved_ptr, dnormed_ptr, weight_ptr, bias_ptr, mean, rstd, cols, mask,
                saved_offset, dnormed_offset, shared, shared, stride_saved_col, stride_dnormed_col,
                RMS, ZERO_CENTERED, FROM_NORMED, LAYOUT, ACC,
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
            mean_gx = divide(tl.sum(sum_gx, axis=1), count)
            mean_g = mean_gx
        else:  # both in one reduction: half the barriers
            mean_gx, mean_g = tl.reduce((sum_gx, sum_g), 1, _add_pair)
            mean_gx, mean_g = divide(mean_gx, count), divide(mean_g, count)

        for c in tl.static_range(CHUNKS):
            first_col = first_column + c * BLOCK_N
            cols = first_col + tl.arange(0, BLOCK_N)
            mask = row_mask[:, None] if EVEN_N else row_mask[:, None] & (cols < N)[None, :]
            dz = gs[c] - xhats[c] * mean_gx[:, None]
            if not RMS:
                dz -= mean_g[:, None]
            dz *= rstd[:, None]
            if dresidual_out_ptr is not None:
                tile = tile_pointers(dresidual_out_ptr, dresidual_offset, cols, stride_dresidual_col, LAYOUT)
                dz += tl.load(tile, mask=mask, other=0.0).to(ACC)
            if dresidual_ptr is not None:
                tile = dresidual_ptr + out_offset[:, None] + cols[None, :]
                tl.store(tile, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
            dx = dz
            if DROP_PATH:
                dx = tl.where(path_factor[:, None] > 0, dx * path_factor[:, None], 0.0)
            if DLAYER_SCALE:
                x_tile = tile_pointers(x_ptr, x_offset, cols, stride_x_col, LAYOUT)
                dropped = load_dropped(
                    x_tile, x_bias_ptr, seed, rows, cols, first_col, mask, threshold, scale,
                    ACC, DROPOUT, BLOCK_M, BLOCK_N,
                )
                new_dlayer_scale += (dlayer_scale[c] + tl.where(mask, dx * dropped, 0.0),)
            if layer_scale_ptr is not None:
                dx *= load_vector(layer_scale_ptr, shared, cols, mask, ACC)
            if DROPOUT:
                dx = tl.where(keep_mask(seed, rows, first_col, threshold, BLOCK_M, BLOCK_N), dx * scale, 0.0)
            if DX_BIAS:
                new_dx_bias += (dx_bias[c] + tl.where(mask, dx, 0.0),)
            if dx_ptr is not None:
                tl.store(dx_ptr + out_offset[:, None] + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight, dbias, dx_bias, dlayer_scale = new_dweight, new_dbias, new_dx_bias, new_dlayer_scale

    plane = 0
    if DWEIGHT:
        plane = flush(
            partials_ptr, dweight_ptr, dweight, plane, row_of_partials, rows_of_partials, first_column, N,
            BLOCK_N, CHUNKS,
        )
    if DBIAS:
        plane = flush(
            partials_ptr, dbias_ptr, dbias, plane, row_of_partials, rows_of_partials, first_column, N, BLOCK_N, CHUNKS
        )
    if DX_BIAS:
        plane = flush(
            partials_ptr, None, dx_bias, plane, row_of_partials, rows_of_partials, first_column, N, BLOCK_N, CHUNKS
        )
    if DLAYER_SCALE:
        flush(
            partials_ptr, dlayer_scale_ptr, dlayer_scale, plane, row_of_partials, rows_of_partials, first_column, N,
            BLOCK_N, CHUNKS,
        )
