"""Compiling and launching Triton kernels under our own keys.

A variant is named by the dtypes of its pointers and its constants, never by a row count: sizes and strides are run-time
numbers of fixed width. What ``triton.jit`` would rediscover in each call (the type, divisibility and alignment of every
argument) the provider knows, so a launch is one look-up. The code-generation gate compiles through the same function.

A kernel's parameters stand in this order: pointers (``*_ptr``), numbers, constants.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
NUMBER_TYPES = {  # every other number is an i64
    "n_units": "i32",
    "eps": "fp32",
    "scale": "fp32",
    "path_scale": "fp32",
    "threshold": "u32",
    "path_threshold": "u32",
    "P": "i32",
}
_compiled: dict[tuple[Any, ...], Any] = {}


def compile_kernel(
    function: Any,
    dtypes: Sequence[torch.dtype | None],
    constants: Sequence[Any],
    *,
    warps: int,
    stages: int,
    aligned: bool,
    target: GPUTarget,
) -> Any:
    """Compile one variant ahead of time. A pointer of dtype None is absent.

    `aligned` promises that every pointer is a multiple of 16 bytes.
    """
    names = list(inspect.signature(function.fn).parameters)
    pointers, numbers = names[: len(dtypes)], names[len(dtypes) : len(names) - len(constants)]
    signature = dict.fromkeys(names, "constexpr")
    signature.update({n: POINTER_TYPES[dtype] for n, dtype in zip(pointers, dtypes, strict=True) if dtype is not None})
    signature.update({n: NUMBER_TYPES.get(n, "i64") for n in numbers})
    if "eps" in numbers and torch.float64 in dtypes:
        signature["eps"] = "fp64"
    values: dict[str, Any] = {n: None for n in pointers if signature[n] == "constexpr"}
    values.update(zip(names[len(names) - len(constants) :], constants, strict=True))
    attributes = {}
    if aligned:
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in pointers if signature[n] != "constexpr"}
    source = ASTSource(function, signature, values, attributes)
    # floating-point fusion by name: its default differs between versions of Triton
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def launch(
    function: Any,
    grid: tuple[int, int],
    pointers: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    *,
    warps: int,
    stages: int = 1,
    aligned: bool,
) -> None:
    """Run a kernel on the first pointer's device, on its current stream."""
    if isinstance(function, InterpretedFunction):
        function[grid](*pointers, *numbers, *constants, num_warps=warps)
        return
    device = pointers[0].device  # type: ignore[union-attr]
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(function, grid, pointers, numbers, constants, warps=warps, stages=stages, aligned=aligned)
    dtypes = tuple([None if t is None else t.dtype for t in pointers])
    key = (function, device.index, dtypes, constants, warps, stages, aligned)
    compiled = _compiled.get(key)
    if compiled is None:
        target = triton.runtime.driver.active.get_current_target()
        compiled = _compiled[key] = compile_kernel(
            function, dtypes, constants, warps=warps, stages=stages, aligned=aligned, target=target
        )
    compiled[(*grid, 1)](*pointers, *numbers, *constants)
