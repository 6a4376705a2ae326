"""How the Triton kernels address what they are given: tensors as M rows of N columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..samples import is_per_sample
from ..strides import folded


class Layout(NamedTuple):
    """Row operands, in units the kernels understand; see LAYOUT, VEC and ROWS_2D there."""

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
    copied: bool
    strides: tuple[int, int, int]
    rows_inner: int  # rows under one step of the outer stride; 0 = a single row stride


def sizes(x: Tensor, normalized_ndim: int) -> tuple[int, int]:
    """Rows and columns."""
    lead = x.ndim - normalized_ndim
    return x.shape[:lead].numel(), x.shape[lead:].numel()


def rows_per_sample(x: Tensor, normalized_ndim: int) -> int:
    """Rows under one index of dimension 0."""
    lead = x.ndim - normalized_ndim
    return max(x.shape[1:lead].numel(), 1) if lead else 1


def several_samples(parameter: Tensor | None, normalized_ndim: int) -> bool:
    """Whether a parameter has a vector for each of several samples. That of one is a vector for all rows."""
    return parameter is not None and is_per_sample(parameter, normalized_ndim) and parameter.shape[0] != 1


def _operand(tensor: Tensor, normalized_ndim: int, n: int) -> _Operand:
    """The tensor read where it lies; a copy of what no two row strides and one column stride describe.

    And of one value expanded over the columns (the cotangent of `.sum()`): one written and read again costs less than
    what it would do to the others, which are then read an element at a time too.
    """
    if tensor.is_neg():  # `.conj().imag`: memory holds the negated values
        return _Operand(True, (0, n, 1), 0)
    if tensor.is_contiguous():
        return _Operand(False, (0, n, 1), 0)
    lead = tensor.ndim - normalized_ndim
    rows = folded(tensor.shape[:lead], tensor.stride()[:lead])
    columns = folded(tensor.shape[lead:], tensor.stride()[lead:])
    if len(rows) > 2 or len(columns) > 1 or (columns and columns[0][1] == 0):
        return _Operand(True, (0, n, 1), 0)
    stride_col = columns[0][1] if columns else 1
    if len(rows) == 2:
        return _Operand(False, (rows[0][1], rows[1][1], stride_col), rows[1][0])
    return _Operand(False, (0, rows[0][1] if rows else n, stride_col), 0)


class Rows:
    """How tensors of these sizes and strides are addressed together, wherever they lie."""

    def __init__(self, tensors: Sequence[Tensor | None], normalized_ndim: int, n: int) -> None:
        operands = [None if t is None else _operand(t, normalized_ndim, n) for t in tensors]
        inner = [o.rows_inner for o in operands if o is not None and o.rows_inner]
        self.n, self.rows_inner = n, inner[0] if inner else 0
        self.strides: list[tuple[int, int, int] | None] = []
        copied: list[bool] = []
        for operand in operands:
            if operand is not None and operand.rows_inner not in (0, self.rows_inner):  # folds in another way
                operand = _Operand(True, (0, n, 1), 0)
            copied.append(operand is not None and operand.copied)
            if operand is None:
                self.strides.append(None)
                continue
            outer, row, column = operand.strides
            if self.rows_inner and not operand.rows_inner:
                outer = self.rows_inner * row
            self.strides.append((outer, row, column))
        self.copied = copied if any(copied) else None  # which have to be copied
        self.vec = 8 if any(t is not None and t.element_size() == 2 for t in tensors) else 4

    def read(self, tensors: Iterable[Tensor | None]) -> list[Any]:
        """The tensors, copied where kernels cannot address them."""
        assert self.copied is not None
        return [
            t if t is None or not copied else t.resolve_neg().contiguous()
            for t, copied in zip(tensors, self.copied, strict=True)
        ]

    def layout(self, aligned: bool, parameters: Parameters | None = None) -> Layout:
        """`aligned`: all of them, the parameters and the results start at multiples of 16 bytes."""
        vec, present = self.vec, [s for s in self.strides if s is not None]
        unit = all(column == 1 for *_, column in present)
        aligned = aligned and unit and self.n % vec == 0 and all((s[0] | s[1]) % vec == 0 for s in present)
        aligned = aligned and (parameters is None or all(stride % vec == 0 for stride in parameters.strides))
        of = vec if aligned else 1
        triples = [(0, 0, 0) if s is None else (s[0] // of, s[1] // of, s[2]) for s in self.strides]
        flat = tuple([number for triple in triples for number in triple])
        kind = 0 if aligned else 1 if unit else 2
        return Layout(flat, kind, vec, self.rows_inner > 0, self.rows_inner or 1, self.n // of)


class Parameters:
    """How weight, bias, x_bias and layer_scale are addressed: each a vector for all rows, or one for each sample."""

    def __init__(self, given: Sequence[Tensor | None], normalized_ndim: int, n: int, acc: torch.dtype) -> None:
        self._acc = acc
        of_samples = [several_samples(p, normalized_ndim) for p in given]
        copied = [p is not None and not self._is_read(p, normalized_ndim) for p in given]
        self.per_sample, self.copied = any(of_samples), copied if any(copied) else None
        weight, bias, _, layer_scale = [
            0 if p is None or not own else n if copy else p.stride(0)
            for p, own, copy in zip(given, of_samples, copied, strict=True)
        ]
        self.strides = weight, bias, layer_scale  # from a sample's vector to the next; 0 where there is one

    def _is_finer(self, parameter: Tensor) -> bool:
        return parameter.dtype is torch.float64 and self._acc is not torch.float64

    def _is_read(self, parameter: Tensor, normalized_ndim: int) -> bool:
        """Whether kernels read it where it lies."""
        first = parameter.ndim - normalized_ndim
        columns = folded(parameter.shape[first:], parameter.stride()[first:])
        one_after_another = not columns or (len(columns) == 1 and columns[0][1] == 1)
        return one_after_another and not parameter.is_neg() and not self._is_finer(parameter)

    def read(self, parameters: Iterable[Tensor | None]) -> list[Any]:
        """The parameters, copied where kernels cannot address them.

        One finer than the compute dtype is rounded here: a tile of it would take twice the registers.
        """
        assert self.copied is not None
        found = []
        for parameter, copied in zip(parameters, self.copied, strict=True):
            if parameter is not None and copied:
                parameter = parameter.resolve_neg().contiguous()
                parameter = parameter.to(self._acc) if self._is_finer(parameter) else parameter
            found.append(parameter)
        return found

    def in_units(self, layout: Layout) -> tuple[int, int, int]:
        """The strides of weight, bias and layer_scale."""
        weight, bias, layer_scale = self.strides
        of = layout.vec if layout.kind == 0 else 1
        return weight // of, bias // of, layer_scale // of
