"""Gradients of the overloads ``recorded``, for exported and traced programs: no Function of ours is left in these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from .._options import from_flat
from ..dispatch.resolve import provider_of_raw_op
from . import activation, attention, norm


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        inputs, options = from_flat("add_layer_norm_fwd", args[:-1])
        outputs = torch.ops.fusednorm.add_layer_norm_fwd.recorded(*args)
        provider = args[-1] or provider_of_raw_op("add_layer_norm_fwd", inputs, options)
        norm.save(ctx, inputs, options, outputs, provider, from_normed=False)
        ctx.mark_non_differentiable(outputs[2], *([] if options.store_residual else [outputs[1]]))
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return norm.AddLayerNormFunction.backward(ctx, *cotangents[:2])[:-1]


class _BiasActDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs, options = from_flat("bias_act_dropout_fwd", args[:-1])
        ctx.save_for_backward(*inputs)
        ctx.options = options
        ctx.provider = args[-1] or provider_of_raw_op("bias_act_dropout_fwd", inputs, options)
        return torch.ops.fusednorm.bias_act_dropout_fwd.recorded(*args)

    backward = activation.BiasActDropoutFunction.backward


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        inputs, options = from_flat("attention_fwd", args[:-1])
        out, lse = torch.ops.fusednorm.attention_fwd.recorded(*args)
        provider = args[-1] or provider_of_raw_op("attention_fwd", inputs, options)
        attention.save(ctx, inputs, options, out, lse, provider)
        return out, lse

    backward = attention.AttentionFunction.backward


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
