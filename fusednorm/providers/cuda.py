"""The CUDA C++ provider: the library behind ``torch.ops.fusednorm_cuda``, loaded when it is first asked for.

Without a GPU its kernels can be run on CPU tensors by an emulation, for tests: FUSEDNORM_EMULATE then names the
library that `tests/emulated.py` builds from the same sources.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._dtypes import compute_dtype
from .layout import contiguous, folded
from .native import check_whole, options, too_many_dimensions

LIBRARY = Path(__file__).parents[1] / "libfusednorm_cuda.so"
EMULATED = os.environ.get("FUSEDNORM_EMULATE")
BUILD = (
    "python setup.py build_ext --inplace in a source checkout, or pip install --no-build-isolation --force-reinstall "
    "--no-deps with the path of one (nvcc and a C++ compiler have to be there)"
)

_MIN_CAPABILITY = (8, 0)
_MOST_COLUMNS = 2**30
_WIDE_STREAM = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32))
_forward: Any = None  # the operators' overloads, once the library is loaded
_backward: Any = None


def unavailable_reason() -> str | None:
    if EMULATED is None:
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU"
        if torch.version.hip is not None:
            return "its kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    return _load()


@functools.cache
def _load() -> str | None:
    """Load the library; what went wrong, or None."""
    global _forward, _backward
    library = LIBRARY if EMULATED is None else Path(EMULATED)
    if not library.exists():
        return f"its library is not built; type: {BUILD}" if EMULATED is None else f"there is no {library}"
    try:
        check_whole(library)
        if EMULATED is None:  # the library is linked to no torch: it takes these symbols from the process
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))
        _forward = torch.ops.fusednorm_cuda.add_layer_norm_fwd.default
        _backward = torch.ops.fusednorm_cuda.add_layer_norm_bwd.default
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


def refusal(op: str, *args: Any) -> str | None:
    x, residual, normalized_ndim, dropout_p = args[0], args[1], args[7], args[9]
    normed_dtype, residual_dtype = args[11], args[12]
    if x.is_meta:  # the op's fake kernel serves it
        return None
    device = "cuda" if EMULATED is None else "cpu"
    if x.device.type != device:
        return f"x is on {x.device}, its kernels run on {device} tensors here"
    if device == "cuda" and _capability(x.device.index) < _MIN_CAPABILITY:
        return f"{x.device} is older than compute capability 8.0"
    many = too_many_dimensions(x)
    if many is not None:
        return many
    if math.prod(x.shape[x.ndim - normalized_ndim :]) >= _MOST_COLUMNS:
        return "a row has 2**30 elements or more"
    if dropout_p and normalized_ndim > 1:
        return "dropout_p > 0 with a normalized_shape of several dimensions; flatten them first"
    stream = residual_dtype if residual is None else residual.dtype
    if (
        normed_dtype != x.dtype
        or stream != residual_dtype
        or (x.dtype != stream and (x.dtype, stream) not in _WIDE_STREAM)
    ):
        return (
            "dtypes: its kernels take one dtype for x, residual, normed and residual_out, or 16-bit x and normed "
            f"beside a float32 stream; these are {x.dtype}, {stream}, {normed_dtype} and {residual_dtype}"
        )
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and not _readable(tensor, normalized_ndim):
            return (
                f"{name}: strides {tuple(tensor.stride())}; its kernels read rows whose columns lie one after another, "
                "at one or two row strides; .contiguous() makes them so"
            )
    return None


def _readable(tensor: Tensor, normalized_ndim: int) -> bool:
    """Whether the kernels can address the tensor where it lies."""
    if tensor.is_contiguous():
        return True
    lead = tensor.ndim - normalized_ndim
    columns = folded(tensor.shape[lead:], tensor.stride()[lead:])
    rows = folded(tensor.shape[:lead], tensor.stride()[:lead])
    return len(rows) <= 2 and (not columns or (len(columns) == 1 and columns[0][1] == 1))


def _rows(tensor: Tensor | None, dtype: torch.dtype, normalized_ndim: int) -> Tensor | None:
    """A tensor as the kernels read it, copied where they cannot: cotangents lie as their maker left them."""
    if tensor is None:
        return None
    if tensor.is_neg():  # `.conj().imag`: memory holds the negated values
        tensor = tensor.resolve_neg()
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if _readable(tensor, normalized_ndim) else tensor.contiguous()


def _parameter(parameter: Tensor | None, dtype: torch.dtype, computed_in: torch.dtype) -> Tensor | None:
    """A parameter as the kernels read it: contiguous, in the rows' dtype or the one computed in."""
    if parameter is None:
        return None
    if parameter.dtype is not dtype and parameter.dtype is not computed_in:
        parameter = parameter.to(computed_in)
    return contiguous(parameter)


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
    """(normed, residual_out, stats) in one launch."""
    if not x.numel():
        n_rows = x.shape[: x.ndim - normalized_ndim].numel()
        stats = x.new_full((1 if rms else 2, n_rows), math.nan, dtype=compute_dtype(x.dtype, residual_dtype))
        z_shape = x.shape if store_residual else (0,)
        return x.new_empty(x.shape, dtype=normed_dtype), x.new_empty(z_shape, dtype=residual_dtype), stats
    computed_in = compute_dtype(x.dtype)
    return _forward(
        _rows(x, x.dtype, normalized_ndim),
        _rows(residual, residual_dtype, normalized_ndim),
        *[_parameter(p, x.dtype, computed_in) for p in (weight, bias, x_bias, layer_scale)],
        seed,
        options(normalized_ndim, normed_dtype, residual_dtype, rms, zero_centered_weight, store_residual),
        *(eps, dropout_p, drop_path_p),
    )


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
    """Gradients of (x, residual, weight, bias, x_bias, layer_scale): a launch, and one that sums the partials."""
    parameters = (weight, bias, x_bias, layer_scale)
    if not saved.numel():
        gradients = [saved.new_empty(saved.shape, dtype=dtype) for dtype in (x_dtype, residual_dtype)]
        gradients += [saved.new_empty(0) if p is None else torch.zeros_like(p) for p in parameters]
        return tuple(g if wanted else saved.new_empty(0) for g, wanted in zip(gradients, output_mask))
    computed_in = stats.dtype
    # the stream's dtype: without a residual, residual_dtype does not say
    stream = residual_dtype if saved_is_normed else saved.dtype
    if saved_is_normed and dresidual_out is not None and (x_dtype, dresidual_out.dtype) in _WIDE_STREAM:
        stream = dresidual_out.dtype
    results = _backward(
        _rows(dnormed, x_dtype, normalized_ndim),
        _rows(dresidual_out, stream, normalized_ndim),
        _rows(saved, saved.dtype, normalized_ndim),
        stats.contiguous(),
        *[_parameter(p, x_dtype, computed_in) for p in parameters[:2]],
        _rows(x if output_mask[5] else None, x_dtype, normalized_ndim),
        *[_parameter(p, x_dtype, computed_in) for p in parameters[2:]],
        seed,
        options(
            *(normalized_ndim, x_dtype, stream, rms, zero_centered_weight, False, saved_is_normed),
            tuple(output_mask),
        ),
        *(dropout_p, drop_path_p),
    )
    dtypes = (x_dtype, residual_dtype, *[None if p is None else p.dtype for p in parameters])
    if any(wanted and g.dtype is not dtype for g, dtype, wanted in zip(results, dtypes, output_mask)):
        # of what was converted on its way in
        return tuple(g.to(dtype) if wanted else g for g, dtype, wanted in zip(results, dtypes, output_mask))
    return results
