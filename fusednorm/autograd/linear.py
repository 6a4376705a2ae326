"""``F.linear`` by the fastest of three on a CPU: torch's two libraries, MKL and oneDNN, and ours for few rows.

torch's own ``F.linear`` calls MKL in float32, on every processor. On AMD's processors with AVX-512, oneDNN takes 0.8 to
0.95 of its time for x W^T, for dx = dy W and for dW = dy^T x (benchmarks/NOTES.md, "Matrix products in float32"). Of
few rows without gradients, as in generation, our product takes a quarter to nine tenths of torch's time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._transforms import wants_gradients
from ..dispatch import eager, settings
from ..dispatch.rules import (
    LEAST_OF_FEW_ROWS,
    MOST_FEW_ROWS,
    ONEDNN_COPIED,
    ONEDNN_PRODUCTS,
    few_rows_are_faster,
    onednn_is_faster,
)
from ..providers.cpu import library

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._get_tracing_state
_PARAMETERS = (Tensor, torch.nn.Parameter)


class ByOnednn(NamedTuple):
    """Which products oneDNN computes."""

    y: bool
    dx: bool
    dweight: bool


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``, faster where that was measured. Arguments, shapes and errors are torch's."""
    if _is_compiling() or _is_tracing() is not None or weight.ndim != 2:
        return F.linear(x, weight, bias)
    outputs, inputs = weight.shape
    few = 0 < x.numel() <= MOST_FEW_ROWS * inputs and outputs * inputs >= LEAST_OF_FEW_ROWS
    if (few or x.numel() * outputs >= ONEDNN_PRODUCTS) and type(x) is Tensor and _alike(x, weight, bias):
        rows = x.numel() // inputs
        y = _of_few_rows(x, weight, bias, rows) if few else None
        if y is None:
            y = _by_libraries(x, weight, bias, rows)
        if y is not None:
            return y
    return F.linear(x, weight, bias)


def _of_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor | None:
    """By our product, or None where torch's is as fast or a graph is recorded."""
    y: Tensor | None = None
    if (
        few_rows_are_faster(rows, weight.numel(), x.dtype)
        and x.is_contiguous()
        and weight.is_contiguous()
        and not wants_gradients((x, weight, bias))
        and _is_left_to_us()
    ):
        y = library.few_rows(x, weight, bias)
    return y


def _by_libraries(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor | None:
    """By oneDNN, in the forward or the backward, or None where MKL computes everything."""
    outputs, inputs = weight.shape
    if x.dtype is not torch.float32 or x.numel() * outputs < ONEDNN_PRODUCTS:
        return None
    gradient_rows, gradient_columns = (outputs, inputs) if weight.is_contiguous() else (inputs, outputs)
    by_onednn = ByOnednn(
        onednn_is_faster(rows, outputs, inputs),
        onednn_is_faster(rows, inputs, outputs),
        rows * weight.numel() >= ONEDNN_COPIED and onednn_is_faster(gradient_rows, gradient_columns, rows),
    )
    y: Tensor | None = None
    if any(by_onednn) and _is_left_to_us() and _onednn_is_allowed():
        if wants_gradients((x, weight, bias)):
            y = LinearFunction.apply(x, weight, bias, by_onednn)
        elif by_onednn.y:
            y = _by_onednn(x, weight, bias)
    return y


def gains_by_onednn(weight: Tensor) -> bool:
    """Whether products with this weight may be faster than torch's, for inputs of enough rows."""
    dense = weight.is_cpu and weight.dtype is torch.float32 and type(weight) in _PARAMETERS and weight.ndim == 2
    return dense and any(onednn_is_faster(1 << 20, *sizes) for sizes in (weight.shape, weight.t().shape))


def _alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operands are dense, on the CPU, of one dtype, and of shapes that fit."""
    return (
        x.is_cpu
        and _dense(weight, x)
        and x.shape[-1:] == weight.shape[1:]
        and (weight.is_contiguous() or weight.t().is_contiguous())  # other strides take oneDNN 400 times as long
        and (bias is None or (_dense(bias, x) and bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and not x._is_zerotensor()
    )


def _dense(parameter: Tensor, x: Tensor) -> bool:
    same = type(parameter) in _PARAMETERS and parameter.dtype is x.dtype and parameter.is_cpu
    return same and not parameter._is_zerotensor()


def _is_left_to_us() -> bool:
    return settings.current.provider in (None, "cpu") and eager.unwatched()


def _onednn_is_allowed() -> bool:
    """Whether torch's settings leave float32 products to oneDNN, in full precision."""
    try:
        return bool(torch.backends.mkldnn.enabled and torch.get_float32_matmul_precision() == "highest")
    except RuntimeError:  # the newer settings, one for each operation, were used
        return False


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return y


def _product_over_rows(a: Tensor, b: Tensor, by_onednn: bool) -> Tensor:
    """a^T b, of two matrices of as many rows."""
    if not by_onednn:
        return a.t() @ b
    # oneDNN reads the first operand by rows alone: given a^T, torch copies it, and takes longer than MKL in all
    return _by_onednn(library.transposed(a.contiguous()), b.contiguous().t(), None)


class LinearFunction(torch.autograd.Function):
    """y = x W^T + b; dx = dy W, dW = dy^T x, db = the sum of dy over the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, by_onednn: ByOnednn) -> Tensor:
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        ctx.by_onednn, ctx.rows_of_outputs = by_onednn, weight.is_contiguous()
        return _by_onednn(x, weight, bias) if by_onednn.y else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_torch = eager.differentiated(dy) or dy._is_zerotensor()
        by_onednn = ByOnednn(False, False, False) if by_torch else ctx.by_onednn
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _by_onednn(dy, weight.t(), None) if by_onednn.dx else dy @ weight
        if ctx.needs_input_grad[1]:
            dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            if ctx.rows_of_outputs:  # the gradient has W's strides
                dweight = _product_over_rows(dy_rows, x_rows, by_onednn.dweight)
            else:
                dweight = _product_over_rows(x_rows, dy_rows, by_onednn.dweight).t()
        if ctx.needs_input_grad[2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, dweight, dbias, None
