"""Triton kernels of attention's backward: the gradients of queries and of an additive attn_mask.

A program owns a tile of queries and goes over the keys that they see. A mask of the logits' own shape has its gradient
written on the way; one that is broadcast has a kernel of its own, whose programs own a tile of the mask each and go
over what it was broadcast along, in a fixed order.
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
    key_range,
    keys_of_mask,
    load_mask,
    load_rows,
    mask_offset,
    products_in_parts,
    program,
    row_pointers,
    sequence,
    store_columns,
    store_rows,
    visible_tile,
    weights,
)


@triton.jit
def _tile(
    q, dout, k_ptr, v_ptr, lse, delta, dlse, rows, first_key, n_queries, n_keys, lower, upper,
    mask_ptr, stride_mask_q, stride_mask_k, key_mask_ptr, stride_key_mask, seed_ptr, lse_row,
    stride_k, stride_v, scale, factor, softcap, threshold, keep_scale,
    PRECISION: tl.constexpr, FOLD: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, MASK_VEC: tl.constexpr,
    DROPOUT: tl.constexpr, MASKED: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr, PART: tl.constexpr,
    D: tl.constexpr, D_COLS: tl.constexpr, DV: tl.constexpr, DV_COLS: tl.constexpr, VEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """(k, P, d(logits), the capped logits' derivative, visible) of a tile of keys.

    With PART q and dout are pointers to so many of their columns, and products are made of these at a time.
    """
    keys = first_key + tl.arange(0, BLOCK_N)
    there = keys < n_keys
    if DROPOUT:  # first, while fewer registers are taken
        keep = kept(seed_ptr, lse_row, first_key, threshold, BLOCK_M, BLOCK_N, False)
    if MASKED and key_mask_ptr is not None:
        shown = tl.load(key_mask_ptr + keys.to(tl.int64) * stride_key_mask, mask=there, other=0)
        there = there & (shown != 0)
    k_tile = row_pointers(k_ptr, stride_k, BLOCK_N, D_COLS, VEC)
    k = load_rows(k_tile + first_key.to(tl.int64) * (stride_k * VEC), there, D, D_COLS, MASKED)
    if PART:
        rows_ok = rows < n_queries
        k_part = row_pointers(k_ptr + first_key.to(tl.int64) * (stride_k * VEC), stride_k, BLOCK_N, PART, VEC)
        products = products_in_parts(q, rows_ok, k_part, there, first_key, PART, D, D_COLS, PRECISION)
        v_part = row_pointers(v_ptr + first_key.to(tl.int64) * (stride_v * VEC), stride_v, BLOCK_N, PART, VEC)
        dp = products_in_parts(dout, rows_ok, v_part, there, first_key, PART, DV, DV_COLS, PRECISION)
    else:
        v_tile = row_pointers(v_ptr, stride_v, BLOCK_N, DV_COLS, VEC)
        v = load_rows(v_tile + first_key.to(tl.int64) * (stride_v * VEC), there, DV, DV_COLS, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    logits, slope = capped(products, scale, softcap, FOLD, SOFTCAP)
    visible = there[None, :]
    if MASKED:
        row_is_there = (rows < n_queries)[:, None]
        visible = visible & row_is_there
        mask_tile = mask_ptr
        if MASK != "none":
            mask_tile = mask_ptr + mask_offset(0, first_key.to(tl.int64), stride_mask_q, stride_mask_k, MASK_VEC)
        lanes_q, lanes_k = tl.arange(0, rows.shape[0])[:, None], tl.arange(0, BLOCK_N)[None, :]
        mask = load_mask(
            mask_tile, lanes_q, lanes_k, visible, row_is_there, keys[None, :], n_keys, stride_mask_q, stride_mask_k,
            MASK, MASK_VEC,
        )
        visible = visible_tile(rows[:, None], keys[None, :], visible, lower, upper, mask, LOWER, UPPER, MASK)
        if MASK == "additive":
            logits += mask
    p = weights(logits, lse[:, None], factor, FOLD, PRECISION)
    if DROPOUT:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    dp = dp - delta[:, None]
    if dlse is not None:  # on its own: where one key is seen, delta cancels all else to the last bit
        dp += dlse[:, None]
    ds = p * dp
    if MASKED:
        p, ds = tl.where(visible, p, 0.0), tl.where(visible, ds, 0.0)
    return k, p, ds, slope, visible


@triton.jit
def _attention_bwd_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, key_mask_ptr, seed_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    lse_ptr, delta_ptr, dlse_ptr, inverse_ptr, dq_ptr, dmask_ptr,
    n_tiles, n_heads, group, n_queries, n_keys,
    stride_dout_b, stride_dout_h, stride_dout_s, stride_q_b, stride_q_h, stride_q_s,
    stride_k_b, stride_k_h, stride_k_s, stride_v_b, stride_v_h, stride_v_s,
    stride_dq_b, stride_dq_h, stride_dq_s, stride_dmask_b, stride_dmask_h, stride_dmask_q, stride_dmask_k,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_key_mask_b, stride_key_mask_k,
    stride_lse_b, stride_lse_h,
    window_left, window_right, scale, factor, softcap, threshold, keep_scale,
    D: tl.constexpr, D_COLS: tl.constexpr, DV: tl.constexpr, DV_COLS: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, FOLD: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, MASK_VEC: tl.constexpr,
    DROPOUT: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr, LOWER_RIGHT: tl.constexpr, PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """`dmask` begins as zeros: tiles of keys that no query sees are not visited.

    The weights of a query come from its rounded lse, and all err by that; for float32 that is more than all else, and
    where terms nearly cancel so is what delta, of rounded results, errs. With inverse_ptr, a first pass over the keys
    makes the inverse of the weights' sum and delta from these weights, here and for the kernels that follow.
    """
    tile, head, batch = program(n_tiles, n_heads, UPPER)
    start_q, n_queries = sequence(cu_seqlens_q_ptr, batch, n_queries)
    start_k, n_keys = sequence(cu_seqlens_k_ptr, batch, n_keys)
    first_row = tile * BLOCK_M
    if first_row >= n_queries:
        return
    if cu_seqlens_q_ptr is not None:
        batch = batch * 0
    b, h, kv = batch.to(tl.int64), head.to(tl.int64), (head // group).to(tl.int64)
    lower, upper = band(n_queries, n_keys, window_left, window_right, LOWER_RIGHT)
    lanes = tl.arange(0, BLOCK_M)
    rows = first_row + lanes
    rows_ok = rows < n_queries
    first = start_q.to(tl.int64) + first_row
    q_ptr += (b * stride_q_b + h * stride_q_h + first * stride_q_s) * VEC
    dout_ptr += (b * stride_dout_b + h * stride_dout_h + first * stride_dout_s) * VEC
    k_ptr += (b * stride_k_b + kv * stride_k_h + start_k.to(tl.int64) * stride_k_s) * VEC
    v_ptr += (b * stride_v_b + kv * stride_v_h + start_k.to(tl.int64) * stride_v_s) * VEC
    lse_row = b * stride_lse_b + h * stride_lse_h + first
    if mask_ptr is not None:
        mask_ptr += (b * stride_mask_b + h * stride_mask_h + first_row.to(tl.int64) * stride_mask_q) * MASK_VEC
    if dmask_ptr is not None:
        dmask_ptr += (b * stride_dmask_b + h * stride_dmask_h) * MASK_VEC
    if key_mask_ptr is not None:
        key_mask_ptr += b * stride_key_mask_b

    q = row_pointers(q_ptr, stride_q_s, BLOCK_M, PART if PART else D_COLS, VEC)
    dout = row_pointers(dout_ptr, stride_dout_s, BLOCK_M, PART if PART else DV_COLS, VEC)
    if not PART:
        q = load_rows(q, rows_ok, D, D_COLS, True)
        dout = load_rows(dout, rows_ok, DV, DV_COLS, True)
    lse = tl.load(lse_ptr + lse_row + lanes, mask=rows_ok, other=0.0)
    dlse = None
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + lse_row + lanes, mask=rows_ok, other=0.0)
    dq = tl.zeros([BLOCK_M, D_COLS], tl.float32)
    low, full_low, full_high, high = key_range(
        first_row, n_queries, n_keys, lower, upper, key_mask_ptr, stride_key_mask_k,
        BLOCK_M, BLOCK_N, LOWER, UPPER, MASK != "none",
    )
    factors = scale
    if inverse_ptr is None:
        delta = tl.load(delta_ptr + lse_row + lanes, mask=rows_ok, other=0.0)
    else:
        total = tl.zeros([BLOCK_M], tl.float32)
        delta = tl.zeros([BLOCK_M], tl.float32)
        for n in range(high - low):
            _, p, pdp, _, _ = _tile(
                q, dout, k_ptr, v_ptr, lse, tl.zeros([BLOCK_M], tl.float32), None, rows, (low + n) * BLOCK_N,
                n_queries, n_keys, lower, upper, mask_ptr, stride_mask_q, stride_mask_k,
                key_mask_ptr, stride_key_mask_k, seed_ptr, lse_row,
                stride_k_s, stride_v_s, scale, factor, softcap, threshold, keep_scale,
                PRECISION, FOLD, SOFTCAP, MASK, MASK_VEC, DROPOUT, True, LOWER, UPPER, PART,
                D, D_COLS, DV, DV_COLS, VEC, BLOCK_M, BLOCK_N,
            )
            total += tl.sum(p, 1)
            delta += tl.sum(pdp, 1)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        delta = delta * inverse
        tl.store(inverse_ptr + lse_row + lanes, inverse, mask=rows_ok)
        tl.store(delta_ptr + lse_row + lanes, delta, mask=rows_ok)
        factors = (scale * inverse)[:, None]
    for MASKED in tl.static_range(2):
        if MASKED:
            count = full_low - low + high - full_high
        else:
            count = full_high - full_low
        if MASKED or MASK == "none":
            for n in range(count):
                if MASKED:
                    key_tile = tl.where(low + n < full_low, low + n, n - (full_low - low) + full_high)
                else:
                    key_tile = full_low + n
                first_key = key_tile * BLOCK_N
                k, _, ds, slope, visible = _tile(
                    q, dout, k_ptr, v_ptr, lse, delta, dlse, rows, first_key, n_queries, n_keys, lower, upper,
                    mask_ptr, stride_mask_q, stride_mask_k, key_mask_ptr, stride_key_mask_k, seed_ptr, lse_row,
                    stride_k_s, stride_v_s, scale, factor, softcap, threshold, keep_scale,
                    PRECISION, FOLD, SOFTCAP, MASK, MASK_VEC, DROPOUT, MASKED == 1, LOWER, UPPER, PART,
                    D, D_COLS, DV, DV_COLS, VEC, BLOCK_M, BLOCK_N,
                )
                if dmask_ptr is not None:
                    keys = first_key + tl.arange(0, BLOCK_N)
                    at = mask_offset(
                        rows.to(tl.int64)[:, None], keys.to(tl.int64)[None, :], stride_dmask_q, stride_dmask_k, MASK_VEC
                    )
                    ok = rows_ok[:, None] & keys_of_mask(keys, n_keys, MASK_VEC)[None, :]
                    dmask = ds
                    if inverse_ptr is not None:
                        dmask = ds * inverse[:, None]
                    tl.store(dmask_ptr + at, dmask.to(dmask_ptr.dtype.element_ty), mask=ok)
                if dq_ptr is not None:
                    if SOFTCAP:
                        ds = tl.where(visible, ds * slope, 0.0)
                    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if dq_ptr is not None:
        dq_ptr += (b * stride_dq_b + h * stride_dq_h + first * stride_dq_s) * VEC
        dq_pointers = row_pointers(dq_ptr, stride_dq_s, BLOCK_M, D_COLS, VEC)
        store_rows(dq_pointers, dq * factors, rows_ok, D, D_COLS)
        if LOWER or UPPER or MASK != "none":
            if not all_finite(dq):
                begin, end = low * BLOCK_N, tl.minimum(high * BLOCK_N, n_keys)
                WIDTH: tl.constexpr = RARE_COLUMNS if D_COLS > RARE_COLUMNS else D_COLS
                for column in tl.range(0, D_COLS, WIDTH, num_stages=1, disable_licm=True):
                    part = tl.zeros([BLOCK_M, WIDTH], tl.float32)
                    for n in tl.range(0, (end - begin + RARE - 1) // RARE, num_stages=1, disable_licm=True):
                        first_key = begin + n * RARE
                        k, _, ds, slope, visible = _tile(
                            q, dout, k_ptr, v_ptr, lse, delta, dlse, rows, first_key, n_queries, n_keys, lower, upper,
                            mask_ptr, stride_mask_q, stride_mask_k, key_mask_ptr, stride_key_mask_k, seed_ptr, lse_row,
                            stride_k_s, stride_v_s, scale, factor, softcap, threshold, keep_scale,
                            PRECISION, FOLD, SOFTCAP, MASK, MASK_VEC, DROPOUT, True, LOWER, UPPER, PART,
                            D, D_COLS, DV, DV_COLS, VEC, BLOCK_M, RARE,
                        )
                        if SOFTCAP:
                            ds = ds * slope
                        part = add_visible(
                            part, ds, visible, k_ptr, stride_k_s, first_key, n_keys, column, RARE, D, VEC
                        )
                    store_columns(dq_ptr, stride_dq_s, part * factors, column, rows_ok, D, VEC)


@triton.jit
def _attention_bwd_dmask_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, key_mask_ptr, seed_ptr, lse_ptr, delta_ptr, dlse_ptr,
    inverse_ptr, partials_ptr,
    n_batches, n_heads, group, n_queries, n_keys, mask_b, mask_h, mask_q, n_splits,
    stride_dout_b, stride_dout_h, stride_dout_s, stride_q_b, stride_q_h, stride_q_s,
    stride_k_b, stride_k_h, stride_k_s, stride_v_b, stride_v_h, stride_v_s,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_key_mask_b, stride_key_mask_k,
    stride_lse_b, stride_lse_h,
    window_left, window_right, scale, factor, softcap, threshold, keep_scale,
    D: tl.constexpr, D_COLS: tl.constexpr, DV: tl.constexpr, DV_COLS: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, SOFTCAP: tl.constexpr, MASK_VEC: tl.constexpr, DROPOUT: tl.constexpr,
    LOWER: tl.constexpr, UPPER: tl.constexpr, LOWER_RIGHT: tl.constexpr, SUM_Q: tl.constexpr,
    PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Split s of a tile of the mask (mask_b, mask_h, mask_q, n_keys): row s of partials (n_splits, mask's elements).

    A split goes over its share of all tiles of logits that the tile of the mask was added to.
    """
    pid = tl.program_id(0)
    split = pid % n_splits
    rest = pid // n_splits
    key_tiles, row_tiles = tl.cdiv(n_keys, BLOCK_N), tl.cdiv(n_queries, BLOCK_M)
    own_row_tiles = tl.cdiv(mask_q, BLOCK_M)
    key_tile = rest % key_tiles
    rest = rest // key_tiles
    own_row_tile = rest % own_row_tiles
    rest = rest // own_row_tiles
    own_head, own_batch = rest % mask_h, rest // mask_h
    lower, upper = band(n_queries, n_keys, window_left, window_right, LOWER_RIGHT)
    lanes = tl.arange(0, BLOCK_M)

    # how many tiles along each dimension, and all of them shared out
    along_q = row_tiles if SUM_Q else 1
    along_h = n_heads // mask_h
    work = along_q * (n_batches // mask_b).to(tl.int64) * along_h
    begin, end = work * split // n_splits, work * (split + 1) // n_splits
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for item in tl.range(begin, end, num_stages=1):
        row_tile = own_row_tile + (item % along_q).to(tl.int32)
        item = item // along_q
        h, b = own_head + item % along_h, own_batch + item // along_h
        kv = h // group
        first_row, first_key = row_tile * BLOCK_M, key_tile * BLOCK_N
        rows = first_row + lanes
        rows_ok = rows < n_queries
        first = first_row.to(tl.int64)
        q_head = q_ptr + (b * stride_q_b + h * stride_q_h + first * stride_q_s) * VEC
        dout_head = dout_ptr + (b * stride_dout_b + h * stride_dout_h + first * stride_dout_s) * VEC
        k_head = k_ptr + (b * stride_k_b + kv * stride_k_h) * VEC
        v_head = v_ptr + (b * stride_v_b + kv * stride_v_h) * VEC
        q = row_pointers(q_head, stride_q_s, BLOCK_M, PART if PART else D_COLS, VEC)
        dout = row_pointers(dout_head, stride_dout_s, BLOCK_M, PART if PART else DV_COLS, VEC)
        if not PART:
            q = load_rows(q, rows_ok, D, D_COLS, True)
            dout = load_rows(dout, rows_ok, DV, DV_COLS, True)
        lse_row = b * stride_lse_b + h * stride_lse_h + first
        key_mask = key_mask_ptr
        if key_mask_ptr is not None:
            key_mask = key_mask_ptr + b * stride_key_mask_b
        dlse = None
        if dlse_ptr is not None:
            dlse = tl.load(dlse_ptr + lse_row + lanes, mask=rows_ok, other=0.0)
        _, _, ds, _, _ = _tile(
            q, dout, k_head, v_head,
            tl.load(lse_ptr + lse_row + lanes, mask=rows_ok, other=0.0),
            tl.load(delta_ptr + lse_row + lanes, mask=rows_ok, other=0.0), dlse,
            rows, first_key, n_queries, n_keys, lower, upper,
            mask_ptr + (b * stride_mask_b + h * stride_mask_h + first * stride_mask_q) * MASK_VEC,
            stride_mask_q, stride_mask_k,
            key_mask, stride_key_mask_k, seed_ptr, lse_row,
            stride_k_s, stride_v_s, scale, factor, softcap, threshold, keep_scale,
            PRECISION, False, SOFTCAP, "additive", MASK_VEC, DROPOUT, True, LOWER, UPPER, PART,
            D, D_COLS, DV, DV_COLS, VEC, BLOCK_M, BLOCK_N,
        )
        if inverse_ptr is not None:
            ds = ds * tl.load(inverse_ptr + lse_row + lanes, mask=rows_ok, other=0.0)[:, None]
        total += ds

    size = (n_keys // MASK_VEC * MASK_VEC).to(tl.int64) * mask_q  # the compiler sees whole vectors
    partials_ptr += (split.to(tl.int64) * mask_b * mask_h + own_batch * mask_h + own_head) * size
    if SUM_Q:
        total = tl.broadcast_to(tl.sum(total, 0)[None, :], [BLOCK_M, BLOCK_N])
    own_rows, keys = own_row_tile * BLOCK_M + lanes, key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    at = own_rows.to(tl.int64)[:, None] * (n_keys // MASK_VEC * MASK_VEC) + keys[None, :]
    ok = (own_rows < mask_q)[:, None] & keys_of_mask(keys, n_keys, MASK_VEC)[None, :]
    tl.store(partials_ptr + at, total, mask=ok)
