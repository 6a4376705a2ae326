"""What the CUDA C++ provider's modules share: the library behind ``torch.ops.fusednorm_cuda``, and tensors for it.

The library is loaded when it is first asked for. Without a GPU its kernels can be run on CPU tensors by an emulation,
for tests: FUSEDNORM_EMULATE then names the library that `tests/helpers/emulated.py` builds from the same sources.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._once import once
from ..._transforms import capturing
from ..native import check_activations, check_not_truncated, load_failure, too_many_dimensions
from ..strides import contiguous, folded

LIBRARY = Path(__file__).parents[2] / "libfusednorm_cuda.so"
EMULATED = os.environ.get("FUSEDNORM_EMULATE")
BUILD = (
    "python setup.py build_ext --inplace in a source checkout, or pip install --no-build-isolation --force-reinstall "
    "--no-deps with the path of one (nvcc and a C++ compiler have to be there)"
)

_MIN_CAPABILITY = (8, 0)
_MOST_COLUMNS = 2**30
ops: Any = torch.ops.fusednorm_cuda  # empty until the library is loaded
_unusable: dict[int, str | None] = {}  # by GPU, of those asked: why no kernel runs there
_asking = threading.RLock()  # also around what takes the GPUs that are known
# What takes (library, emulated, bits of the usable GPUs) when these are known. Dispatch sets it to the fast path's.
hand_over: Callable[[Path, bool, int], None] | None = None
# What gives the library the forms that users keep for the GPUs of these indices. Dispatch sets it.
keep_forms: Callable[[list[int]], None] | None = None
# Why automatic choice leaves the provider out, or None.
for_tests = None if EMULATED is None else "kernels run in an emulation of the GPU, which is for tests"


def unavailable_reason() -> str | None:
    if EMULATED is None:
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU"
        if torch.version.hip is not None:
            return "its kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    # Of several, each is asked when its turn comes: even an empty launch takes some hundred megabytes on a GPU.
    return _load() or (unusable(0) if EMULATED is not None or torch.cuda.device_count() == 1 else None)


@once
def _load() -> str | None:
    """Load the library; what went wrong, or None."""
    library = _library()
    if not library.exists():
        return f"its library is not built; type: {BUILD}" if EMULATED is None else f"there is no {library}"
    try:
        check_not_truncated(library)
        if EMULATED is None:  # the library is linked to no torch: it takes these symbols from the process
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))
        check_activations(library)
        for name in ("add_layer_norm_bwd", "bias_act_dropout_bwd", "attention_bwd", "keep"):
            getattr(ops, name)  # a library of an older version lacks some
        ctypes.c_char.in_dll(ctypes.CDLL(str(library)), "fusednorm_cuda_first_launch")
        _attach()
    except Exception as fault:  # a file for another machine or torch, or half of one: whatever it is, not usable
        return load_failure(library, fault, BUILD)
    return None


def _library() -> Path:
    return LIBRARY if EMULATED is None else Path(EMULATED)


def _usable() -> list[int]:
    """The GPUs that were asked, and on which kernels run."""
    return [index for index, reason in list(_unusable.items()) if reason is None and index < 64]


def take_forms() -> None:
    """Launch on these GPUs in the forms that are kept for them."""
    with _asking:  # of two threads, the one that knows fewer GPUs must not come last
        usable = _usable()
        if usable and keep_forms is not None:
            keep_forms(usable)


def _attach() -> None:
    """Let the fast path lead to these GPUs."""
    with _asking:
        take_forms()
        if hand_over is not None:
            hand_over(_library(), EMULATED is not None, sum(1 << index for index in _usable()))


def unusable(index: int) -> str | None:
    """Why no kernel of the library runs on a GPU, or None: one launch tells, when this is first asked.

    Not while a graph is captured, where the launch would become a part of it: then None, and it is asked later.
    """
    try:
        return _unusable[index]
    except KeyError:
        pass
    with _asking:
        if index not in _unusable:
            if _capturing(index):
                return None
            _unusable[index] = _ask(index)
            _attach()
        return _unusable[index]


unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in dispatch/__init__.py


def forget_devices() -> None:
    """As if no GPU had been asked, for tests."""
    with _asking:
        _unusable.clear()
        _attach()


def _ask(index: int) -> str | None:
    if EMULATED is None and torch.cuda.get_device_capability(index) < _MIN_CAPABILITY:
        return f"cuda:{index} is older than compute capability 8.0"
    said = _first_launch(index)
    if not said:
        return None
    return (
        f"none of its kernels runs on cuda:{index}, where a first launch failed ({said}); build the library on this "
        f"machine, with FUSEDNORM_CUDA_ARCHITECTURES=native ({BUILD}); where the driver is older than the CUDA it was "
        "built with, update the driver"
    )


def _first_launch(index: int) -> str:
    said = ctypes.create_string_buffer(512)
    ctypes.CDLL(str(_library())).fusednorm_cuda_first_launch(index, said, ctypes.c_size_t(len(said)))
    return said.value.decode(errors="replace")


def _capturing(index: int) -> bool:
    return EMULATED is None and capturing(index)


def runs_on() -> str:
    """The kind of device whose tensors the kernels take."""
    return "cuda" if EMULATED is None else "cpu"


def refusal(x: Tensor, columns: int) -> str | None:
    """Why no kernel takes rows of so many columns of x, or None."""
    if x.is_meta:  # the op's fake kernel serves it
        return None
    reason = unusable(x.device.index or 0)
    if reason is not None:
        return reason
    if columns >= _MOST_COLUMNS:
        return "a row has 2**30 elements or more"
    return too_many_dimensions(x)


def strides_refusal(name: str, tensor: Tensor, normalized_ndim: int) -> str | None:
    if _readable(tensor, normalized_ndim):
        return None
    return (
        f"{name}: strides {tuple(tensor.stride())}; its kernels read rows whose columns lie one after another, "
        "at one or two row strides; .contiguous() makes them so"
    )


def _readable(tensor: Tensor, normalized_ndim: int) -> bool:
    """Whether the kernels can address the tensor where it lies."""
    if tensor.is_contiguous():
        return True
    lead = tensor.ndim - normalized_ndim
    columns = folded(tensor.shape[lead:], tensor.stride()[lead:])
    rows = folded(tensor.shape[:lead], tensor.stride()[:lead])
    return len(rows) <= 2 and (not columns or (len(columns) == 1 and columns[0][1] == 1))


def rows(tensor: Tensor | None, dtype: torch.dtype, normalized_ndim: int) -> Tensor | None:
    """A tensor as the kernels read it, copied where they cannot: cotangents lie as their maker left them."""
    if tensor is None:
        return None
    if tensor.is_neg():  # `.conj().imag`: memory holds the negated values
        tensor = tensor.resolve_neg()
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if _readable(tensor, normalized_ndim) else tensor.contiguous()


def parameter(given: Tensor | None, dtype: torch.dtype, computed_in: torch.dtype) -> Tensor | None:
    """A parameter as the kernels read it: contiguous, in the rows' dtype or the one computed in."""
    if given is not None and given.dtype is not dtype and given.dtype is not computed_in:
        given = given.to(computed_in)
    return contiguous(given)


def sample_parameter(given: Tensor, dtype: torch.dtype, computed_in: torch.dtype) -> Tensor | None:
    """A parameter that is one vector for each sample: the vectors may lie at any stride that fits in 32 bits."""
    columns = folded(given.shape[1:], given.stride()[1:])
    one_after_another = not columns or (len(columns) == 1 and columns[0][1] == 1)
    if one_after_another and given.dtype in (dtype, computed_in) and not given.is_neg() and given.stride(0) < 2**31:
        return given
    return parameter(given, dtype, computed_in)
