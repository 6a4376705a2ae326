"""The Triton provider of the norm family: what it takes, how operands are laid out, and the launches."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dropout
from .._dtypes import compute_dtype
from . import triton_norm_table as table

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # read once: Triton reads it when it is imported
_MIN_CAPABILITY = (8, 0)


def unavailable_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if INTERPRETING:
        return None
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA GPU (set TRITON_INTERPRET=1 before Python starts to interpret its kernels on the CPU)"
        )
    if torch.version.hip is not None:
        return "its configurations are for NVIDIA GPUs, and this torch is built for ROCm"
    return None


def reluctance(op: str, *args: Any) -> str | None:
    """Why automatic choice does not take a call that this provider could serve."""
    if INTERPRETING:
        return "kernels run in Triton's interpreter, which is for tests"
    return None


def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in providers/__init__.py


def refusal(op: str, *args: Any) -> str | None:
    x, normalized_ndim, dropout_p = args[0], args[7], args[9]
    if x.is_meta:  # the op's fake kernel serves it
        return None
    device = "cpu" if INTERPRETING else "cuda"
    if x.device.type != device:
        return f"x is on {x.device}, its kernels run on {device} tensors here"
    if device == "cuda" and _capability(x.device.index) < _MIN_CAPABILITY:
        return f"{x.device} is older than compute capability 8.0"
    if dropout_p and normalized_ndim > 1:
        return "dropout_p > 0 with a normalized_shape of several dimensions; flatten them first"
    return None


class _Operand(NamedTuple):
    """A tensor as M rows of N columns: (outer, row, column) strides, in elements."""

    tensor: Tensor
    strides: tuple[int, int, int]
    rows_inner: int  # rows under one step of the outer stride; 0 = a single row stride


def _folded(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, stride) of the fewest dimensions that address the same elements in the same order."""
    groups: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    return groups


def _operand(tensor: Tensor, normalized_ndim: int, n: int) -> _Operand:
    """The tensor read where it lies; a copy only of what no two row strides and one column stride describe."""
    if tensor.is_neg():  # `.conj().imag`: memory holds the negated values
        tensor = tensor.resolve_neg()
    if tensor.is_contiguous():
        return _Operand(tensor, (0, n, 1), 0)
    lead = tensor.ndim - normalized_ndim
    rows = _folded(tensor.shape[:lead], tensor.stride()[:lead])
    columns = _folded(tensor.shape[lead:], tensor.stride()[lead:])
    if len(rows) > 2 or len(columns) > 1:
        return _Operand(tensor.contiguous(), (0, n, 1), 0)
    stride_col = columns[0][1] if columns else 1
    if len(rows) == 2:
        return _Operand(tensor, (rows[0][1], rows[1][1], stride_col), rows[1][0])
    return _Operand(tensor, (0, rows[0][1] if rows else n, stride_col), 0)


class _Layout:
    """How a call's strided operands are addressed together: see the kernels' LAYOUT, VEC and ROWS_2D."""

    def __init__(self, tensors: list[Tensor | None], parameters: list[Tensor | None], normalized_ndim: int, n: int):
        operands = [None if t is None else _operand(t, normalized_ndim, n) for t in tensors]
        inner = {o.rows_inner for o in operands if o is not None and o.rows_inner}
        if len(inner) > 1:  # two operands fold differently: all but the first kind are copied
            keep = next(o.rows_inner for o in operands if o is not None and o.rows_inner)
            operands = [
                _Operand(o.tensor.contiguous(), (0, n, 1), 0) if o is not None and o.rows_inner not in (0, keep) else o
                for o in operands
            ]
            inner = {keep}
        self.rows_2d = bool(inner)
        self.rows_inner = inner.pop() if inner else 1
        self.tensors = [None if o is None else o.tensor for o in operands]
        strides = [(0, 0, 0) if o is None else self._strides(o) for o in operands]
        self.vec = 8 if any(o is not None and o.tensor.element_size() == 2 for o in operands) else 4
        everything = [t for t in (*self.tensors, *parameters) if t is not None]
        unit = all(s[2] == 1 for s, o in zip(strides, operands, strict=True) if o is not None)
        aligned = unit and n % self.vec == 0 and all(t.data_ptr() % 16 == 0 for t in everything)
        aligned = aligned and all((s[0] | s[1]) % self.vec == 0 for s in strides)
        self.kind = 0 if aligned else 1 if unit else 2
        if aligned:
            strides = [(s[0] // self.vec, s[1] // self.vec, s[2]) for s in strides]
        self.strides = [number for triple in strides for number in triple]
        self.n_units = n // self.vec if aligned else n
        self.constants = (self.kind, self.vec, self.rows_2d)

    def _strides(self, operand: _Operand) -> tuple[int, int, int]:
        outer, row, column = operand.strides
        if self.rows_2d and not operand.rows_inner:
            outer = self.rows_inner * row
        return outer, row, column


def _sizes(x: Tensor, normalized_ndim: int) -> tuple[int, int, int]:
    """Rows, columns, and rows under one index of dimension 0."""
    lead = x.ndim - normalized_ndim
    m, n = x.shape[:lead].numel(), x.shape[lead:].numel()
    return m, n, max(m // x.shape[0], 1) if lead and x.shape[0] else 1


def _dropout_numbers(dropout_p: float, drop_path_p: float) -> tuple[int | float, ...]:
    numbers: tuple[int | float, ...] = ()
    for p in (dropout_p, drop_path_p):
        numbers += (dropout.threshold(p), dropout.keep_scale(p))
    return numbers


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.resolve_neg().contiguous()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


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
    from . import triton_launch
    from . import triton_norm_fwd as kernels

    m, n, rows_per_sample = _sizes(x, normalized_ndim)
    normed = torch.empty(x.shape, dtype=normed_dtype, device=x.device)
    residual_out = torch.empty(x.shape if store_residual else 0, dtype=residual_dtype, device=x.device)
    stats = torch.empty((1 if rms else 2, m), dtype=compute_dtype(x.dtype, residual_dtype), device=x.device)
    if m == 0:
        return normed, residual_out, stats
    if n == 0:
        return normed, residual_out, stats.fill_(float("nan"))
    parameters = [_contiguous(p) for p in (weight, bias, x_bias, layer_scale)]
    outputs = [normed, residual_out if store_residual else None]
    layout = _Layout([x, residual], [*parameters, *outputs], normalized_ndim, n)
    config = table.forward(n)
    constants: tuple[Any, ...] = (
        *(triton_launch.TYPES[residual_dtype], rms, zero_centered_weight, dropout_p > 0.0, drop_path_p > 0.0),
        *(*layout.constants, config.block_m, config.block_n),
    )
    kernel = kernels._add_layer_norm_fwd_wide_kernel
    if config.chunks:
        kernel = kernels._add_layer_norm_fwd_kernel
        constants += (config.chunks, config.chunks * config.block_n == n)
    triton_launch.launch(
        kernel,
        (_ceil(m, config.block_m), 1),
        (*layout.tensors, *parameters, seed, *outputs, stats),
        (
            *(m, layout.n_units, layout.rows_inner, rows_per_sample, *layout.strides, eps),
            *_dropout_numbers(dropout_p, drop_path_p),
        ),
        constants,
        warps=config.warps,
        aligned=layout.kind == 0,
    )
    return normed, residual_out, stats


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
    """Gradients of (x, residual, weight, bias, x_bias, layer_scale): one launch, and one that sums the partials."""
    from . import triton_launch
    from . import triton_norm_bwd as kernels

    m, n, rows_per_sample = _sizes(saved, normalized_ndim)
    device = saved.device
    parameters = (weight, bias, x_bias, layer_scale)
    shapes_and_dtypes: list[tuple[Any, torch.dtype]] = [(saved.shape, x_dtype), (saved.shape, residual_dtype)]
    shapes_and_dtypes += [((), saved.dtype) if p is None else (p.shape, p.dtype) for p in parameters]
    gradients = [
        torch.empty(shape if wanted else 0, dtype=dtype if wanted else saved.dtype, device=device)
        for wanted, (shape, dtype) in zip(output_mask, shapes_and_dtypes, strict=True)
    ]
    if m == 0 or n == 0:
        return tuple([g.zero_() for g in gradients])

    weight, bias, x_bias, layer_scale = [_contiguous(p) for p in parameters]
    bias = bias if saved_is_normed else None
    x = x if output_mask[5] else None
    x_bias = x_bias if x is not None else None
    written = [g if wanted else None for g, wanted in zip(gradients, output_mask, strict=True)]
    layout = _Layout(
        [dnormed, dresidual_out, saved, x], [weight, bias, x_bias, layer_scale, *written[:2]], normalized_ndim, n
    )
    dnormed, dresidual_out, saved, x = layout.tensors  # type: ignore[assignment]
    accumulators = sum(output_mask[2:])
    config = table.backward(n, table.load(accumulators, dropout_p > 0.0, layer_scale is not None))
    aligned = layout.kind == 0
    common = (rms, zero_centered_weight, saved_is_normed)
    sums = None
    slabs = 1
    if not config.chunks:
        sums = torch.empty_like(stats)
        slabs = _ceil(n, config.block_n)
        triton_launch.launch(
            kernels._add_layer_norm_bwd_sums_kernel,
            (_ceil(m, table.SUMS.block_m), 1),
            (dnormed, saved, stats, weight, bias, sums),
            (m, layout.n_units, layout.rows_inner, *layout.strides[:3], *layout.strides[6:9]),
            (*common, *layout.constants, table.SUMS.block_m, table.SUMS.block_n),
            warps=table.SUMS.warps,
            aligned=aligned,
        )
    programs = _programs(device, _ceil(m, config.block_m), config.per_sm, slabs)
    partials = torch.empty((accumulators, programs, n), dtype=stats.dtype, device=device) if accumulators else None
    triton_launch.launch(
        kernels._add_layer_norm_bwd_kernel,
        (programs, slabs),
        (
            *(dnormed, dresidual_out, saved, stats, sums, weight, bias, x, x_bias, layer_scale, seed),
            *(*written[:2], partials),
        ),
        (
            *(m, layout.n_units, layout.rows_inner, rows_per_sample, *layout.strides),
            *_dropout_numbers(dropout_p, drop_path_p),
        ),
        (
            *(*common, dropout_p > 0.0, drop_path_p > 0.0, *output_mask[2:], *layout.constants),
            *(config.block_m, config.block_n, max(config.chunks, 1)),
            *(n % (config.block_n * max(config.chunks, 1)) == 0, 1),
        ),
        warps=config.warps,
        aligned=aligned,
    )
    if partials is not None:
        triton_launch.launch(
            kernels._add_layer_norm_bwd_finalize_kernel,
            (_ceil(n, table.FINALIZE.block_n), accumulators),
            (partials, *written[2:]),
            (programs, n),
            (table.FINALIZE.block_m, table.FINALIZE.block_n),
            warps=table.FINALIZE.warps,
            aligned=False,
        )
    return tuple(gradients)


def _programs(device: torch.device, groups: int, per_sm: int, slabs: int) -> int:
    """Persistent programs: the multiprocessors filled, but no more than there are groups of rows."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(groups, processors * per_sm // slabs))
