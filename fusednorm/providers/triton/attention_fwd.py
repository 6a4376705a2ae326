"""The Triton kernels of attention's forward: online softmax over tiles of keys, a tile of queries a program.

Tiles that every query sees in full go first, without a mask, then the others; what no query sees is not visited. Where
the result is not finite and something was masked, it is made again by a sum that leaves out what is not visible.

With SPLIT the second axis of the grid shares out the tiles of keys that a tile of queries sees. Each split writes its
own out and lse in float32. A second kernel merges them, always in the same order.
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
    load_mask,
    load_rows,
    mask_offset,
    powers,
    products_in_parts,
    program,
    row_pointers,
    sequence,
    store_columns,
    store_rows,
    visible_tile,
)


@triton.jit
def _logits(
    q, k_tile, rows, first_key, n_queries, n_keys, lower, upper,
    mask_ptr, stride_mask_q, stride_mask_k, key_mask_ptr, stride_key_mask, stride_k, scale, softcap,
    PRECISION: tl.constexpr, FOLD: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, MASK_VEC: tl.constexpr,
    MASKED: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr,
    VEC: tl.constexpr, PART: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Logits of a tile, -inf where not visible, what is visible, and which keys are there.

    The mask is loaded before the product. Else the softmax takes the mask's layout too, and Triton computes it twice.
    k_tile points to the first keys. With PART, it and q point to the first PART columns, and the product is made of so
    many columns at a time.
    """
    keys = first_key + tl.arange(0, BLOCK_N)
    there = keys < n_keys
    if MASKED and key_mask_ptr is not None:
        shown = tl.load(key_mask_ptr + keys.to(tl.int64) * stride_key_mask, mask=there, other=0)
        there = there & (shown != 0)
    visible = there[None, :]
    if MASKED:
        rows_ok = (rows < n_queries)[:, None]
        visible = visible & rows_ok
        mask_tile = mask_ptr
        if MASK != "none":
            mask_tile = mask_ptr + mask_offset(0, first_key.to(tl.int64), stride_mask_q, stride_mask_k, MASK_VEC)
        lanes_q, lanes_k = tl.arange(0, q.shape[0])[:, None], tl.arange(0, BLOCK_N)[None, :]
        mask = load_mask(
            mask_tile, lanes_q, lanes_k, visible, rows_ok, keys[None, :], n_keys, stride_mask_q, stride_mask_k,
            MASK, MASK_VEC,
        )
        visible = visible_tile(rows[:, None], keys[None, :], visible, lower, upper, mask, LOWER, UPPER, MASK)
    k_tile += first_key.to(tl.int64) * (stride_k * VEC)
    if PART:
        products = products_in_parts(q, rows < n_queries, k_tile, there, first_key, PART, D, COLS, PRECISION)
    else:
        k = load_rows(k_tile, there, D, COLS, MASKED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits, _ = capped(products, scale, softcap, FOLD, SOFTCAP)
    if MASKED:
        if MASK == "additive":
            logits += mask
        logits = tl.where(visible, logits, float("-inf"))
    return logits, visible, there


@triton.jit
def share(low, full_low, full_high, high):
    """Of tiles of keys, as `tiles` has them, those of this program's split; past the last one it has none."""
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    count = (high - low + n_splits - 1) // n_splits
    low = tl.minimum(low + split * count, high)
    high = tl.minimum(low + count, high)
    return low, tl.minimum(tl.maximum(full_low, low), high), tl.minimum(tl.maximum(full_high, low), high), high


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, key_mask_ptr, seed_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, out_ptr, lse_ptr,
    n_tiles, n_heads, group, n_queries, n_keys,
    stride_q_b, stride_q_h, stride_q_s, stride_k_b, stride_k_h, stride_k_s,
    stride_v_b, stride_v_h, stride_v_s, stride_out_b, stride_out_h, stride_out_s,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k, stride_key_mask_b, stride_key_mask_k,
    stride_lse_b, stride_lse_h,
    window_left, window_right, scale, factor, softcap, threshold, keep_scale,
    D: tl.constexpr, D_COLS: tl.constexpr, DV: tl.constexpr, DV_COLS: tl.constexpr, VEC: tl.constexpr,
    PRECISION: tl.constexpr, FOLD: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, MASK_VEC: tl.constexpr,
    DROPOUT: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr, LOWER_RIGHT: tl.constexpr, PART: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """With SPLIT, out is a float32 workspace (B, H, splits, Sq, DV), and lse one (B, H, splits, Sq)."""
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
    rows = first_row + tl.arange(0, BLOCK_M)
    rows_ok = rows < n_queries
    first = start_q.to(tl.int64) + first_row
    q_ptr += (b * stride_q_b + h * stride_q_h + first * stride_q_s) * VEC
    k_ptr += (b * stride_k_b + kv * stride_k_h + start_k.to(tl.int64) * stride_k_s) * VEC
    v_ptr += (b * stride_v_b + kv * stride_v_h + start_k.to(tl.int64) * stride_v_s) * VEC
    out_ptr += (b * stride_out_b + h * stride_out_h + first * stride_out_s) * VEC
    lse_row = b * stride_lse_b + h * stride_lse_h + first  # the row of the dropout mask too
    if SPLIT:
        rows_before = tl.program_id(1).to(tl.int64) * n_queries
        out_ptr += rows_before * stride_out_s * VEC
        lse_row += rows_before
    if mask_ptr is not None:
        mask_ptr += (b * stride_mask_b + h * stride_mask_h + first_row.to(tl.int64) * stride_mask_q) * MASK_VEC
    if key_mask_ptr is not None:
        key_mask_ptr += b * stride_key_mask_b

    COLS: tl.constexpr = PART if PART else D_COLS
    q = row_pointers(q_ptr, stride_q_s, BLOCK_M, COLS, VEC)
    if not PART:
        q = load_rows(q, rows_ok, D, D_COLS, True)
    k_tile = row_pointers(k_ptr, stride_k_s, BLOCK_N, COLS, VEC)
    v_tile = row_pointers(v_ptr, stride_v_s, BLOCK_N, DV_COLS, VEC)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, DV_COLS], tl.float32)

    low, full_low, full_high, high = key_range(
        first_row, n_queries, n_keys, lower, upper, key_mask_ptr, stride_key_mask_k,
        BLOCK_M, BLOCK_N, LOWER, UPPER, MASK != "none",
    )
    if SPLIT:
        low, full_low, full_high, high = share(low, full_low, full_high, high)
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
                logits, visible, there = _logits(
                    q, k_tile, rows, first_key, n_queries, n_keys, lower, upper,
                    mask_ptr, stride_mask_q, stride_mask_k, key_mask_ptr, stride_key_mask_k,
                    stride_k_s, scale, softcap,
                    PRECISION, FOLD, SOFTCAP, MASK, MASK_VEC, MASKED == 1, LOWER, UPPER, D, D_COLS, VEC, PART, BLOCK_N,
                )
                now = tl.maximum(largest, tl.max(logits, 1))
                # nothing seen yet: -inf - -inf would be NaN
                base = tl.where(now == float("-inf"), 0.0, now) if MASKED or SPLIT else now
                p = powers(logits, base[:, None], factor, FOLD, PRECISION)
                shrink = powers(largest, base, factor, FOLD, PRECISION)
                total = total * shrink + tl.sum(p, 1)
                if DROPOUT:
                    p = tl.where(kept(seed_ptr, lse_row, first_key, threshold, BLOCK_M, BLOCK_N, False), p, 0.0)
                v = load_rows(v_tile + first_key.to(tl.int64) * (stride_v_s * VEC), there, DV, DV_COLS, MASKED == 1)
                out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
                largest = now

    dead = total == 0.0
    divisor = tl.where(dead, 1.0, total)
    natural = scale if FOLD else 1.0
    lse = tl.where(dead, float("-inf"), largest * natural + tl.log(divisor))
    tl.store(lse_ptr + lse_row + tl.arange(0, BLOCK_M), lse, mask=rows_ok)
    if DROPOUT:
        divisor = divisor / keep_scale
    out_pointers = row_pointers(out_ptr, stride_out_s, BLOCK_M, DV_COLS, VEC)
    store_rows(out_pointers, out / divisor[:, None], rows_ok, DV, DV_COLS)
    if LOWER or UPPER or DROPOUT or MASK != "none":
        if not all_finite(out):
            base = tl.where(dead, 0.0, largest)
            begin, end = low * BLOCK_N, tl.minimum(high * BLOCK_N, n_keys)
            WIDTH: tl.constexpr = RARE_COLUMNS if DV_COLS > RARE_COLUMNS else DV_COLS
            for column in tl.range(0, DV_COLS, WIDTH, num_stages=1, disable_licm=True):
                part = tl.zeros([BLOCK_M, WIDTH], tl.float32)
                for n in tl.range(0, (end - begin + RARE - 1) // RARE, num_stages=1, disable_licm=True):
                    first_key = begin + n * RARE
                    logits, visible, there = _logits(
                        q, row_pointers(k_ptr, stride_k_s, RARE, COLS, VEC), rows, first_key,
                        n_queries, n_keys, lower, upper,
                        mask_ptr, stride_mask_q, stride_mask_k, key_mask_ptr, stride_key_mask_k,
                        stride_k_s, scale, softcap,
                        PRECISION, FOLD, SOFTCAP, MASK, MASK_VEC, True, LOWER, UPPER, D, D_COLS, VEC, PART, RARE,
                    )
                    p = powers(logits, base[:, None], factor, FOLD, PRECISION)
                    if DROPOUT:
                        visible = visible & kept(seed_ptr, lse_row, first_key, threshold, BLOCK_M, RARE, False)
                    part = add_visible(part, p, visible, v_ptr, stride_v_s, first_key, n_keys, column, RARE, DV, VEC)
                store_columns(out_ptr, stride_out_s, part / divisor[:, None], column, rows_ok, DV, VEC)



@triton.jit
def _attention_fwd_merge_kernel(
    parts_ptr, lses_ptr, out_ptr, lse_ptr, n_heads, n_queries, n_splits,
    stride_out_b, stride_out_h, stride_out_s, stride_lse_b, stride_lse_h,
    DV: tl.constexpr, DV_COLS: tl.constexpr, VEC: tl.constexpr, PRECISION: tl.constexpr,
    HIDES: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """out and lse of a query, of what the splits wrote. HIDES: whether a query may see no key."""
    pid = tl.program_id(0)
    row, rest = (pid % n_queries).to(tl.int64), pid // n_queries
    b, h = (rest // n_heads).to(tl.int64), (rest % n_heads).to(tl.int64)
    lanes, cols = tl.arange(0, BLOCK_S), tl.arange(0, DV_COLS)
    first = rest.to(tl.int64) * n_splits * n_queries + row
    largest = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for start in range(0, n_splits, BLOCK_S):
        splits = start + lanes
        rows = first + splits.to(tl.int64) * n_queries
        largest = tl.maximum(largest, tl.load(lses_ptr + rows, mask=splits < n_splits, other=float("-inf")))
    base = tl.max(largest, 0)
    if HIDES:
        base = tl.where(base == float("-inf"), 0.0, base)
    totals = tl.zeros([BLOCK_S], tl.float32)
    sums = tl.zeros([BLOCK_S, DV_COLS], tl.float32)
    for start in range(0, n_splits, BLOCK_S):
        splits = start + lanes
        there = splits < n_splits
        rows = first + splits.to(tl.int64) * n_queries
        lses = tl.load(lses_ptr + rows, mask=there, other=float("-inf"))
        weights = powers(lses, base, 1.0, False, PRECISION)
        totals += weights
        sums += weights[:, None] * load_rows(parts_ptr + rows[:, None] * DV + cols[None, :], there, DV, DV_COLS, True)
    total = tl.sum(totals, 0)
    dead = total == 0.0
    divisor = tl.where(dead, 1.0, total)
    tl.store(
        lse_ptr + b * stride_lse_b + h * stride_lse_h + row, tl.where(dead, float("-inf"), base + tl.log(divisor))
    )
    out_ptr += (b * stride_out_b + h * stride_out_h + row * stride_out_s) * VEC
    tl.store(out_ptr + cols, (tl.sum(sums, 0) / divisor).to(out_ptr.dtype.element_ty), mask=cols < DV)
