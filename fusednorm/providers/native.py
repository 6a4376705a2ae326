"""What the two native libraries take alike."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MOST_DIMENSIONS = 64  # kMaxDims of csrc/data.h
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.lru_cache(1024)
def options(
    normalized_ndim: int,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    rms: bool,
    zero_centered_weight: bool,
    store_residual: bool,
    saved_is_normed: bool = False,
    output_mask: tuple[bool, ...] = (),
) -> int:
    """All switches in one integer, as csrc/norm_call.h takes them apart."""
    bits = normalized_ndim | _DTYPES[dtype] << 7 | _DTYPES[residual_dtype] << 9
    switches = (rms, zero_centered_weight, store_residual, saved_is_normed, *output_mask)
    return bits | sum(bool(switch) << 11 + i for i, switch in enumerate(switches))


def too_many_dimensions(x: Tensor) -> str | None:
    """Why a native library does not take x, if it has more dimensions than fit."""
    return f"x has {x.ndim} dimensions, its kernels take {MOST_DIMENSIONS}" if x.ndim > MOST_DIMENSIONS else None
