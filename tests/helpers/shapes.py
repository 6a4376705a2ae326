"""Shapes and memory layouts; each name says which path it reaches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracle import MODULATION
from torch import Tensor

PLAIN = ("layer_norm", "rms_norm")
FUSED = ("add_layer_norm", "add_rms_norm")


def affine(function: str) -> tuple[str, ...]:
    return ("weight",) if "rms" in function else ("weight", "bias")


def inputs(function: str) -> tuple[str, ...]:
    return ("x", "residual", *affine(function)) if function in FUSED else ("x", *affine(function))


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@dataclass(frozen=True)
class Shape:
    name: str
    base: tuple[int, ...]  # of the leaf
    view: Callable[[Tensor], Tensor] = lambda leaf: leaf
    normalized_ndim: int = 1
    interpreted: tuple[int, ...] | None = None  # a smaller base on the same path, for an interpreted provider

    def __str__(self) -> str:
        return self.name

    def narrowed(self, interpreted: bool) -> Shape:
        if not interpreted or self.interpreted is None:
            return self
        return Shape(self.name, self.interpreted, self.view, self.normalized_ndim)

    def shape(self) -> torch.Size:
        return self.view(torch.empty(self.base, device="meta")).shape

    def normalized_shape(self) -> torch.Size:
        shape = self.shape()
        return shape[len(shape) - self.normalized_ndim :]

    def samples(self) -> int:
        return self.shape()[0]


def _offset(leaf: Tensor) -> Tensor:
    """Contiguous, one element past an aligned address."""
    return leaf.flatten()[1 : 1 + 5 * 32].view(5, 32)


SHAPES = [
    Shape("one_element", (1, 1)),
    Shape("one_row", (1, 64)),
    Shape("one_column", (5, 1)),
    Shape("odd_width_masked_lanes", (7, 33)),
    Shape("narrow_several_rows_a_block", (67, 8)),
    Shape("aligned_power_of_two", (4, 1024)),
    Shape("odd_wide_unaligned_rows", (3, 4099)),
    Shape("wide_row_past_64KB", (2, 70_001), interpreted=(2, 8_201)),
    Shape("many_rows_weight_grad_partials", (515, 40), interpreted=(131, 40)),
    Shape("no_lead_dimension", (24,)),
    Shape("three_lead_dimensions", (2, 3, 4, 16)),
    Shape("normalized_2d", (3, 4, 5, 6), normalized_ndim=2),
    Shape("normalized_3d_odd", (5, 3, 1, 7), normalized_ndim=3),
    Shape("normalized_everything", (4, 6), normalized_ndim=2),
    Shape("transposed", (32, 6), lambda leaf: leaf.t()),
    Shape("permuted_lead", (3, 4, 16), lambda leaf: leaf.transpose(0, 1)),
    Shape("permuted_3d_last_strided", (3, 16, 4), lambda leaf: leaf.transpose(1, 2)),
    Shape("last_dimension_step_2", (5, 48), lambda leaf: leaf[:, ::2]),
    Shape("rows_step_2", (10, 24), lambda leaf: leaf[::2]),
    Shape("slice_of_fused_projection", (5, 3 * 24), lambda leaf: leaf[:, 24:48]),
    Shape("chunk_of_3d_projection", (2, 3, 2 * 20), lambda leaf: leaf.chunk(2, -1)[1]),
    Shape("expanded_rows", (1, 24), lambda leaf: leaf.expand(6, 24)),
    Shape("expanded_middle", (3, 1, 24), lambda leaf: leaf.expand(3, 4, 24)),
    Shape("storage_offset_misaligned", (161,), _offset),
    Shape("normalized_2d_transposed", (3, 6, 5), lambda leaf: leaf.transpose(1, 2), normalized_ndim=2),
]

EMPTY_SHAPES = [
    Shape("no_rows", (0, 16)),
    Shape("empty_batch", (2, 0, 16)),
    Shape("no_rows_of_several_warps", (0, 64)),
    Shape("empty_dimension_of_several_warps", (4, 0, 64)),
    Shape("no_columns", (3, 0)),
    Shape("no_rows_no_columns", (0, 0)),
    Shape("normalized_2d_no_rows", (0, 3, 4), normalized_ndim=2),
]


def named(*names: str) -> list[Shape]:
    return [shape for shape in (*SHAPES, *EMPTY_SHAPES) if shape.name in names]


COTANGENTS: dict[str, Callable[[Tensor], Tensor]] = {  # of one made contiguous: how it lies in memory
    "expanded": lambda c: c[..., :1].expand_as(c),  # what ``.sum()`` sends back has strides of zero
    "one_value": lambda c: c.sum().expand_as(c),
    "transposed": lambda c: c.mT.contiguous().mT,
    "step_2": lambda c: torch.stack((c, torch.full_like(c, torch.nan)), -1).flatten(-2)[..., ::2],
    "slice": lambda c: torch.stack((c, c), 1)[:, 0],
    "negative_bit": lambda c: torch._neg_view(-c),
}


def random_leaves(
    shape: Shape,
    names: tuple[str, ...],
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
    dtypes: dict[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """Fresh values: x and residual off zero mean, the parameters around their usual initial values.

    |weight| > 0.3 and |bias| < 0.6, so that ``memory_efficient`` may rebuild its input and does.
    """
    leaves = {}
    for name in names:
        size = shape.base if name in ("x", "residual") else shape.normalized_shape()
        size = (shape.samples(), *size) if name in MODULATION else size
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        if name in ("x", "residual"):
            values = values * 1.5 + 0.25
        elif name in ("weight", "layer_scale"):
            values = 1 + values.clamp(-3.4, 3.4) * 0.2
        elif name in MODULATION:
            values = values * 0.5
        elif name == "bias":
            values = values.clamp(-2.9, 2.9) * 0.2
        leaves[name] = values.to(device, (dtypes or {}).get(name, dtype))
    return leaves
