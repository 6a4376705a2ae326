"""Parameters' gradients without atomics: each program's partial sums, and a kernel that adds them in a fixed order."""

# fmt: off
# One line a group of arguments: one line an argument would bury the kernels under their own signatures.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def flush(partials_ptr, accumulators, plane, program, column, N, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, P):
    """One program's partial sums of one parameter gradient: row `program` of plane `plane` of (K, P, N)."""
    base = (plane * P + program).to(tl.int64) * N
    for c in tl.static_range(CHUNKS):
        cols = column + c * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(partials_ptr + base + cols, tl.sum(accumulators[c], axis=0), mask=cols < N)


@triton.jit
def _sum_partials_kernel(
    partials_ptr, gradient0_ptr, gradient1_ptr, gradient2_ptr, gradient3_ptr, P, n_units,
    VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Sums the P partials of each column, always in the same order; one gradient a plane (second grid axis).

    Planes are numbered over the gradients that are there.
    """
    N = n_units * VEC
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
    gradients = (gradient0_ptr, gradient1_ptr, gradient2_ptr, gradient3_ptr)
    index = 0
    for k in tl.static_range(4):
        if gradients[k] is not None:
            if plane == index:
                tl.store(gradients[k] + cols, gradient.to(gradients[k].dtype.element_ty), mask=cols < N)
            index += 1
