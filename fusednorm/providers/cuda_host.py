"""What the CUDA C++ provider's modules share: the library behind ``torch.ops.fusednorm_cuda``, and tensors for it.

The library is loaded when it is first asked for. Without a GPU its kernels can be run on CPU tensors by an emulation,
for tests: FUSEDNORM_EMULATE then names the library that `tests/emulated.py` builds from the same sources.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _shortcut
from .._once import once
from .layout import contiguous, folded
from .native import check_whole, too_many_dimensions

LIBRARY = Path(__file__).parents[1] / "libfusednorm_cuda.so"
EMULATED = os.environ.get("FUSEDNORM_EMULATE")
BUILD = (
    "python setup.py build_ext --inplace in a source checkout, or pip install --no-build-isolation --force-reinstall "
    "--no-deps with the path of one (nvcc and a C++ compiler have to be there)"
)

_MIN_CAPABILITY = (8, 0)
_MOST_COLUMNS = 2**30
ops: Any = torch.ops.fusednorm_cuda  # empty until the library is loaded


def unavailable_reason() -> str | None:
    if EMULATED is None:
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU"
        if torch.version.hip is not None:
            return "its kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    return _load()


@once
def _load() -> str | None:
    """Load the library; what went wrong, or None."""
    library = LIBRARY if EMULATED is None else Path(EMULATED)
    if not library.exists():
        return f"its library is not built; type: {BUILD}" if EMULATED is None else f"there is no {library}"
    try:
        check_whole(library)
        if EMULATED is None:  # the library is linked to no torch: it takes these symbols from the process
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))
        for name in ("add_layer_norm_bwd", "bias_act_dropout_bwd"):
            getattr(ops, name)  # a library of an older version lacks some
        if EMULATED is not None or all(_capability(i) >= _MIN_CAPABILITY for i in range(torch.cuda.device_count())):
            _shortcut.attach_cuda(library, EMULATED is not None)
    except Exception as fault:  # a file for another machine or torch, or half of one: whatever it is, not usable
        return f"{library} does not load into torch {torch.__version__}: {fault}; build it anew: {BUILD}"
    return None


def reluctance(op: str, *args: Any) -> str | None:
    """Why automatic choice does not take a call that this provider could serve."""
    return None if EMULATED is None else "kernels run in an emulation of the GPU, which is for tests"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in providers/__init__.py


def refusal(x: Tensor, columns: int) -> str | None:
    """Why no kernel takes rows of so many columns of x, or None."""
    if x.is_meta:  # the op's fake kernel serves it
        return None
    device = "cuda" if EMULATED is None else "cpu"
    if x.device.type != device:
        return f"x is on {x.device}, its kernels run on {device} tensors here"
    if device == "cuda" and _capability(x.device.index) < _MIN_CAPABILITY:
        return f"{x.device} is older than compute capability 8.0"
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
