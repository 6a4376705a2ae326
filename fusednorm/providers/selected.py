"""Two products that leave out what is not visible, NaN and Inf included; each is the other's derivative."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._transforms import batched


def known_finite(tensor: Tensor) -> bool:
    """Whether all of it is seen to be finite. Not looked at where a look would wait, or see no values."""
    return (
        tensor.is_cpu
        and type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not batched(tensor)
        and not torch._C._len_torch_dispatch_stack()
        and bool(tensor.isfinite().all())
    )


class SelectMatmul(torch.autograd.Function):
    """``sum_k a[i, k] b[k, d]`` over the k that i sees; `a` is 0 elsewhere, but 0 * NaN would be NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, visible: Tensor) -> Tensor:
        if known_finite(b):
            return a @ b
        finite = b.isfinite()
        total = a @ torch.where(finite, b, 0.0)
        # what is seen of the rest: infinities of one sign give it, all else gives NaN
        count = visible.to(a.dtype) @ (~finite).to(a.dtype)
        signed = a.sign() @ torch.where(b.isinf(), b.sign(), 0.0)
        rest = torch.where(signed.abs() == count, signed * math.inf, math.nan)
        return total + torch.where(count == 0, 0.0, rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b, visible = ctx.saved_tensors
        da = masked_product(dy, b, visible) if ctx.needs_input_grad[0] else None
        db = select_matmul(a.mT, dy, visible.mT) if ctx.needs_input_grad[1] else None
        return da, db, None

    @staticmethod
    def jvp(ctx: Any, a_tangent: Tensor | None, b_tangent: Tensor | None, _: None) -> Tensor:
        a, b, visible = ctx.saved_tensors
        terms = [select_matmul(a_tangent, b, visible)] if a_tangent is not None else []
        terms += [select_matmul(a, b_tangent, visible)] if b_tangent is not None else []
        return sum(terms[1:], terms[0])


class MaskedProduct(torch.autograd.Function):
    """``sum_d x[i, d] y[k, d]`` where i sees k, else 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, visible: Tensor) -> Tensor:
        return torch.where(visible, x @ y.mT, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y, visible = ctx.saved_tensors
        ds = torch.where(visible, ds, 0.0)
        dx = select_matmul(ds, y, visible) if ctx.needs_input_grad[0] else None
        dy = select_matmul(ds.mT, x, visible.mT) if ctx.needs_input_grad[1] else None
        return dx, dy, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, y_tangent: Tensor | None, _: None) -> Tensor:
        x, y, visible = ctx.saved_tensors
        terms = [masked_product(x_tangent, y, visible)] if x_tangent is not None else []
        terms += [masked_product(x, y_tangent, visible)] if y_tangent is not None else []
        return sum(terms[1:], terms[0])


select_matmul = SelectMatmul.apply
masked_product = MaskedProduct.apply
