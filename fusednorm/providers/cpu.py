"""The native CPU provider: the library behind ``torch.ops.fusednorm_cpu``, loaded when it is first asked for."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[1] / "libfusednorm_cpu.so"
BUILD = (
    "python setup.py build_ext --inplace in a source checkout, or pip install --no-build-isolation --force-reinstall "
    "--no-deps with the path of one (a C++ compiler has to be there)"
)

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_OPERATORS = (
    *("add_layer_norm_fwd", "add_norm_bare", "add_layer_norm_bwd"),
    *("bias_act_dropout_fwd", "bias_act_bare", "bias_act_dropout_bwd", "dropout_mask"),
)
_forward: Any = None  # the operators' overloads, once the library is loaded
_bare: Any = None
_backward: Any = None
activation_fwd: Any = None  # for cpu_activation.py
activation_bare: Any = None
activation_bwd: Any = None
dropout_mask: Any = None  # (seed, rows, columns, p) -> bool tensor


def unavailable_reason() -> str | None:
    return _load()


@functools.cache
def _load() -> str | None:
    """Load the library; what went wrong, or None."""
    global _forward, _bare, _backward, activation_fwd, activation_bare, activation_bwd, dropout_mask
    if not LIBRARY.exists():
        return f"its library is not built; type: {BUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
        ops = torch.ops.fusednorm_cpu
        # the overload's own call adds a microsecond to what is inside it
        _forward, _bare, _backward, activation_fwd, activation_bare, activation_bwd, dropout_mask = (
            getattr(getattr(ops, name).default, "_op", getattr(ops, name).default) for name in _OPERATORS
        )
    except Exception as fault:  # a file for another machine or torch, or half of one: whatever it is, not usable
        return f"{LIBRARY} does not load into torch {torch.__version__}: {fault}; build it anew: {BUILD}"
    return None


def build() -> str:
    """What the loaded library was built for and runs here, the instruction set in use first."""
    return f"instruction sets {', '.join(torch.ops.fusednorm_cpu.instruction_sets().split())}"


def refusal(op: str, *args: Any) -> str | None:
    x = args[0]
    return None if x.is_cpu or x.is_meta else f"x is on {x.device}, its kernels run on the CPU"


def reluctance(op: str, *args: Any) -> str | None:
    """Why automatic choice does not take a call that this provider could serve."""
    if op == "add_layer_norm_fwd" and args[1] is None and not args[15]:
        return "torch's own operators serve a norm with nothing to add"
    return None


def slower(op: str, *args: Any) -> str | None:
    """Why automatic choice does not take a call of such a shape."""
    x, residual = args[:2]
    bare = residual is not None and args[4] is args[5] is args[6] is None and not args[14]
    if bare and x.dtype is residual.dtype is args[11] is args[12]:
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4])
        if torch_is_faster(x, needs_grad):
            return "torch's own operators are faster on so few elements or columns"
    return None


def torch_is_faster(x: Tensor, needs_grad: bool) -> bool:
    """Whether an addition and a norm of torch's beat this provider on x's shape.

    One thread of a shared machine: rows of 16 ran at 0.7 of eager's speed, and forward with backward at 0.6 on few
    elements (an autograd Function of Python's is 20 microseconds), even at 2**17, 1.2 to 1.5 times as fast beyond.
    """
    return x.ndim > 0 and (x.shape[-1] < 64 or (needs_grad and x.numel() < 1 << 17))


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


def add_norm_bare(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_ndim: int, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """(normed, residual_out) of a call without epilogue whose gradient nobody will ask for."""
    options = _options(normalized_ndim, x.dtype, residual.dtype, rms, False, True)
    return _bare(x, residual, weight, bias, options, eps)


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
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, residual, weight, bias, x_bias, layer_scale); None where not wanted."""
    options = _options(
        *(normalized_ndim, x_dtype, residual_dtype, rms, zero_centered_weight, False, saved_is_normed),
        tuple(output_mask),
    )
    return _backward(
        *(dnormed, dresidual_out, saved, stats, weight, bias, x, x_bias, layer_scale, seed),
        *(options, dropout_p, drop_path_p),
    )
