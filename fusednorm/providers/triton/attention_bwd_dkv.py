"""Triton kernels of attention's backward: delta, and the gradients of keys and values.

dS = P (dP - delta + dlse), delta = rowsum(dout out). A program owns a tile of keys and goes over the queries that see
it, of every head of its group, so nothing is added atomically. Keys stand first in its products: the transposed
probabilities then stay in registers as the first operand of the next one, where queries first would take them through
shared memory and make the matrix units wait for each product.
"""

# fmt: off
# One line a group of arguments: one line an argument would bury the kernels under their own signatures.

from __future__ import annotations

import triton
import triton.language as tl

from .attention_common import (
    RARE,
    RARE_COLUMNS,
    add_visible,
    all_finite,
    band,
    capped,
    kept,
    load_mask,
    load_rows,
    mask_offset,
    products_in_parts,
    program,
    row_pointers,
    sequence,
    store_columns,
    store_rows,
    tiles,
    visible_tile,
    weights,
)

_TINY = tl.constexpr(2.0**-126)  # so that a probability of 0 has a sign too


@triton.jit
def _attention_bwd_delta_kernel(
    dout_ptr, out_ptr, dlse_ptr, delta_ptr,
    n_tiles, n_heads, n_queries,
    stride_dout_b, stride_dout_h, stride_dout_s, stride_out_b, stride_out_h, stride_out_s,
    stride_lse_b, stride_lse_h,
    DV: tl.constexpr, DV_COLS: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """delta, or with a cotangent of the lse delta - dlse.

    The sums are those of the matrix units, the diagonal of a product: where one key is seen, delta then cancels dP.
    """
    tile, head, batch = program(n_tiles, n_heads, False)
    first_row = tile * BLOCK_M
    lanes = tl.arange(0, BLOCK_M)
    ok = first_row + lanes < n_queries
    b, h, first = batch.to(tl.int64), head.to(tl.int64), first_row.to(tl.int64)
    dout_ptr += (b * stride_dout_b + h * stride_dout_h + first * stride_dout_s) * VEC
    out_ptr += (b * stride_out_b + h * stride_out_h + first * stride_out_s) * VEC
    dout = load_rows(row_pointers(dout_ptr, stride_dout_s, BLOCK_M, DV_COLS, VEC), ok, DV, DV_COLS, True)
    out = load_rows(row_pointers(out_ptr, stride_out_s, BLOCK_M, DV_COLS, VEC), ok, DV, DV_COLS, True)
    products = tl.dot(dout, tl.trans(out), input_precision=PRECISION)
    delta = tl.sum(tl.where(lanes[:, None] == lanes[None, :], products, 0.0), 1)
    at = b * stride_lse_b + h * stride_lse_h + first + lanes
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=ok, other=0.0)
    tl.store(delta_ptr + at, delta, mask=ok)


@triton.jit
def _tile(
    k, v, q_ptr, dout_ptr, keys, keys_ok, first_row, first_key, n_queries, n_keys, lower, upper,
    mask_ptr, stride_mask_q, stride_mask_k, lse_ptr, delta_ptr, dlse_ptr, inverse_ptr, seed_ptr, lse_row,
    stride_q, stride_dout, scale, factor, softcap, threshold, keep_scale,
    WANTS_DS: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr, FOLD: tl.constexpr, SOFTCAP: tl.constexpr,
    MASK: tl.constexpr, MASK_VEC: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    LOWER: tl.constexpr, UPPER: tl.constexpr,
    D: tl.constexpr, D_COLS: tl.constexpr, DV: tl.constexpr, DV_COLS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """(q, dout, P^T, dS^T, visible, visible and not dropped) of a tile of queries; P^T is without dropout's factor.

    With PART k and v are pointers to so many of their columns, and products are made of these at a time.
    """
    rows = first_row + tl.arange(0, BLOCK_M)
    rows_ok = rows < n_queries
    at = lse_row + rows
    if DROPOUT:  # first, while fewer registers are taken
        keep = kept(seed_ptr, lse_row + first_row, first_key, threshold, BLOCK_M, BLOCK_N, True)
    q_tile = row_pointers(q_ptr, stride_q, BLOCK_M, D_COLS, VEC)
    q = load_rows(q_tile + first_row.to(tl.int64) * (stride_q * VEC), rows_ok, D, D_COLS, MASKED)
    if PART:
        q_part = row_pointers(q_ptr + first_row.to(tl.int64) * (stride_q * VEC), stride_q, BLOCK_M, PART, VEC)
        products = products_in_parts(k, keys_ok, q_part, rows_ok, first_row, PART, D, D_COLS, PRECISION)
    else:
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    lse = tl.load(lse_ptr + at, mask=rows_ok, other=0.0) if MASKED else tl.load(lse_ptr + at)
    logits, slope = capped(products, scale, softcap, FOLD, SOFTCAP)
    visible = rows_ok[None, :]
    if MASKED:
        visible = visible & keys_ok[:, None]
        mask_tile = mask_ptr
        if MASK != "none":
            mask_tile = mask_ptr + mask_offset(first_row.to(tl.int64), 0, stride_mask_q, stride_mask_k, MASK_VEC)
        lanes_q, lanes_k = tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None]
        mask = load_mask(
            mask_tile, lanes_q, lanes_k, visible, rows_ok[None, :], keys[:, None], n_keys,
            stride_mask_q, stride_mask_k, MASK, MASK_VEC,
        )
        visible = visible_tile(rows[None, :], keys[:, None], visible, lower, upper, mask, LOWER, UPPER, MASK)
        if MASK == "additive":
            logits += mask
    p = weights(logits, lse[None, :], factor, FOLD, PRECISION)
    if inverse_ptr is not None:  # what the rounding of the lse is to all weights of a query
        p = p * tl.load(inverse_ptr + at, mask=rows_ok, other=0.0)[None, :]
    if MASKED:
        p = tl.where(visible, p, 0.0)
    dout_tile = row_pointers(dout_ptr, stride_dout, BLOCK_M, DV_COLS, VEC)
    dout = load_rows(dout_tile + first_row.to(tl.int64) * (stride_dout * VEC), rows_ok, DV, DV_COLS, MASKED)
    ds, dropped_p, reached = p, p, visible
    if DROPOUT:
        # what is dropped is told by its sign: the mask takes no registers while the products are made
        p = tl.where(keep, p, -p - _TINY)
        dropped_p = tl.where(p < 0.0, 0.0, p)
        reached = visible & keep
    if WANTS_DS:
        if PART:
            dout_part = dout_ptr + first_row.to(tl.int64) * (stride_dout * VEC)
            dout_part = row_pointers(dout_part, stride_dout, BLOCK_M, PART, VEC)
            dp = products_in_parts(v, keys_ok, dout_part, rows_ok, first_row, PART, DV, DV_COLS, PRECISION)
        else:
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        delta = tl.load(delta_ptr + at, mask=rows_ok, other=0.0) if MASKED else tl.load(delta_ptr + at)
        if DROPOUT:
            dp = tl.where(p < 0.0, 0.0, dp * keep_scale)
            p = tl.abs(p)
        dp = dp - delta[None, :]
        if dlse_ptr is not None:  # on its own: where one key is seen, delta cancels all else to the last bit
            dp += tl.load(dlse_ptr + at, mask=rows_ok, other=0.0)[None, :]
        ds = p * dp
        if SOFTCAP:
            ds = ds * slope
        if MASKED:
            ds = tl.where(visible, ds, 0.0)
    return q, dout, dropped_p, ds, visible, reached


@triton.jit
def _attention_bwd_dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, key_mask_ptr, seed_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    lse_ptr, delta_ptr, dlse_ptr, inverse_ptr, dk_ptr, dv_ptr,
    n_tiles, n_heads, group, n_queries, n_keys,
    stride_dout_b, stride_dout_h, stride_dout_s, stride_q_b, stride_q_h, stride_q_s,
    stride_k_b, stride_k_h, stride_k_s, stride_v_b, stride_v_h, stride_v_s,
    stride_dk_b, stride_dk_h, stride_dk_s, stride_dv_b, stride_dv_h, stride_dv_s,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_key_mask_b, stride_key_mask_k,
    stride_lse_b, stride_lse_h,
    window_left, window_right, scale, factor, softcap, threshold, keep_scale,
    D: tl.constexpr, D_COLS: tl.constexpr, DV: tl.constexpr, DV_COLS: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, FOLD: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, MASK_VEC: tl.constexpr,
    DROPOUT: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr, LOWER_RIGHT: tl.constexpr, PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """`n_heads` are the keys', each with `group` of the queries'. Of dk_ptr and dv_ptr one may be None."""
    tile, head, batch = program(n_tiles, n_heads, False)
    start_q, n_queries = sequence(cu_seqlens_q_ptr, batch, n_queries)
    start_k, n_keys = sequence(cu_seqlens_k_ptr, batch, n_keys)
    first_key = tile * BLOCK_N
    if first_key >= n_keys:
        return
    if cu_seqlens_k_ptr is not None:
        batch = batch * 0
    b, kv, first_head = batch.to(tl.int64), head.to(tl.int64), head * group
    lower, upper = band(n_queries, n_keys, window_left, window_right, LOWER_RIGHT)
    keys = first_key + tl.arange(0, BLOCK_N)
    keys_there = keys < n_keys
    keys_ok = keys_there
    if key_mask_ptr is not None:
        shown = key_mask_ptr + b * stride_key_mask_b + keys.to(tl.int64) * stride_key_mask_k
        keys_ok = keys_ok & (tl.load(shown, mask=keys_ok, other=0) != 0)
    first_q, first = start_q.to(tl.int64), start_k.to(tl.int64) + first_key
    k_ptr += (b * stride_k_b + kv * stride_k_h + first * stride_k_s) * VEC
    v_ptr += (b * stride_v_b + kv * stride_v_h + first * stride_v_s) * VEC
    q_ptr += (b * stride_q_b + first_q * stride_q_s) * VEC
    dout_ptr += (b * stride_dout_b + first_q * stride_dout_s) * VEC
    lse_first = b * stride_lse_b + first_q
    if mask_ptr is not None:
        own_keys = mask_offset(0, first_key.to(tl.int64), stride_mask_q, stride_mask_k, MASK_VEC)
        mask_ptr += b * stride_mask_b * MASK_VEC + own_keys

    k = row_pointers(k_ptr, stride_k_s, BLOCK_N, PART if PART else D_COLS, VEC)
    v = row_pointers(v_ptr, stride_v_s, BLOCK_N, PART if PART else DV_COLS, VEC)
    if not PART:
        k = load_rows(k, keys_ok, D, D_COLS, True)
        v = load_rows(v, keys_ok, DV, DV_COLS, True)
    dk = tl.zeros([BLOCK_N, D_COLS], tl.float32)
    dv = tl.zeros([BLOCK_N, DV_COLS], tl.float32)

    low, high = n_queries * 0, n_queries
    if UPPER:
        low = tl.maximum(low, first_key - upper)
    if LOWER:
        high = tl.minimum(high, first_key + BLOCK_N - lower)
    full_low, full_high = low, n_queries
    if UPPER:
        full_low = tl.maximum(low, first_key + BLOCK_N - 1 - upper)
    if LOWER:
        full_high = tl.minimum(full_high, first_key - lower + 1)
    if MASK != "none":
        full_high = low * 0
    if key_mask_ptr is not None:
        if tl.max(keys_ok.to(tl.int32), 0) == 0:
            high, full_high = low, low * 0
    low, full_low, full_high, high = tiles(low, high, full_low, full_high, BLOCK_M)
    for g in range(group):
        h = (first_head + g).to(tl.int64)
        q_head = q_ptr + h * stride_q_h * VEC
        dout_head = dout_ptr + h * stride_dout_h * VEC
        mask_head = mask_ptr
        if mask_ptr is not None:
            mask_head = mask_ptr + h * stride_mask_h * MASK_VEC
        lse_row = lse_first + h * stride_lse_h
        for MASKED in tl.static_range(2):
            if MASKED:
                count = full_low - low + high - full_high
            else:
                count = full_high - full_low
            if MASKED or MASK == "none":
                for n in range(count):
                    if MASKED:
                        row_tile = tl.where(low + n < full_low, low + n, n - (full_low - low) + full_high)
                    else:
                        row_tile = full_low + n
                    q, dout, p, ds, visible, reached = _tile(
                        k, v, q_head, dout_head, keys, keys_ok, row_tile * BLOCK_M, first_key,
                        n_queries, n_keys, lower, upper,
                        mask_head, stride_mask_q, stride_mask_k, lse_ptr, delta_ptr, dlse_ptr, inverse_ptr, seed_ptr,
                        lse_row, stride_q_s, stride_dout_s, scale, factor, softcap, threshold, keep_scale,
                        dk_ptr is not None, PART, PRECISION, FOLD, SOFTCAP, MASK, MASK_VEC, DROPOUT, MASKED == 1,
                        LOWER, UPPER,
                        D, D_COLS, DV, DV_COLS, VEC, BLOCK_M, BLOCK_N,
                    )
                    if dv_ptr is not None:
                        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
                    if dk_ptr is not None:
                        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    if not DROPOUT:
        keep_scale = 1.0
    # a key that the key mask hides took part where a tile was taken to be seen in full
    if dk_ptr is not None:
        dk_ptr += (b * stride_dk_b + kv * stride_dk_h + first * stride_dk_s) * VEC
        dk_pointers = row_pointers(dk_ptr, stride_dk_s, BLOCK_N, D_COLS, VEC)
        dk = tl.where(keys_ok[:, None], dk * scale, 0.0)
        store_rows(dk_pointers, dk, keys_there, D, D_COLS)
    if dv_ptr is not None:
        dv_ptr += (b * stride_dv_b + kv * stride_dv_h + first * stride_dv_s) * VEC
        dv_pointers = row_pointers(dv_ptr, stride_dv_s, BLOCK_N, DV_COLS, VEC)
        dv = tl.where(keys_ok[:, None], dv * keep_scale, 0.0)
        store_rows(dv_pointers, dv, keys_there, DV, DV_COLS)
    if LOWER or UPPER or DROPOUT or MASK != "none":
        begin, end = low * BLOCK_M, tl.minimum(high * BLOCK_M, n_queries)
        for OF_DK in tl.static_range(2):  # one after the other: both at once would take too many registers
            if dk_ptr is not None if OF_DK else dv_ptr is not None:
                if not all_finite(dk if OF_DK else dv):
                    COLS: tl.constexpr = D_COLS if OF_DK else DV_COLS
                    WIDTH: tl.constexpr = RARE_COLUMNS if COLS > RARE_COLUMNS else COLS
                    for column in tl.range(0, COLS, WIDTH, num_stages=1, disable_licm=True):
                        total = tl.zeros([BLOCK_N, WIDTH], tl.float32)
                        for g in range(group):
                            h = (first_head + g).to(tl.int64)
                            q_head = q_ptr + h * stride_q_h * VEC
                            dout_head = dout_ptr + h * stride_dout_h * VEC
                            mask_head = mask_ptr
                            if mask_ptr is not None:
                                mask_head = mask_ptr + h * stride_mask_h * MASK_VEC
                            for n in tl.range(0, (end - begin + RARE - 1) // RARE, num_stages=1, disable_licm=True):
                                first_row = begin + n * RARE
                                q, dout, p, ds, visible, reached = _tile(
                                    k, v, q_head, dout_head,
                                    keys, keys_ok, first_row, first_key, n_queries, n_keys, lower, upper, mask_head,
                                    stride_mask_q, stride_mask_k, lse_ptr, delta_ptr, dlse_ptr, inverse_ptr, seed_ptr,
                                    lse_first + h * stride_lse_h,
                                    stride_q_s, stride_dout_s, scale, factor, softcap, threshold, keep_scale,
                                    OF_DK == 1, PART, PRECISION, FOLD, SOFTCAP, MASK, MASK_VEC, DROPOUT, True,
                                    LOWER, UPPER,
                                    D, D_COLS, DV, DV_COLS, VEC, RARE, BLOCK_N,
                                )
                                if OF_DK:
                                    total = add_visible(
                                        total, ds, visible, q_head, stride_q_s, first_row, n_queries, column,
                                        RARE, D, VEC,
                                    )
                                else:
                                    total = add_visible(
                                        total, p, reached, dout_head, stride_dout_s, first_row, n_queries, column,
                                        RARE, DV, VEC,
                                    )
                        if OF_DK:
                            store_columns(dk_ptr, stride_dk_s, total * scale, column, keys_there, D, VEC)
                        else:
                            store_columns(dv_ptr, stride_dv_s, total * keep_scale, column, keys_there, DV, VEC)
