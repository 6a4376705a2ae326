"""Compiling and launching Triton kernels under our own keys.

A variant is named by the dtypes of its pointers and its constants, never by a row count: sizes and strides are run-time
numbers of fixed width. What ``triton.jit`` would rediscover in each call (the type, divisibility and alignment of every
argument) the provider knows, so a launch is one look-up. The code-generation gate compiles through the same function.

A kernel's parameters stand in this order: pointers (``*_ptr``), numbers, constants.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
# may be views of anything, or are not padded to a multiple: read as they lie
UNALIGNED = (
    *("seed_ptr", "stats_ptr", "sums_ptr", "mask_ptr", "key_mask_ptr", "cu_seqlens_q_ptr", "cu_seqlens_k_ptr"),
    *("lse_ptr", "dlse_ptr", "inverse_ptr", "delta_ptr", "dmask_ptr"),
)
_MASKS = ("mask_ptr", "dmask_ptr")  # aligned where they are read in vectors
NUMBER_TYPES = {  # every other number is an i64
    "n_units": "i32",
    "eps": "fp32",
    "scale": "fp32",
    "path_scale": "fp32",
    "threshold": "u32",
    "path_threshold": "u32",
    "P": "i32",
    "factor": "fp32",
    "softcap": "fp32",
    "keep_scale": "fp32",
    **dict.fromkeys(("n_tiles", "n_heads", "group", "n_queries", "n_keys", "window_left", "window_right"), "i32"),
    **dict.fromkeys(("n_batches", "n_splits", "mask_b", "mask_h", "mask_q"), "i32"),
}


def compile_kernel(
    function: Any,
    dtypes: Sequence[torch.dtype | None],
    constants: Sequence[Any],
    *,
    warps: int,
    registers: int,
    aligned: bool,
    target: GPUTarget,
    stages: int = 1,
) -> Any:
    """Compile one variant ahead of time. A pointer of dtype None is absent.

    `registers` is the most that a thread may have; `aligned` promises that rows, parameters and results start at
    multiples of 16 bytes.
    """
    names = list(inspect.signature(function.fn).parameters)
    pointers, numbers = names[: len(dtypes)], names[len(dtypes) : len(names) - len(constants)]
    signature = dict.fromkeys(names, "constexpr")
    signature.update({n: POINTER_TYPES[dtype] for n, dtype in zip(pointers, dtypes, strict=True) if dtype is not None})
    signature.update({n: NUMBER_TYPES.get(n, "i64") for n in numbers})
    if "eps" in numbers and signature["stats_ptr"] == "*fp64":
        signature["eps"] = "fp64"
    values: dict[str, Any] = {n: None for n in pointers if signature[n] == "constexpr"}
    values.update(zip(names[len(names) - len(constants) :], constants, strict=True))
    attributes = {}
    if aligned:
        unaligned = UNALIGNED if values.get("MASK_VEC", 1) == 1 else [n for n in UNALIGNED if n not in _MASKS]
        promised = [n for n in pointers if signature[n] != "constexpr" and n not in unaligned]
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in promised}
    source = ASTSource(function, signature, values, attributes)
    # floating-point fusion by name: its default differs between versions of Triton
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


class Variant:
    """A kernel with its constants, for launches on one device with one set of dtypes."""

    __slots__ = ("_handle", "aligned", "constants", "function", "registers", "stages", "warps")

    def __init__(
        self,
        function: Any,
        constants: tuple[Any, ...],
        *,
        warps: int,
        registers: int,
        aligned: bool,
        stages: int = 1,
    ) -> None:
        self.function, self.constants = function, constants
        self.warps, self.registers, self.aligned, self.stages = warps, registers, aligned, stages
        self._handle: Handle | None = None

    def launch(
        self, grid: tuple[int, int], pointers: tuple[Tensor | None, ...], numbers: tuple[int | float, ...]
    ) -> None:
        """Run on the first pointer's device, on its current stream."""
        handle, index = self._handle, pointers[0].get_device()  # type: ignore[union-attr]
        if handle is None and not isinstance(self.function, JITFunction):  # interpreted
            self.function[grid](*pointers, *numbers, *self.constants, num_warps=self.warps)
            return
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self.launch(grid, pointers, numbers)
            return
        if handle is None:
            handle = self._handle = self._load(index, tuple([None if t is None else t.dtype for t in pointers]))
        if handle.hooks is not None and handle.hooks.calls:  # a profiler wants to know of every launch
            handle.kernel[(*grid, 1)](*pointers, *numbers, *self.constants)
            return
        handle.run(
            *(*grid, 1, handle.stream(index), *handle.fixed, *pointers, *numbers, *self.constants),
        )

    def _load(self, index: int, dtypes: tuple[torch.dtype | None, ...]) -> Handle:
        """Compiled and loaded once for all variants that are the same."""
        key = (self.function, self.constants, self.warps, self.registers, self.aligned, self.stages, index, dtypes)
        return _loaded.get(key) or _loaded.setdefault(key, self._compile(dtypes))  # of two threads, one is kept

    def _compile(self, dtypes: tuple[torch.dtype | None, ...]) -> Handle:
        """Compile and load. CUDA loads no module while a graph is captured, and its error would name nothing."""
        if torch.cuda.is_current_stream_capturing():
            kernel = self.function.__name__.strip("_").removesuffix("_kernel")
            raise RuntimeError(
                f"{kernel}: its kernel for these dtypes, strides, options and alignment of attn_mask is not loaded "
                "yet, and CUDA loads none while a graph is captured; call once before capturing, forward and backward, "
                "with the same arguments"
            )
        driver = triton.runtime.driver.active
        kernel = compile_kernel(
            self.function,
            dtypes,
            self.constants,
            warps=self.warps,
            registers=self.registers,
            aligned=self.aligned,
            stages=self.stages,
            target=driver.get_current_target(),
        )
        run, fixed = kernel.run, (kernel.function, kernel.packed_metadata, None, None, None)
        return Handle(kernel, run, fixed, driver.get_current_stream, triton.knobs.runtime.launch_enter_hook)


class Handle(NamedTuple):
    """What a launch needs, looked up once: Triton's own launch looks for hooks and metadata at every call."""

    kernel: Any
    run: Callable[..., None]
    fixed: tuple[Any, ...]  # function, metadata, and no hooks
    stream: Callable[[int], int]
    hooks: Any


_loaded: dict[tuple[Any, ...], Handle] = {}  # never let go: a captured CUDA graph goes on using what was loaded
