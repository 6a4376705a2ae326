"""Norms as torch computes them, and the eager twin of ``memory_efficient``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def torch_norm(
    z: Tensor, shape: torch.Size, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> Tensor:
    return F.rms_norm(z, shape, weight, eps) if rms else F.layer_norm(z, shape, weight, bias, eps)


class NormKeepingItsOutput(torch.autograd.Function):
    """The eager twin of ``memory_efficient``: its backward sees the rounded output instead of z.

    The normalized value it rebuilds, (normed - bias) / weight, is off by rounding(normed) / weight. That is
    inherent in keeping the output, so the budget measures this method's error and not that of keeping z.
    """

    @staticmethod
    def forward(ctx, z, weight, bias, eps, rms, shape, dtype):
        ctx.dims, ctx.rms, ctx.z_dtype = tuple(range(z.ndim - len(shape), z.ndim)), rms, z.dtype
        normed = torch_norm(z, shape, weight, bias, eps, rms).to(dtype)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        centred = z if rms else z - z.mean(ctx.dims, keepdim=True)
        rstd = torch.rsqrt(centred.square().mean(ctx.dims, keepdim=True) + eps)
        ctx.save_for_backward(normed, rstd, weight, bias)
        return normed

    @staticmethod
    def backward(ctx, dnormed):
        normed, rstd, weight, bias = ctx.saved_tensors
        dy, xhat = dnormed.to(rstd.dtype), normed.to(rstd.dtype)
        xhat = xhat if bias is None else xhat - bias.to(rstd.dtype)
        xhat = xhat if weight is None else xhat / weight.to(rstd.dtype)
        g = dy if weight is None else dy * weight.to(rstd.dtype)
        dz = g - xhat * (g * xhat).mean(ctx.dims, keepdim=True)
        dz = dz if ctx.rms else dz - g.mean(ctx.dims, keepdim=True)
        lead = tuple(range(ctx.dims[0]))
        dweight, dbias = dy * xhat, dy
        if lead:  # a sum over no dimensions is one over all
            dweight, dbias = dweight.sum(lead), dbias.sum(lead)
        dweight = None if weight is None else dweight.to(weight.dtype)
        dbias = None if bias is None else dbias.to(bias.dtype)
        return (dz * rstd).to(ctx.z_dtype), dweight, dbias, None, None, None, None
