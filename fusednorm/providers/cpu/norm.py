"""The native CPU provider: the library behind ``torch.ops.fusednorm_cpu``, loaded when it is first asked for."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..._dtypes import compute_dtype
from ..._once import once
from ..._options import Inputs, NormGradOptions, NormInputs, NormOptions, NormSaved, Options
from ..native import check_activations, check_whole, packed_norm, packed_norm_grad, too_many_dimensions

LIBRARY = Path(__file__).parents[2] / "libfusednorm_cpu.so"
BUILD = (
    "python setup.py build_ext --inplace in a source checkout, or pip install --no-build-isolation --force-reinstall "
    "--no-deps with the path of one (a C++ compiler has to be there)"
)

_OPERATORS = (
    *("add_layer_norm_fwd", "add_layer_norm_bwd"),
    *("bias_act_dropout_fwd", "bias_act_dropout_bwd", "dropout_mask"),
    *("attention_fwd", "attention_bwd", "all_bounded"),
)
_forward: Any = None  # the operators' overloads, once the library is loaded
_backward: Any = None
activation_fwd: Any = None  # for activation.py
activation_bwd: Any = None
dropout_mask: Any = None  # (seed, rows, columns, p) -> bool tensor
attention_forward: Any = None  # for attention.py
attention_backward: Any = None
all_bounded: Any = None  # (tensor, tensor or None, tensor or None) -> bool


def unavailable_reason() -> str | None:
    return _load()


@once
def _load() -> str | None:
    """Load the library; what went wrong, or None."""
    global _forward, _backward, activation_fwd, activation_bwd, dropout_mask
    global attention_forward, attention_backward, all_bounded
    if not LIBRARY.exists():
        return f"its library is not built; type: {BUILD}"
    try:
        check_whole(LIBRARY)
        torch.ops.load_library(str(LIBRARY))
        check_activations(LIBRARY)
        ops = torch.ops.fusednorm_cpu
        # the overload's own call adds a microsecond to what is inside it
        found = [getattr(getattr(ops, name).default, "_op", getattr(ops, name).default) for name in _OPERATORS]
        _forward, _backward, activation_fwd, activation_bwd, dropout_mask = found[:-3]
        attention_forward, attention_backward, all_bounded = found[-3:]
    except Exception as fault:  # a file for another machine or torch, or half of one: whatever it is, not usable
        return f"{LIBRARY} does not load into torch {torch.__version__}: {fault}; build it anew: {BUILD}"
    return None


def build() -> str:
    """What the loaded library was built for and runs here, the instruction set in use first."""
    return f"instruction sets {', '.join(torch.ops.fusednorm_cpu.instruction_sets().split())}"


@functools.cache
def vendor() -> str:
    """Who made the processor: "amd", "intel", or "" for others."""
    with _disable_current_modes():  # no operator of the call that happens to ask first
        return str(torch.ops.fusednorm_cpu.vendor())


def refusal(op: str, inputs: Inputs, options: Options) -> str | None:
    x = inputs[0]
    if not (x.is_cpu or x.is_meta):
        return f"x is on {x.device}, its kernels run on the CPU"
    return too_many_dimensions(x)


def add_layer_norm_fwd(inputs: NormInputs, options: NormOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, residual_out, stats)."""
    if not inputs.x.numel():  # rows without columns: there may be more of them than memory for statistics
        return _empty(inputs.x, options)
    return _forward(*inputs, packed_norm(options), options.eps, options.dropout_p, options.drop_path_p)


def _empty(x: Tensor, options: NormOptions) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[: x.ndim - options.normalized_ndim].numel()
    stats = x.new_full((1 if options.rms else 2, 1), math.nan, dtype=compute_dtype(x.dtype, options.residual_dtype))
    residual_out = x.new_empty(x.shape if options.store_residual else (0,), dtype=options.residual_dtype)
    return x.new_empty(x.shape, dtype=options.normed_dtype), residual_out, stats.expand(-1, rows)


def add_layer_norm_bwd(
    dnormed: Tensor, dresidual_out: Tensor | None, saved: NormSaved, options: NormGradOptions, output_mask: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, residual, weight, bias, x_bias, layer_scale); None where not wanted."""
    # Hooks on saved tensors may bring the statistics back with other strides.
    saved = saved._replace(stats=saved.stats.contiguous())
    switches = packed_norm_grad(options, tuple(output_mask))
    return _backward(dnormed, dresidual_out, *saved, switches, options.dropout_p, options.drop_path_p)
