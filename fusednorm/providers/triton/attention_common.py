"""What the Triton attention kernels share: sequences, the band of visible keys, logits, and products that select.

Positions are 32-bit, addresses 64-bit. `rows` are queries and `keys` are keys; a tile of logits is [queries, keys], or
transposed, and both come in already shaped ([M, 1] and [1, N], or the other way round), so that what is elementwise
does not know which. FOLD: logits stay as the matrix units give them, and factor = scale log2(e) is folded into the
exponent; else they are natural ones. PRECISION is that of float32 products; "ieee" for float32 operands alone. Columns
lie one after another, and strides are numbers of VEC elements, 16 bytes. With MASK_VEC > 1 that holds for attn_mask
and MASK_VEC too, and keys are a multiple of it; else attn_mask has strides of elements.
"""

# fmt: off
# One line a group of arguments: one line an argument would bury the kernels under their own signatures.

from __future__ import annotations

import math

import triton
import triton.language as tl

from .tile import PHILOX_ROUNDS

LOG2E = tl.constexpr(math.log2(math.e))
# ln(2) in two parts: a product of the first, of 12 bits, with an exponent is exact
_LN2_HIGH = tl.constexpr(0.693145751953125)
_LN2_LOW = tl.constexpr(1.428606820309417e-06)
RARE = tl.constexpr(16)  # rows or keys at a step where a result is made again
RARE_COLUMNS = tl.constexpr(64)  # of the result at a time: all of a wide head beside what products take would spill
_SCANNED = tl.constexpr(1024)  # entries of a key mask at a step


@triton.jit
def program(n_tiles, n_heads, REVERSED: tl.constexpr):
    """(tile, head, batch) of a program; with a causal mask the longest tiles of a head go first."""
    pid = tl.program_id(0)
    tile = pid % n_tiles
    if REVERSED:
        tile = n_tiles - 1 - tile
    rest = pid // n_tiles
    return tile, rest % n_heads, rest // n_heads


@triton.jit
def sequence(cu_seqlens_ptr, batch, length):
    """Where a sequence begins in its packed tensor, and its length; a batch that is not packed begins at 0."""
    if cu_seqlens_ptr is None:
        return tl.zeros([], tl.int32), length
    else:
        start = tl.load(cu_seqlens_ptr + batch)
        return start, tl.load(cu_seqlens_ptr + batch + 1) - start


@triton.jit
def band(n_queries, n_keys, window_left, window_right, LOWER_RIGHT: tl.constexpr):
    """Query i sees key j if lower <= j - i <= upper."""
    offset = n_queries * 0
    if LOWER_RIGHT:
        offset = n_keys - n_queries
    return offset - window_left, offset + window_right


@triton.jit
def tiles(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Tiles of what is seen at all, [0] to [3], of which those from [1] to [2] are seen in full."""
    first = low // BLOCK
    last = tl.maximum((high + BLOCK - 1) // BLOCK, first)
    full_first = (full_low + BLOCK - 1) // BLOCK
    full_last = tl.maximum(full_high, 0) // BLOCK
    if full_last <= full_first:
        full_first = first
        full_last = first
    return first, full_first, full_last, last


@triton.jit
def row_pointers(ptr, stride, BLOCK: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr):
    """Pointers to a tile's first rows. A tile spans less than 2**31 elements."""
    rows = tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    return ptr + (rows * (stride.to(tl.int32) * VEC) + cols)


@triton.jit
def load_rows(pointers, ok, N_COLS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr):
    """A tile; zeros where rows are not ok, and past the last column."""
    cols = tl.arange(0, COLS)[None, :]
    if MASKED:
        if N_COLS == COLS:
            return tl.load(pointers, mask=ok[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=ok[:, None] & (cols < N_COLS), other=0.0)
    else:
        if N_COLS == COLS:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=cols < N_COLS, other=0.0)


@triton.jit
def products_in_parts(
    a, a_ok, b, b_ok, first, WIDTH: tl.constexpr, N_COLS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):
    """a @ b^T, given pointers to the first WIDTH columns of both.

    Operands of all columns would be loaded before the loop over tiles where they do not change, and matrix units that
    read registers would keep them there.
    """
    total = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    for column in tl.range(0, COLS + tl.minimum(first, 0), WIDTH, num_stages=1, disable_licm=True):
        there = column + tl.arange(0, WIDTH)[None, :] < N_COLS
        part = tl.load(b + column, mask=b_ok[:, None] & there, other=0.0)
        total = tl.dot(
            tl.load(a + column, mask=a_ok[:, None] & there, other=0.0), tl.trans(part), total, input_precision=PRECISION
        )
    return total


@triton.jit
def store_rows(pointers, tile, ok, N_COLS: tl.constexpr, COLS: tl.constexpr):
    cols = tl.arange(0, COLS)[None, :]
    mask = ok[:, None] if N_COLS == COLS else ok[:, None] & (cols < N_COLS)
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def store_columns(ptr, stride, tile, column, ok, N_COLS: tl.constexpr, VEC: tl.constexpr):
    """`tile` into the columns from `column` on."""
    pointers = row_pointers(ptr, stride, tile.shape[0], tile.shape[1], VEC) + column
    cols = column + tl.arange(0, tile.shape[1])[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=ok[:, None] & (cols < N_COLS))


@triton.jit
def seen_keys(key_mask_ptr, stride, n_keys):
    """The first key that a key mask shows, one past the last, and whether all between are shown."""
    lanes = tl.arange(0, _SCANNED)
    first = tl.full([_SCANNED], 0, tl.int32) + n_keys
    last = tl.zeros([_SCANNED], tl.int32)
    count = tl.zeros([_SCANNED], tl.int32)
    for start in tl.range(0, n_keys, _SCANNED, num_stages=1):
        keys = start + lanes
        shown = tl.load(key_mask_ptr + keys.to(tl.int64) * stride, mask=keys < n_keys, other=0) != 0
        first = tl.minimum(first, tl.where(shown, keys, n_keys))
        last = tl.maximum(last, tl.where(shown, keys + 1, 0))
        count += shown.to(tl.int32)
    low, high = tl.min(first, 0), tl.max(last, 0)
    return low, high, tl.sum(count, 0) == high - low


@triton.jit
def key_range(
    first_row, n_queries, n_keys, lower, upper, key_mask_ptr, stride_key_mask,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOWER: tl.constexpr, UPPER: tl.constexpr, ALL_MASKED: tl.constexpr,
):
    """Tiles of keys that a tile of queries sees, as `tiles` has them."""
    last_row = tl.minimum(first_row + BLOCK_M, n_queries) - 1
    low, high = n_keys * 0, n_keys
    solid = high == n_keys
    if key_mask_ptr is not None:
        low, high, solid = seen_keys(key_mask_ptr, stride_key_mask, n_keys)
    full_low, full_high = low, high
    if LOWER:
        low = tl.maximum(low, first_row + lower)
        full_low = tl.maximum(full_low, last_row + lower)
    if UPPER:
        high = tl.minimum(high, last_row + upper + 1)
        full_high = tl.minimum(full_high, first_row + upper + 1)
    if ALL_MASKED:
        full_high = low * 0
    elif key_mask_ptr is not None:
        full_high = tl.where(solid, full_high, 0)
    return tiles(low, high, full_low, full_high, BLOCK_N)


@triton.jit
def tanh(x):
    """Within two roundings (Cephes' tanhf); tanh of the difference of exponentials loses the small ones."""
    square = x * x
    series = ((2.06390887954e-2 - 5.70498872745e-3 * square) * square - 5.37397155531e-2) * square
    series = (series + 1.33314422036e-1) * square - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * (square * series), tl.where(x < 0, -large, large))


@triton.jit
def visible_tile(
    rows, keys, ok, lower, upper, mask, LOWER: tl.constexpr, UPPER: tl.constexpr, MASK: tl.constexpr,
):
    """`ok` says which of rows and keys there are; `mask` is attn_mask's tile."""
    visible = ok
    if LOWER:
        visible = visible & (keys - rows >= lower)
    if UPPER:
        visible = visible & (keys - rows <= upper)
    if MASK == "bool":
        visible = visible & mask
    elif MASK == "additive":
        visible = visible & (mask != float("-inf"))
    return visible


@triton.jit
def mask_offset(rows, keys, stride_q, stride_k, MASK_VEC: tl.constexpr):
    """Where attn_mask or its gradient has these rows and keys."""
    if MASK_VEC > 1:
        return rows * (stride_q * MASK_VEC) + keys
    else:
        return rows * stride_q + keys * stride_k


@triton.jit
def keys_of_mask(keys, n_keys, MASK_VEC: tl.constexpr):
    """Which keys there are, the same for all of a vector: else it would be read an element at a time."""
    return keys // MASK_VEC < n_keys // MASK_VEC


@triton.jit
def load_mask(
    mask_ptr, lanes_q, lanes_k, ok, rows_ok, keys, n_keys, stride_q, stride_k,
    MASK: tl.constexpr, MASK_VEC: tl.constexpr,
):
    """The tile of attn_mask at mask_ptr; a dimension along which it is broadcast has stride 0."""
    if MASK == "none":
        return ok
    else:  # a tile spans less than 2**31 elements
        if MASK_VEC > 1:
            ok = rows_ok & keys_of_mask(keys, n_keys, MASK_VEC)
        pointers = mask_ptr + mask_offset(lanes_q, lanes_k, stride_q.to(tl.int32), stride_k.to(tl.int32), MASK_VEC)
        if MASK == "bool":
            return tl.load(pointers, mask=ok, other=0) != 0
        else:
            return tl.load(pointers, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def capped(products, scale, softcap, FOLD: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits before any mask, and the capped ones' derivative by the others."""
    if FOLD:
        return products, 1.0
    else:
        logits = products * scale
        if SOFTCAP:
            bent = tanh(logits / softcap)
            return softcap * bent, 1.0 - bent * bent
        else:
            return logits, 1.0


@triton.jit
def _exp(x, PRECISION: tl.constexpr):
    """exp(x). For float32 operands within two roundings of it: that of x log2(e) alone would be |x| / 2 of them."""
    if PRECISION == "ieee":
        x = tl.where(x < -150.0, -150.0, x)  # 0 all the same, and not -inf - -inf
        n = tl.floor(x * LOG2E + 0.5)
        rest = (x - n * _LN2_HIGH) - n * _LN2_LOW
        return tl.exp2(rest * LOG2E) * tl.exp2(n)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def powers(logits, largest, factor, FOLD: tl.constexpr, PRECISION: tl.constexpr):
    """exp(logits - largest), of natural logits; `largest` is of their shape or broadcasts to it."""
    if FOLD:
        return tl.exp2(logits * factor - largest * factor)
    else:
        return _exp(logits - largest, PRECISION)


@triton.jit
def weights(logits, lse, factor, FOLD: tl.constexpr, PRECISION: tl.constexpr):
    """Probabilities, given the natural logarithm of their sum."""
    if FOLD:
        return tl.exp2(logits * factor - lse * LOG2E)
    else:
        return _exp(logits - lse, PRECISION)


@triton.jit
def kept(
    seed_ptr, first_row, first_key, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):
    """Which weights dropout keeps: rows of the mask from the 64-bit first_row on, one Philox call for four keys.

    The seed is loaded here, for each tile: what follows from it alone would else stay in registers from tile to tile.
    """
    seed = tl.load(seed_ptr)
    rows = first_row + tl.arange(0, BLOCK_M)
    low, high = (rows & 0xFFFFFFFF).to(tl.uint32), (rows >> 32).to(tl.uint32)
    quads = (first_key // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)
    if TRANSPOSED:
        zero = tl.zeros([BLOCK_N // 4, BLOCK_M], tl.uint32)
        low, high, quads = low[None, :], high[None, :], quads[:, None]
    else:
        zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
        low, high, quads = low[:, None], high[:, None], quads[None, :]
    w0, w1, w2, w3 = tl.philox(seed, zero + quads, zero + low, zero + high, zero, n_rounds=PHILOX_ROUNDS)
    four = tl.join(tl.join(w0 >= threshold, w2 >= threshold), tl.join(w1 >= threshold, w3 >= threshold))
    if TRANSPOSED:
        return tl.permute(four.reshape(BLOCK_N // 4, BLOCK_M, 4), 0, 2, 1).reshape(BLOCK_N, BLOCK_M)
    else:
        return four.reshape(BLOCK_M, BLOCK_N)


@triton.jit
def all_finite(tile):
    return tl.max(tl.max(tl.where(tl.abs(tile) < float("inf"), 0, 1), 1), 0) == 0


@triton.jit
def add_visible(
    accumulator, factors, visible, ptr, stride, first, n_rows, column,
    BLOCK: tl.constexpr, N_COLS: tl.constexpr, VEC: tl.constexpr,
):
    """accumulator + factors @ x of only what is visible: 0 * NaN would be NaN. Of x the columns from `column` on.

    A row of x at a time, outside the matrix units: for the rare tiles whose plain product was not finite.
    """
    lanes = tl.arange(0, BLOCK)[None, :]
    cols = column + tl.arange(0, accumulator.shape[1])
    for n in tl.range(0, tl.minimum(n_rows - first, BLOCK), num_stages=1):
        here = visible & (lanes == n)
        factor = tl.sum(tl.where(here, factors, 0.0), 1)
        seen = tl.max(here.to(tl.int32), 1) != 0
        row = ptr + (first + n).to(tl.int64) * (stride * VEC)
        x = tl.load(row + cols, mask=cols < N_COLS, other=0.0).to(accumulator.dtype)
        accumulator += tl.where(seen[:, None], factor[:, None] * x[None, :], 0.0)
    return accumulator
