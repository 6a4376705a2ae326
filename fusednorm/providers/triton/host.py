"""What the Triton launchers share on the host: whether kernels run here, numbers of a launch, compiled variants."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import dropout
from .config import PARTIALS, SAMPLE_PARTIALS, Form

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


# --- an op: prepared once for a signature, then run in each call ---


_MAX_PREPARED = 4096
_prepared: dict[tuple[Any, ...], Callable[..., Any]] = {}


def prepared(make: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
    """An op's function of `make`, which looks at all of its arguments but at no address and no value.

    What it returns takes the same arguments, a forward's the inputs alone too. It is kept for each signature, and
    `prepare` gives it. Who has seen the signature before (`dispatch/eager.py`) calls it without another look.
    """

    def prepare(*args: Any) -> Callable[..., Any]:
        key: list[Any] = [make]
        for arg in args:
            if arg is None or isinstance(arg, Tensor):
                arg = (arg,)
            if arg[0] is None or isinstance(arg[0], Tensor):
                for t in arg:
                    key.append(None if t is None else (t.dtype, t.shape, t.stride(), t.get_device(), t.is_neg()))
            else:
                key.append(tuple(arg))
        found = _prepared.get(signature := tuple(key))
        if found is None:
            if len(_prepared) >= _MAX_PREPARED:
                _prepared.clear()
            found = _prepared[signature] = make(*args)
        return found

    @functools.wraps(make)
    def function(*args: Any) -> Any:
        return prepare(*args)(*args)

    function.prepare = prepare  # type: ignore[attr-defined]
    return function


def forget_prepared() -> None:
    """After a table was changed."""
    _prepared.clear()


_guards = getattr(torch._C._dynamo, "guards", None)  # has what the code that torch.compile writes calls


def allocator(tensor: Tensor) -> Callable[[Sequence[int], Sequence[int], torch.dtype], Tensor]:
    """`torch.empty_strided` of sizes, strides and a dtype on a tensor's device, at half the cost where torch can."""
    empty = None
    if tensor.is_cpu:
        empty = getattr(_guards, "_empty_strided_cpu", None)
    elif tensor.is_cuda and tensor.get_device() == torch.cuda.current_device():
        empty = getattr(_guards, "_empty_strided_cuda", None)
    return empty or functools.partial(_empty, tensor.device)


def _empty(device: torch.device, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(sizes, strides, dtype=dtype, device=device)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all that are there start at multiples of 16 bytes."""
    address = 0
    for tensor in tensors:
        if tensor is not None:
            address |= tensor.data_ptr()
    return not address % 16


def variant(kernel: Any, constants: tuple[Any, ...], config: Form | Tile, aligned: bool) -> Variant:
    """Sizes other than N are numbers of the launch, so they name no variant."""
    from .launch import Variant

    return Variant(
        kernel,
        constants,
        warps=config.warps,
        registers=config.registers,
        aligned=aligned,
        stages=config.stages,
    )


_MOST_ROUNDS = 8  # of programs that run at once
_GROUPS_TO_FLUSH = 4  # groups of rows whose traffic is about that of a program's partial sums


def programs(index: int, config: Form, rows: int, slabs: int, samples: int = 1) -> int:
    """Persistent ones in a slab of columns of the rows of a sample, no more than there are groups of rows.

    Of one sample: the multiprocessors filled. Of several: so many that the last ones to begin are not long alone.
    """
    groups, at_once = ceil(rows, config.block_m), processors(index) * config.per_sm // slabs
    if samples == 1:
        return max(1, min(groups, at_once))
    at_once = max(1, at_once)
    counts = range(1, max(1, min(groups, _MOST_ROUNDS * at_once // samples)) + 1)
    return min(counts, key=lambda count: ceil(samples * count, at_once) * (ceil(groups, count) + _GROUPS_TO_FLUSH))


def sum_partials(
    own: Sequence[bool], samples: int, programs: int, n: int
) -> Callable[[Tensor, Sequence[Tensor | None]], None]:
    """What adds the rows of each plane of partials, (planes, samples * programs, n), into as many gradients of four.

    `own`: whether a plane's gradient is one for each sample, not one for all rows.
    """
    from .partials import _sum_partials_kernel

    planes, per_sample = len(own), sum([each << plane for plane, each in enumerate(own)])
    if not per_sample:
        samples, programs = 1, samples * programs
    vec, config = 4 if n % 4 == 0 else 1, SAMPLE_PARTIALS if per_sample else PARTIALS
    constants = (per_sample, vec, config.block_m, config.block_n)
    launched = variant(_sum_partials_kernel, constants, config, vec > 1)
    grid, numbers = (ceil(n, config.block_n) * samples, planes), (programs, n // vec)
    return lambda partials, gradients: launched.launch(grid, (partials, *gradients), numbers)
