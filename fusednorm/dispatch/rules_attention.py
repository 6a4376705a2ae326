"""Whether our kernels of attention on the CPU or torch's were measured to be the faster ones, where both mean the same.

Torch's are made of the matrix products of the library that it is built with, and MKL is at its best on Intel's
processors alone. Time of torch's over time of ours, two threads (benchmarks/NOTES.md has the tables):

- AMD EPYC, Zen 5: float32 forward 1.2 to 1.9 from 16 queries on, causal up to 3.7, below 16 queries down to 0.4; with
  gradients 1.1 to 2.4 from 32 queries and 64 x 128 pairs on, below that 0.4 to 1.1. float64 alike. 16 bits: 1.2 to 25
  at every shape.
- Intel Xeon, AVX-512: float32 with gradients 0.45 to 1.06, bfloat16 with gradients 1.8 to 2.9.
"""

from __future__ import annotations

import functools

import torch

from ..providers.cpu import norm as cpu


@functools.lru_cache(4096)
def ours_is_faster(itemsize: int, n_queries: int, n_keys: int, needs_grad: bool) -> bool:
    """Whether to prefer the CPU library for elements of `itemsize` bytes; False where it is not built."""
    if cpu.unavailable_reason() is not None:
        return False
    if cpu.vendor() != "amd" or not torch.backends.mkl.is_available():
        return needs_grad and itemsize == 2
    if itemsize == 2:
        return True
    return n_queries >= 32 and n_queries * n_keys >= 64 * 128 if needs_grad else n_queries >= 16
