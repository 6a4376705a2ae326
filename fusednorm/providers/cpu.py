"""The native CPU provider: the library behind ``torch.ops.fusednorm_cpu``, loaded when it is first asked for."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[1] / "libfusednorm_cpu.so"
BUILD = (
    "python setup.py build_ext --inplace in a source checkout, or pip install --no-build-isolation --no-binary :all: "
    "--force-reinstall --no-deps fusednorm (each needs a C++ compiler)"
)

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_forward: Any = None  # the operators' overloads, once the library is loaded
_backward: Any = None


def unavailable_reason() -> str | None:
    return _load()


@functools.cache
def _load() -> str | None:
    """Load the library; what went wrong, or None."""
    global _forward, _backward
    if not LIBRARY.exists():
        return f"its library is not built; type: {BUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
        _forward = torch.ops.fusednorm_cpu.add_layer_norm_fwd.default
        _backward = torch.ops.fusednorm_cpu.add_layer_norm_bwd.default
    except Exception as fault:  # a file for another machine or torch, or half of one: whatever it is, not usable
        return f"{LIBRARY} does not load into torch {torch.__version__}: {fault}; build it anew: {BUILD}"
    return None


def build() -> str:
    """What the library was built for, the instruction set in use first."""
    return _load() or f"instruction sets {torch.ops.fusednorm_cpu.instruction_sets()}"


def refusal(op: str, *args: Any) -> str | None:
    x = args[0]
    return None if x.is_cpu or x.is_meta else f"x is on {x.device}, its kernels run on the CPU"


@functools.lru_cache(1024)
def _options(
    normalized_ndim: int,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    rms: bool,
    zero_centered_weight: bool,
    store_residual: bool,
    saved_is_normed: bool = False,
    output_mask: tuple[bool, ...] = (),
) -> int:
    """All switches in one integer, as csrc/cpu/norm_ops.cpp takes them apart."""
    bits = normalized_ndim | _DTYPES[dtype] << 7 | _DTYPES[residual_dtype] << 9
    switches = (rms, zero_centered_weight, store_residual, saved_is_normed, *output_mask)
    return bits | sum(bool(switch) << 11 + i for i, switch in enumerate(switches))


def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    eps: float,
    dropout_p: float,
    drop_path_p: float,
    normed_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    rms: bool,
    zero_centered_weight: bool,
    store_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, residual_out, stats)."""
    options = _options(normalized_ndim, normed_dtype, residual_dtype, rms, zero_centered_weight, store_residual)
    return _forward(x, residual, weight, bias, x_bias, layer_scale, seed, options, eps, dropout_p, drop_path_p)


def add_layer_norm_bwd(
    dnormed: Tensor,
    dresidual_out: Tensor | None,
    saved: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    dropout_p: float,
    drop_path_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    rms: bool,
    zero_centered_weight: bool,
    saved_is_normed: bool,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of (x, residual, weight, bias, x_bias, layer_scale)."""
    options = _options(
        *(normalized_ndim, x_dtype, residual_dtype, rms, zero_centered_weight, False, saved_is_normed),
        tuple(output_mask),
    )
    return _backward(
        *(dnormed, dresidual_out, saved, stats, weight, bias, x, x_bias, layer_scale, seed),
        *(options, dropout_p, drop_path_p),
    )
