"""Gradients of the overloads ``recorded``, for exported and traced programs: no Function of ours is left in these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from ..activation import BiasActDropoutFunction
from .attention import AttentionFunction
from .norm import AddLayerNormFunction


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        x, residual, weight, bias, x_bias, layer_scale, seed, normalized_ndim, eps, dropout_p, drop_path_p, *rest = args
        normed_dtype, _, rms, zero_centered_weight, store_residual, provider = rest
        normed, residual_out, stats = torch.ops.fusednorm.add_layer_norm_fwd.recorded(*args)
        saved, branch = residual_out if store_residual else x, x if ctx.needs_input_grad[5] else None
        ctx.save_for_backward(saved, stats, weight, bias, branch, x_bias, layer_scale, seed)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.options = (normalized_ndim, eps, dropout_p, drop_path_p, x.dtype, rms, zero_centered_weight)
        ctx.normed_dtype, ctx.from_normed = normed_dtype, False
        ctx.provider = provider or _ops.chosen("add_layer_norm_fwd", args[:-1])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats, *([] if store_residual else [residual_out]))
        return normed, residual_out, stats

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return AddLayerNormFunction.backward(ctx, *cotangents[:2])[:-1]


class _BiasActDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:3])
        ctx.activation, ctx.dropout_p = args[3:5]
        ctx.provider = args[-1] or _ops.chosen("bias_act_dropout_fwd", args[:-1])
        return torch.ops.fusednorm.bias_act_dropout_fwd.recorded(*args)

    backward = BiasActDropoutFunction.backward


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, attn_mask, key_mask, seed, cu_seqlens_q, cu_seqlens_k = args[:8]
        out, lse = torch.ops.fusednorm.attention_fwd.recorded(*args)
        ctx.save_for_backward(q, k, v, out, lse, attn_mask, key_mask, seed, cu_seqlens_q, cu_seqlens_k)
        ctx.options = args[8:-1]
        ctx.provider = args[-1] or _ops.chosen("attention_fwd", args[:-1])
        ctx.set_materialize_grads(False)
        return out, lse

    backward = AttentionFunction.backward


def _autograd(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    op = getattr(torch.ops.fusednorm, name).recorded

    def autograd(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    return autograd


for _name, _function in zip(_ops.RECORDED, (_AddLayerNorm, _BiasActDropout, _Attention), strict=True):
    _ops.LIBRARY.impl(f"{_name}.recorded", _autograd(_name, _function.apply), "Autograd", with_keyset=True)
