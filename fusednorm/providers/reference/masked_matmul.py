"""Two products that leave out what is not visible, NaN and Inf included; each is the other's derivative.

Their rules compose: derivatives of derivatives are right to any depth, forward mode within forward mode included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import _unwrap_for_grad, _wrap_for_grad, is_batchedtensor, is_legacy_batchedtensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from ..._transforms import transform_active


def known_finite(tensor: Tensor) -> bool:
    """Whether all of it is seen to be finite. Not looked at where a look would wait, or see no values."""
    return (
        tensor.is_cpu
        and type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not (transform_active() or is_batchedtensor(tensor) or is_legacy_batchedtensor(tensor))
        and not torch._C._len_torch_dispatch_stack()
        and bool(tensor.isfinite().all())
    )


def _tangent(product: Callable[..., Tensor], ctx: Any, a_tangent: Tensor | None, b_tangent: Tensor | None) -> Tensor:
    """``product(da, b, visible) + product(a, db, visible)``, which enclosing transforms see.

    Torch records no derivatives while it runs a ``jvp``. Operators there would be constants to every enclosing
    transform, and a second forward derivative silently wrong. So the operands are unwrapped to the enclosing level.
    """
    operands = (*ctx.saved_tensors, a_tangent, b_tangent)
    if not torch._C._are_functorch_transforms_active():  # forward_ad.dual_level, which does not nest
        return _sum_of_products(product, *operands)
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    operands = tuple([None if t is None else _unwrap_for_grad(t, level) for t in operands])
    with torch.enable_grad(), _set_fwd_grad_enabled(True), interpreter.lower():
        tangent = _sum_of_products(product, *operands)
    return _wrap_for_grad(tangent, level)


def _sum_of_products(
    product: Callable[..., Tensor],
    a: Tensor,
    b: Tensor,
    visible: Tensor,
    a_tangent: Tensor | None,
    b_tangent: Tensor | None,
) -> Tensor:
    terms = [product(a_tangent, b, visible)] if a_tangent is not None else []
    terms += [product(a, b_tangent, visible)] if b_tangent is not None else []
    return sum(terms[1:], terms[0])


def _batched(
    product: Callable[..., Tensor], size: int, in_dims: tuple[int | None, ...], operands: tuple[Tensor, ...]
) -> tuple[Tensor, int]:
    """The rule for vmap. Torch's generated rule would run the ``jvp`` below a level of its own."""
    fronts = [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(operands, in_dims, strict=True)
    ]
    ndim = max(t.ndim for t in fronts)
    fronts = [t.reshape(size, *(1,) * (ndim - t.ndim), *t.shape[1:]) for t in fronts]
    return product(*fronts), 0


class SelectMatmul(torch.autograd.Function):
    """``sum_k a[i, k] b[k, d]`` over the k that i sees; `a` is 0 elsewhere, but 0 * NaN would be NaN."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Tensor) -> tuple[Tensor, int]:
        return _batched(masked_pv, info.batch_size, in_dims, operands)

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
        da = masked_qk(dy, b, visible) if ctx.needs_input_grad[0] else None
        db = masked_pv(a.mT, dy, visible.mT) if ctx.needs_input_grad[1] else None
        return da, db, None

    @staticmethod
    def jvp(ctx: Any, a_tangent: Tensor | None, b_tangent: Tensor | None, _: None) -> Tensor:
        return _tangent(masked_pv, ctx, a_tangent, b_tangent)


class MaskedProduct(torch.autograd.Function):
    """``sum_d x[i, d] y[k, d]`` where i sees k, else 0."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Tensor) -> tuple[Tensor, int]:
        return _batched(masked_qk, info.batch_size, in_dims, operands)

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
        dx = masked_pv(ds, y, visible) if ctx.needs_input_grad[0] else None
        dy = masked_pv(ds.mT, x, visible.mT) if ctx.needs_input_grad[1] else None
        return dx, dy, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, y_tangent: Tensor | None, _: None) -> Tensor:
        return _tangent(masked_qk, ctx, x_tangent, y_tangent)


masked_pv = SelectMatmul.apply
masked_qk = MaskedProduct.apply
