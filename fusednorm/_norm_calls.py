"""From the arguments of a norm function to the plan that serves it: one that was kept, or a new one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _autocast, _checks, _modulation, dropout
from ._options import NormInputs, NormOptions
from .autograd import norm as autograd_norm
from .dispatch import eager
from .providers.samples import across_rows


def _sharded(call: str, tensors: dict[str, Tensor | None], normalized_shape: Any, **options: Any) -> Any:
    from .integrations import dtensor

    return dtensor.norm(call, tensors, normalized_shape, **options)


def plain(
    name: str,
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
) -> Tensor:
    call, inputs = "rms_norm" if rms else "layer_norm", NormInputs(x, None, weight, bias)
    if type(x) not in eager.TENSORS and eager.is_sharded(x):
        tensors = {name: x, "weight": weight} | ({} if rms else {"bias": bias})
        return _sharded(call, tensors, normalized_shape, eps=eps)
    signature, sizes = None, eager.sizes(normalized_shape)
    if sizes is not None and (type(eps) is float or (rms and eps is None)):
        plan, signature = eager.find(inputs, call, sizes, eps)
        if plan is not None:
            return plan(inputs)[0]
    _checks.check_tensor(name, x)
    shape = _checks.check_normalized_shape(name, x, normalized_shape)
    _checks.check_parameter("weight", weight, shape, name, x)
    _checks.check_parameter("bias", bias, shape, name, x)
    eps = _checks.check_eps(eps, rms, x.dtype)
    options = NormOptions(len(shape), eps, 0.0, 0.0, _autocast.norm_dtype(x, rms), x.dtype, rms, False, False)
    plan = autograd_norm.plan(call, inputs, options)
    eager.keep(signature, plan)
    return plan(inputs)[0]


def residual_step(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    modulation: tuple[Tensor | None, Tensor | None, Tensor | None],
    dropout_p: float,
    drop_path_p: float,
    seed: int | Tensor | None,
    residual_dtype: torch.dtype | None,
    zero_centered_weight: bool,
    memory_efficient: bool,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """`modulation`: gate, scale and shift."""
    call = "add_rms_norm" if rms else "add_layer_norm"
    signature = None
    gate, scale, shift = modulation
    if type(x) not in eager.TENSORS and eager.is_sharded(x):
        tensors = {"x": x, "residual": residual, "weight": weight, "x_bias": x_bias, "layer_scale": layer_scale}
        tensors |= {"gate": gate, "scale": scale, "shift": shift} | ({} if rms else {"bias": bias})
        return _sharded(
            *(call, tensors, normalized_shape),
            eps=eps,
            dropout_p=dropout_p,
            drop_path_p=drop_path_p,
            seed=seed,
            residual_dtype=residual_dtype,
            zero_centered_weight=zero_centered_weight,
            memory_efficient=memory_efficient,
        )
    is_adaptive = not (gate is scale is shift is None)
    if is_adaptive:
        zero_centered_weight = _checks.check_flag("zero_centered_weight", zero_centered_weight)
        _checks.check_tensor("x", x)
        shape = _checks.check_normalized_shape("x", x, normalized_shape)
        for name, parameter in (("weight", weight), ("bias", bias), ("layer_scale", layer_scale)):
            _checks.check_parameter(name, parameter, shape, "x", x)
        parameters = _modulation.Parameters(weight, bias, layer_scale, zero_centered_weight)
        parameters = _modulation.folded(parameters, x, shape, gate, scale, shift)
        weight, bias, layer_scale, zero_centered_weight = parameters
    if type(dropout_p) is type(drop_path_p) is float and (type(eps) is float or (rms and eps is None)):
        sizes = eager.sizes(normalized_shape)
        # a look at the weights decides whether a call is memory-efficient, and a seed may have to be converted
        plannable = sizes is not None and memory_efficient is False and seed is None
        plannable = plannable and (residual_dtype is None or type(residual_dtype) is torch.dtype)
        if plannable and type(zero_centered_weight) is bool:
            inputs = NormInputs(x, residual, weight, bias, x_bias, layer_scale)
            key_options = sizes, eps, dropout_p, drop_path_p, residual_dtype, zero_centered_weight
            plan, signature = eager.find(inputs, call, *key_options)
            if plan is not None:
                return plan(inputs)
    zero_centered_weight = _checks.check_flag("zero_centered_weight", zero_centered_weight)
    memory_efficient = _checks.check_flag("memory_efficient", memory_efficient)
    _checks.check_tensor("x", x)
    _checks.check_residual(residual, x)
    shape = _checks.check_normalized_shape("x", x, normalized_shape)
    _checks.check_parameter("x_bias", x_bias, shape, "x", x)
    if not is_adaptive:
        for name, parameter in (("weight", weight), ("bias", bias), ("layer_scale", layer_scale)):
            _checks.check_parameter(name, parameter, shape, "x", x)
    dropout_p, drop_path_p = _checks.check_epilogue(dropout_p, drop_path_p, residual_dtype)
    if seed is not None:
        _checks.check_seed(seed)
    if dropout_p == 1.0 or drop_path_p == 1.0:
        factor = None if layer_scale is None else across_rows(layer_scale, x, len(shape))
        x, x_bias, layer_scale = dropout.all_dropped(x, x_bias, factor), None, None
        dropout_p, drop_path_p, signature = 0.0, 0.0, None
    masked = bool(dropout_p or drop_path_p)
    seed = dropout.seed_tensor(seed, x.device) if masked and seed is not None else None
    if residual_dtype is None:
        residual_dtype = x.dtype if residual is None else residual.dtype
    unchanged = residual is None and x_bias is None and layer_scale is None and not masked
    store_residual = not unchanged or residual_dtype != x.dtype
    eps = _checks.check_eps(eps, rms, x.dtype, residual_dtype)
    inputs = NormInputs(x, residual, weight, bias, x_bias, layer_scale, seed)
    options = NormOptions(
        *(len(shape), eps, dropout_p, drop_path_p, _autocast.residual_norm_dtype(x), residual_dtype, rms),
        *(zero_centered_weight, store_residual),
    )
    plan = autograd_norm.plan(call, inputs, options, memory_efficient)
    eager.keep(signature, plan)
    return plan(inputs)
