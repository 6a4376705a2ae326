"""``F.linear`` by the faster of torch's two libraries for matrix products on a CPU, MKL and oneDNN.

torch's own ``F.linear`` calls MKL in float32, on every processor. On AMD's processors with AVX-512, oneDNN takes 0.8 to
0.95 of its time for x W^T, for dx = dy W and for dW = dy^T x (benchmarks/NOTES.md, "Matrix products in float32").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._transforms import wants_gradients
from ..dispatch import eager, settings
from ..dispatch.rules import ONEDNN_COPIED, ONEDNN_PRODUCTS, onednn_is_faster
from ..providers.cpu import library

_is_compiling = torch.compiler.is_compiling
_PARAMETERS = (Tensor, torch.nn.Parameter)


class ByOnednn(NamedTuple):
    """Which products oneDNN computes."""

    y: bool
    dx: bool
    dweight: bool


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(x, weight, bias)``, faster where that was measured. Arguments, shapes and errors are torch's."""
    if _is_compiling() or weight.ndim != 2 or x.numel() * weight.shape[0] < ONEDNN_PRODUCTS:
        return F.linear(x, weight, bias)
    if type(x) is Tensor and x.is_cpu and _alike(x, weight, bias):
        rows = x.numel() // weight.shape[1]
        outputs, inputs = weight.shape
        gradient_rows, gradient_columns = (outputs, inputs) if weight.is_contiguous() else (inputs, outputs)
        by_onednn = ByOnednn(
            onednn_is_faster(rows, outputs, inputs),
            onednn_is_faster(rows, inputs, outputs),
            rows * weight.numel() >= ONEDNN_COPIED and onednn_is_faster(gradient_rows, gradient_columns, rows),
        )
        if any(by_onednn) and _is_left_to_us():
            if wants_gradients((x, weight, bias)):
                y: Tensor = LinearFunction.apply(x, weight, bias, by_onednn)
                return y
            if by_onednn.y:
                return _by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def gains_by_onednn(weight: Tensor) -> bool:
    """Whether products with this weight may be faster than torch's, for inputs of enough rows."""
    dense = weight.is_cpu and weight.dtype is torch.float32 and type(weight) in _PARAMETERS and weight.ndim == 2
    return dense and any(onednn_is_faster(1 << 20, *sizes) for sizes in (weight.shape, weight.t().shape))


def _alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operands are dense, in float32, and of shapes that fit."""
    return (
        type(weight) in _PARAMETERS
        and x.dtype is weight.dtype is torch.float32
        and x.shape[-1:] == weight.shape[1:]
        and (weight.is_contiguous() or weight.t().is_contiguous())  # other strides take oneDNN 400 times as long
        and (bias is None or (type(bias) in _PARAMETERS and bias.dtype is x.dtype and bias.shape == weight.shape[:1]))
    )


def _is_left_to_us() -> bool:
    return bool(
        settings.current.provider in (None, "cpu")
        and eager.unwatched()
        and torch.backends.mkldnn.enabled
        and torch.get_float32_matmul_precision() == "highest"
    )


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
        ctx.save_for_backward(x, weight)
        ctx.by_onednn = by_onednn
        return _by_onednn(x, weight, bias) if by_onednn.y else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_onednn = ByOnednn(False, False, False) if eager.differentiated(dy) else ctx.by_onednn
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _by_onednn(dy, weight.t(), None) if by_onednn.dx else dy @ weight
        if ctx.needs_input_grad[1]:
            dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            if weight.is_contiguous():  # the gradient has W's strides
                dweight = _product_over_rows(dy_rows, x_rows, by_onednn.dweight)
            else:
                dweight = _product_over_rows(x_rows, dy_rows, by_onednn.dweight).t()
        if ctx.needs_input_grad[2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, dweight, dbias, None
