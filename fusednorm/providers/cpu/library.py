"""The library of the CPU provider, behind ``torch.ops.fusednorm_cpu``, loaded when it is first asked for."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..._once import once
from ..._options import Inputs, Options
from ..native import check_activations, check_not_truncated, load_failure, too_many_dimensions

LIBRARY = Path(__file__).parents[2] / "libfusednorm_cpu.so"
BUILD = (
    "python setup.py build_ext --inplace in a source checkout, or pip install --no-build-isolation --force-reinstall "
    "--no-deps with the path of one (a C++ compiler has to be there)"
)

# the operators' overloads, once the library is loaded
add_layer_norm_fwd: Any = None
add_layer_norm_bwd: Any = None
bias_act_dropout_fwd: Any = None
bias_act_dropout_bwd: Any = None
attention_fwd: Any = None
attention_bwd: Any = None
dropout_mask: Any = None  # (seed, rows, columns, p) -> bool tensor
all_bounded: Any = None  # (tensor, tensor or None, tensor or None) -> bool
transposed: Any = None  # (contiguous float32 matrix) -> its transpose, contiguous
few_rows: Any = None  # (x of at most 8 rows, weight, bias or None) -> x W^T + bias, all contiguous and of one dtype
_OPERATORS = (
    *("add_layer_norm_fwd", "add_layer_norm_bwd", "bias_act_dropout_fwd", "bias_act_dropout_bwd"),
    *("attention_fwd", "attention_bwd", "dropout_mask", "all_bounded", "transposed", "few_rows"),
)


def unavailable_reason() -> str | None:
    return _load()


@once
def _load() -> str | None:
    """Load the library; what went wrong, or None."""
    if not LIBRARY.exists():
        return f"its library is not built; type: {BUILD}"
    try:
        check_not_truncated(LIBRARY)
        torch.ops.load_library(str(LIBRARY))
        check_activations(LIBRARY)
        for name in _OPERATORS:
            overload = getattr(torch.ops.fusednorm_cpu, name).default
            globals()[name] = getattr(overload, "_op", overload)  # an overload's own call adds a microsecond
    except Exception as fault:  # a file for another machine or torch, or half of one: whatever it is, not usable
        return load_failure(LIBRARY, fault, BUILD)
    return None


def build() -> str:
    """What the loaded library was built for and runs here, the instruction set in use first."""
    return f"instruction sets {', '.join(torch.ops.fusednorm_cpu.instruction_sets().split())}"


@functools.cache
def vendor() -> str:
    """Who made the processor: "amd", "intel", or "" for others."""
    with _disable_current_modes():  # an active mode of the first caller is not to see this operator
        return str(torch.ops.fusednorm_cpu.vendor())


def runs_on() -> str:
    """The kind of device whose tensors the kernels take."""
    return "cpu"


def refusal(op: str, inputs: Inputs, options: Options) -> str | None:
    return too_many_dimensions(inputs[0])
