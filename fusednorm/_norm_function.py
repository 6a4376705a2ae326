"""The way down from the norm functions: choice of provider, the autograd Function, and its double backward."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

from . import _ops, providers
from .providers import reference

_log = logging.getLogger("fusednorm")

Args = tuple[Any, ...]  # the arguments of fusednorm::add_layer_norm_fwd without the provider, in order


def run(call: str, args: Args, memory_efficient: bool) -> tuple[Tensor, Tensor]:
    """Choose the way down once, and take it: (normed, residual_out)."""
    if transform_active():
        # An autograd.Function would silently drop tangents; torch.layer_norm's forward-over-reverse and third
        # derivatives are wrong. The reference's forward is made of elementary operators and right to any order.
        how = "elementary operators, because a torch.func transform or forward-mode AD is active"
        providers.record(providers.Route(call, "reference", how))
        normed, residual_out, _ = reference.add_layer_norm_fwd(*args)
        return normed, residual_out if args[15] else args[0]
    provider, refusals = providers.choose("add_layer_norm_fwd", args)
    composite = provider == "reference" and providers.requested() is None and not memory_efficient
    how = "torch's own operators: no kernel of ours serves this call" if composite else "one fused op each way"
    providers.record(providers.Route(call, provider, how, refusals))
    if composite:
        return reference.add_layer_norm(*args)
    return _fused(args, provider, memory_efficient)


def transform_active() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _fused(args: Args, provider: str, memory_efficient: bool) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:6]):
        from_normed = memory_efficient and _invertible(weight=args[2], bias=args[3], args=args)
        outputs = AddLayerNormFunction.apply(*args, provider, from_normed)
    else:
        outputs = _ops.add_layer_norm_fwd(*args, provider=provider)
    normed, residual_out = outputs[:2]
    return normed, residual_out if args[15] else args[0]


class AddLayerNormFunction(torch.autograd.Function):
    """One op forward, one op backward. What is kept: z (or normed), the statistics, the parameters, the seed.

    Under ``create_graph=True`` the backward is the reference's differentiable one, on statistics recomputed from the
    kept tensor, which is an input or output of this Function: derivatives of any order follow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        x_bias: Tensor | None,
        layer_scale: Tensor | None,
        seed: Tensor | None,
        normalized_ndim: int,
        eps: float,
        dropout_p: float,
        drop_path_p: float,
        normed_dtype: torch.dtype,
        residual_dtype: torch.dtype,
        rms: bool,
        zero_centered_weight: bool,
        store_residual: bool,
        provider: str,
        from_normed: bool,
    ) -> tuple[Tensor | None, ...]:
        normed, residual_out, stats = _ops.add_layer_norm_fwd(
            x,
            residual,
            weight,
            bias,
            x_bias,
            layer_scale,
            seed,
            normalized_ndim,
            eps,
            dropout_p,
            drop_path_p,
            normed_dtype,
            residual_dtype,
            rms,
            zero_centered_weight,
            store_residual,
            provider=provider,
        )
        saved = normed if from_normed else residual_out if store_residual else x
        branch = x if ctx.needs_input_grad[5] else None  # d(layer_scale) alone looks at x again
        ctx.save_for_backward(saved, stats, weight, bias, branch, x_bias, layer_scale, seed)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.options = (normalized_ndim, eps, dropout_p, drop_path_p, x.dtype, rms, zero_centered_weight)
        ctx.normed_dtype, ctx.provider, ctx.from_normed = normed_dtype, provider, from_normed
        ctx.set_materialize_grads(False)
        outputs = (normed, residual_out if store_residual else None)
        return (*outputs, stats) if from_normed else outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        dnormed, dresidual_out = cotangents[:2]
        dstats = cotangents[2] if len(cotangents) > 2 else None
        saved, stats, weight, bias, x, x_bias, layer_scale, seed = ctx.saved_tensors
        normalized_ndim, eps, dropout_p, drop_path_p, x_dtype, rms, zero_centered_weight = ctx.options
        if dnormed is None:
            dnormed = torch.zeros(saved.shape, dtype=ctx.normed_dtype, device=saved.device)
        if dstats is not None:  # only in a double backward through a rebuilt z
            dresidual_out = _plus_rstd_cotangent(
                dresidual_out, dstats, saved, stats, weight, bias, normalized_ndim, zero_centered_weight
            )
        need = ctx.needs_input_grad[:6]
        # without anything between x and z both have the same gradient: it is computed, and written, once
        shared = x_dtype == ctx.residual_dtype and layer_scale is None and not dropout_p and not drop_path_p
        output_mask = [need[0] or (shared and need[1]), need[1] and not shared, *need[2:]]
        create_graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if create_graph and not ctx.from_normed:
            stats = reference.statistics(saved, normalized_ndim, eps, stats.dtype, rms)
        args: Args = (
            *(dnormed, dresidual_out, saved, stats, weight, bias, x, x_bias, layer_scale, seed),
            *(normalized_ndim, dropout_p, drop_path_p, x_dtype, ctx.residual_dtype or x_dtype, rms),
            *(zero_centered_weight, ctx.from_normed, output_mask),
        )
        gradients: tuple[Tensor, ...]
        if create_graph:
            gradients = reference.add_layer_norm_bwd(*args)
        else:
            gradients = _ops.add_layer_norm_bwd(*args, provider=ctx.provider)
        dx, dresidual, *dparameters = gradients
        dresidual = dx if shared else dresidual
        results = [g if wanted else None for g, wanted in zip((dx, dresidual, *dparameters), need, strict=True)]
        return (*results, *[None] * 12)


def _plus_rstd_cotangent(
    dresidual_out: Tensor | None,
    dstats: Tensor,
    saved: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    zero_centered_weight: bool,
) -> Tensor:
    xhat = reference.saved_xhat(saved, stats, weight, bias, normalized_ndim, zero_centered_weight, True)
    extra = reference.rstd_cotangent(dstats[-1], stats[-1], xhat).reshape(saved.shape)
    return extra if dresidual_out is None else dresidual_out + extra


_verdicts = WeakIdKeyDictionary()  # CUDA weight -> (identity of its values, verdict): one look an optimizer step
_told = False


def _invertible(weight: Tensor | None, bias: Tensor | None, args: Args) -> bool:
    """Whether z can be rebuilt from `normed` accurately.

    normed = w x̂ + b is kept with one rounding u, so x̂ = (normed - b) / w errs by u |x̂ + b/w|: of the order of the
    rounding itself while |b| <= 2 |w|, and while w is a normal number of normed's dtype, or u is not relative.

    On CUDA a look waits for the device, so it is taken once for each version of the parameters; an edit through
    ``.data`` bumps no version and is not seen there. On the CPU every call looks.
    """
    if weight is None:
        return bias is None
    if torch.compiler.is_compiling() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    values = tuple((t._version, t.data_ptr()) for t in (weight, bias) if t is not None)
    known = _verdicts.get(weight) if weight.is_cuda else None
    if known is not None and known[0] == values:
        return known[1]
    with torch.no_grad():
        size = (weight.double() + 1.0 if args[14] else weight.double()).abs()
        good = size >= torch.finfo(args[11]).tiny
        if bias is not None:
            good &= bias.double().abs() <= 2.0 * size
        verdict = bool(good.all())
    if weight.is_cuda:
        _verdicts[weight] = (values, verdict)
    if not verdict:
        _tell()
    return verdict


def _tell() -> None:
    global _told
    if not _told:
        _told = True
        _log.warning(
            "memory_efficient: a weight is too near zero to rebuild z from normed; z is kept (said once, holds for "
            "every such call)"
        )
