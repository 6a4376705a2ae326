"""What the Triton launchers share on the host: whether kernels run here, numbers of a launch, compiled variants."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import dropout
from .config import PARTIALS, Config

if TYPE_CHECKING:
    from .attention_config import Tile
    from .launch import Variant

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # read once: Triton reads it when it is imported
# Why automatic choice leaves the provider out, or None.
for_tests = "kernels run in Triton's interpreter, which is for tests" if INTERPRETING else None
_MIN_CAPABILITY = (8, 0)
SHARED = {  # bytes of shared memory that a program may have, by compute capability; a GPU that is here is asked
    **dict.fromkeys(((8, 0), (8, 7)), 166912),
    **dict.fromkeys(((8, 6), (8, 9), (12, 0), (12, 1)), 101376),
    **dict.fromkeys(((9, 0), (10, 0), (10, 3), (11, 0)), 232448),
}


def unavailable_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if INTERPRETING:
        missing = importlib.util.find_spec("numpy") is None
        return "Triton's interpreter needs NumPy; pip install numpy" if missing else None
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA GPU (to test its kernels on the CPU: pip install numpy, and set TRITON_INTERPRET=1 "
            "before Python starts)"
        )
    if torch.version.hip is not None:
        return "its configurations are for NVIDIA GPUs, and this torch is built for ROCm"
    return _launching_fault()


def _launching_fault() -> str | None:
    """Triton builds a part of its launcher with the C compiler the first time; where there is none it says so."""
    try:
        import triton

        triton.runtime.driver.active.utils  # noqa: B018
    except Exception as fault:  # whatever it is, no kernel can be launched
        return f"Triton cannot launch kernels here: {fault}"
    return None


class Device(NamedTuple):
    """What tiles are chosen by."""

    capability: tuple[int, int]
    shared: int  # bytes of shared memory that a program may have


_capabilities: dict[int, tuple[int, int]] = {}
_devices: dict[int, Device] = {}


def capability(index: int) -> tuple[int, int]:
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return _capabilities[index]


capability._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in dispatch/__init__.py


def device(index: int) -> Device:
    if index not in _devices:
        _devices[index] = Device(
            capability(index),
            torch.cuda.get_device_properties(index).shared_memory_per_block_optin,  # type: ignore[attr-defined]
        )
    return _devices[index]


def compiled_for(capability: tuple[int, int]) -> Device:
    """A device that is not here."""
    return Device(capability, SHARED[capability])


@functools.cache
def version() -> tuple[int, int]:
    """Triton's, (major, minor)."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def runs_on() -> str:
    """The kind of device whose tensors the kernels take."""
    return "cpu" if INTERPRETING else "cuda"


def refusal(x: Tensor, columns: int) -> str | None:
    """Why no kernel takes rows of so many columns of x, or None."""
    if x.is_meta:  # the op's fake kernel serves it
        return None
    if INTERPRETING and x.dtype == torch.bfloat16 and not _bfloat16_is_interpreted():
        return (
            "dtype torch.bfloat16: Triton's interpreter truncates to it, and in matrix products takes its bits for "
            "integers; use torch.float16 or torch.float32, or a GPU"
        )
    if not INTERPRETING and capability(x.device.index) < _MIN_CAPABILITY:
        return f"{x.device} is older than compute capability 8.0"
    if columns > 2**31 - 2**14:  # columns are 32-bit numbers, those of the last tile too
        return "a row has more than 2**31 - 2**14 elements"
    return None


def _bfloat16_is_interpreted() -> bool:
    """Whether somebody has mended the interpreter (tests/helpers/interpreter.py), and says so."""
    from triton.runtime import interpreter

    return getattr(interpreter.InterpreterBuilder, "interprets_bfloat16", False)


@functools.lru_cache(None)
def processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count if index >= 0 else 2


@functools.lru_cache(64)
def dropout_scalars(p: float) -> tuple[int, float]:
    return dropout.threshold(p), dropout.keep_scale(p)


def ceil(a: int, b: int) -> int:
    return -(-a // b)


# One variant for each combination of what the compiler is told; sizes other than N are numbers of the launch.


@functools.lru_cache(None)  # never let go: a captured CUDA graph goes on using what was compiled
def variant(kernel: Any, constants: tuple[Any, ...], config: Config | Tile, aligned: bool) -> Variant:
    from .launch import Variant

    return Variant(
        kernel,
        constants,
        warps=config.warps,
        registers=config.registers,
        aligned=aligned,
        stages=config.stages,
    )


def sum_partials(partials: Tensor, gradients: tuple[Tensor | None, ...]) -> None:
    """Add the rows of each plane of `partials`, (K, programs, N), into the K gradients of four that are there."""
    from .partials import _sum_partials_kernel

    planes, programs, n = partials.shape
    vec = 4 if n % 4 == 0 else 1
    constants = (vec, PARTIALS.block_m, PARTIALS.block_n)
    variant(_sum_partials_kernel, constants, PARTIALS, vec > 1).launch(
        (ceil(n, PARTIALS.block_n), planes), (partials, *gradients), (programs, n // vec)
    )


def empty_unless_wanted(tensor: Tensor, wanted: bool, dtype: torch.dtype) -> Tensor:
    """A contiguous result of `tensor`'s shape (cheaper than torch.empty of a Size); without elements if not wanted."""
    if wanted:
        return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    return tensor.new_empty(0, dtype=dtype)
