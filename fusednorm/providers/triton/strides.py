"""How the Triton kernels address what they are given: tensors as M rows of N columns.

Most calls are on contiguous tensors, and every microsecond here is paid at each of them, so that case is told first and
with as few look-ups as it takes.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..strides import folded


class Layout(NamedTuple):
    """Row operands, in units the kernels understand; see LAYOUT, VEC and ROWS_2D there."""

    tensors: tuple[Tensor | None, ...]
    strides: tuple[int, ...]  # (outer, row, column) of each tensor
    kind: int  # 0 aligned, in units of vec; 1 columns contiguous; 2 any strides
    vec: int
    rows_2d: bool
    rows_inner: int  # rows under one step of the outer stride
    n_units: int

    @property
    def constants(self) -> tuple[int, int, bool]:
        return self.kind, self.vec, self.rows_2d


class _Operand(NamedTuple):
    tensor: Tensor
    strides: tuple[int, int, int]
    rows_inner: int  # rows under one step of the outer stride; 0 = a single row stride


def sizes(x: Tensor, normalized_ndim: int) -> tuple[int, int]:
    """Rows and columns."""
    if normalized_ndim == 1:
        n = x.shape[-1]
        return (x.numel() // n, n) if n else (x.shape[:-1].numel(), 0)
    lead = x.ndim - normalized_ndim
    return x.shape[:lead].numel(), x.shape[lead:].numel()


def rows_per_sample(x: Tensor, normalized_ndim: int) -> int:
    """Rows under one index of dimension 0."""
    lead = x.ndim - normalized_ndim
    return max(x.shape[1:lead].numel(), 1) if lead else 1


def layout(
    tensors: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...], normalized_ndim: int, n: int
) -> Layout:
    """Address `tensors` together; `others` (parameters and outputs) are contiguous and count for the alignment."""
    vec, address = 4, 0
    for t in tensors:
        if t is not None:
            if not t.is_contiguous() or t.is_neg():
                return _strided(tensors, others, normalized_ndim, n)
            if t.element_size() == 2:
                vec = 8
            address |= t.data_ptr()
    for t in others:
        if t is not None:
            address |= t.data_ptr()
    if n % vec or address % 16:
        return Layout(tensors, (0, n, 1) * len(tensors), 1, vec, False, 1, n)
    units = n // vec
    return Layout(tensors, (0, units, 1) * len(tensors), 0, vec, False, 1, units)


def _operand(tensor: Tensor, normalized_ndim: int, n: int) -> _Operand:
    """The tensor read where it lies; a copy of what no two row strides and one column stride describe.

    And of one value expanded over the columns (the cotangent of `.sum()`): one written and read again costs less than
    what it would do to the others, which are then read an element at a time too.
    """
    if tensor.is_neg():  # `.conj().imag`: memory holds the negated values
        tensor = tensor.resolve_neg()
    if tensor.is_contiguous():
        return _Operand(tensor, (0, n, 1), 0)
    lead = tensor.ndim - normalized_ndim
    rows = folded(tensor.shape[:lead], tensor.stride()[:lead])
    columns = folded(tensor.shape[lead:], tensor.stride()[lead:])
    if len(rows) > 2 or len(columns) > 1 or (columns and columns[0][1] == 0):
        return _Operand(tensor.contiguous(), (0, n, 1), 0)
    stride_col = columns[0][1] if columns else 1
    if len(rows) == 2:
        return _Operand(tensor, (rows[0][1], rows[1][1], stride_col), rows[1][0])
    return _Operand(tensor, (0, rows[0][1] if rows else n, stride_col), 0)


def _strided(
    tensors: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...], normalized_ndim: int, n: int
) -> Layout:
    operands = [None if t is None else _operand(t, normalized_ndim, n) for t in tensors]
    inner = [o.rows_inner for o in operands if o is not None and o.rows_inner]
    keep = inner[0] if inner else 0
    strides: list[tuple[int, int, int]] = []
    kept: list[Tensor | None] = []
    for operand in operands:
        if operand is None:
            kept.append(None)
            strides.append((0, 0, 0))
            continue
        if operand.rows_inner not in (0, keep):  # folds in another way than the first: copied
            operand = _Operand(operand.tensor.contiguous(), (0, n, 1), 0)
        outer, row, column = operand.strides
        kept.append(operand.tensor)
        strides.append((keep * row if keep and not operand.rows_inner else outer, row, column))
    present = [(t, s) for t, s in zip(kept, strides, strict=True) if t is not None]
    vec = 8 if any(t.element_size() == 2 for t, _ in present) else 4
    unit = all(s[2] == 1 for _, s in present)
    aligned = unit and n % vec == 0 and all((s[0] | s[1]) % vec == 0 for _, s in present)
    aligned = aligned and all(t.data_ptr() % 16 == 0 for t in (*kept, *others) if t is not None)
    if aligned:
        strides = [(outer // vec, row // vec, column) for outer, row, column in strides]
    flat = tuple(number for triple in strides for number in triple)
    kind = 0 if aligned else 1 if unit else 2
    return Layout(tuple(kept), flat, kind, vec, bool(keep), keep or 1, n // vec if aligned else n)
