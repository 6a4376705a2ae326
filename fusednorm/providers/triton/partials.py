"""Parameters' gradients without atomics: each program's partial sums, and a kernel that adds them in a fixed order."""

# fmt: off
# One line a group of arguments: one line an argument would bury the kernels under their own signatures.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def flush(
    partials_ptr, gradient_ptr, accumulators, plane, row, rows, column, N, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
):
    """One program's sums of one parameter gradient; returns the plane of the next one's.

    They go to a row of partials, (K, rows, N), or to that row of the gradient where no other program has a share in it.
    """
    if gradient_ptr is None:
        base = (plane * rows + row).to(tl.int64) * N
        target, following = partials_ptr, plane + 1
    else:
        base = row.to(tl.int64) * N
        target, following = gradient_ptr, plane
    for c in tl.static_range(CHUNKS):
        cols = column + c * BLOCK_N + tl.arange(0, BLOCK_N)
        sums = tl.sum(accumulators[c], axis=0)
        tl.store(target + base + cols, sums.to(target.dtype.element_ty), mask=cols < N)
    return following


@triton.jit
def _sum_partials_kernel(
    partials_ptr, gradient0_ptr, gradient1_ptr, gradient2_ptr, gradient3_ptr, P, n_units,
    PER_SAMPLE: tl.constexpr, VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Sums the P partials of each column, always in the same order; one gradient a plane (second grid axis).

    Planes are numbered over the gradients that are there. A bit of PER_SAMPLE is set for each plane that has P partials
    for each sample: the first axis then has the columns of each sample, and other planes have the partials of all.
    """
    N = n_units * VEC
    block, plane = tl.program_id(0), tl.program_id(1)
    base, first = plane.to(tl.int64) * P * N, 0
    if PER_SAMPLE:
        blocks = tl.cdiv(N, BLOCK_N)
        samples, sample, block = tl.num_programs(0) // blocks, block // blocks, block % blocks
        own = (PER_SAMPLE >> plane) & 1
        first = sample.to(tl.int64) * N
        base = base * samples + first * P
        P = tl.where(own == 1, P, tl.where(sample == 0, P * samples, 0))
    cols = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], partials_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK_P):
        partial_rows = start + tl.arange(0, BLOCK_P)
        mask = (partial_rows < P)[:, None] & (cols < N)[None, :]
        offset = base + partial_rows.to(tl.int64)[:, None] * N + cols[None, :]
        total += tl.load(partials_ptr + offset, mask=mask, other=0.0)
    gradient = tl.sum(total, axis=0)
    columns = tl.where(P > 0, N, 0) if PER_SAMPLE else N
    gradients = (gradient0_ptr, gradient1_ptr, gradient2_ptr, gradient3_ptr)
    index = 0
    for k in tl.static_range(4):
        if gradients[k] is not None:
            if plane == index:
                tl.store(gradients[k] + first + cols, gradient.to(gradients[k].dtype.element_ty), mask=cols < columns)
            index += 1
