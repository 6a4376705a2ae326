"""The way down from the norm functions: choice of provider, the autograd Function, and its double backward."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _bare, _ops, dispatch, dropout
from .._dtypes import compute_dtype
from .._once import first_time
from .._transforms import batched, distinct, recorded, traced, transform_active
from ..dispatch.crossovers import torch_on_cpu
from ..providers.reference import norm as reference
from ..providers.torch import norm as torch_norm

_autocast_active = torch._C._is_any_autocast_enabled
_log = logging.getLogger("fusednorm")

Args = tuple[Any, ...]  # the arguments of fusednorm::add_layer_norm_fwd without the provider, in order


def run(call: str, args: Args, memory_efficient: bool) -> tuple[Tensor, Tensor]:
    """Choose the way down once, and take it: (normed, residual_out)."""
    if transform_active():
        # An autograd.Function would silently drop tangents; torch.layer_norm's forward-over-reverse and third
        # derivatives are wrong. The reference's forward is made of elementary operators and right to any order.
        how = "elementary operators, because a torch.func transform or forward-mode AD is active"
        dispatch.record(dispatch.Route(call, "reference", how))
        normed, residual_out, _ = reference.add_layer_norm_fwd(*dropout.with_seed(args, 6, args[9] or args[10]))
        return normed, residual_out if args[15] else args[0]
    if memory_efficient and dispatch.requested() == "torch":
        _tell("torch's own operators were asked for")
        memory_efficient = False
    from_normed = memory_efficient and _invertible(args)
    without = ("torch", "its operators keep z for the backward, not normed") if from_normed else None
    provider, refusals = dispatch.choose("add_layer_norm_fwd", args, without)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:6])
    if not dispatch.automatic:
        how = "torch's own operators" if provider == "torch" else "one fused op each way"
        dispatch.record(dispatch.Route(call, provider, how, refusals))
    if provider == "torch":  # whatever the grad mode: reentrant checkpointing runs a call once without and once with
        return torch_norm.add_layer_norm(*args)
    args = dropout.with_seed(args, 6, args[9] or args[10])
    if recorded():
        outputs = _ops.recorded("add_layer_norm_fwd", args)
    elif needs_grad:
        if torch.compiler.is_compiling():
            outputs = AddLayerNormFunction.apply(*distinct(args[:6]), *args[6:], provider, from_normed)
        elif is_functorch_wrapped_tensor(args[0]):  # escaped from a transform that has ended
            outputs = AddLayerNormFunction.apply(*args, provider, from_normed)
        else:
            outputs = _apply(*args, provider, from_normed)
    else:
        outputs = _ops.add_layer_norm_fwd(*args, provider=provider)
    normed, residual_out = outputs[:2]
    return normed, residual_out if args[15] else args[0]


def run_bare(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: Any,
    eps: Any,
    rms: bool,
) -> tuple[Tensor, Tensor] | None:
    """The way down of a call without epilogue on the CPU, with nothing looked up that it does not need.

    Torch's operators and the native library check what is left unchecked here and raise, upon which the caller takes
    the way with messages; so it does for None. Every look-up counts: eager's call itself takes 7 microseconds.
    """
    sizes, columns, n = x.shape, shape[-1], len(shape)
    if sizes[-1] != columns:
        return None
    if n > 1:
        if sizes[-n:] != torch.Size(shape):
            return None
        columns = math.prod(shape)
    dtype, automatic, needs_grad = x.dtype, dispatch.automatic, False
    if not automatic:
        torchs = dispatch.torch_asked
    elif (residual is None and not rms) or traced():
        torchs = True
    else:
        torchs = dispatch.unavailable_reason("cpu") is not None
        if torchs:
            dispatch.tell_missing_library()
    if traced() and not torchs:
        return None
    if not torchs:
        needs_grad = torch.is_grad_enabled() and (
            x.requires_grad
            or (residual is not None and residual.requires_grad)
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
        )
        operation = "rms_norm" if residual is None else "add_rms_norm" if rms else "add_layer_norm"
        torchs = automatic and dispatch.by_shape and torch_on_cpu(operation, dtype, x.numel(), columns, needs_grad)
    if not torchs and (
        not _ops.PLAIN.issuperset((type(x), type(residual), type(weight), type(bias)))
        or torch._C._len_torch_dispatch_stack()
        or is_functorch_wrapped_tensor(x)
        or _autocast_active()
    ):  # not for a call that goes past the dispatcher
        if not automatic:
            return None
        torchs = True
    if torchs:
        return _bare.by_torch(x, residual, shape, weight, bias, eps, rms)
    stream_dtype = dtype if residual is None else residual.dtype
    if type(eps) is not float:
        eps = float(torch.finfo(compute_dtype(dtype, stream_dtype)).eps if eps is None and rms else eps)
    if needs_grad:
        normed, z = _apply(
            *(x, residual, weight, bias, None, None, None, n, eps, 0.0, 0.0, dtype, stream_dtype),
            *(rms, False, residual is not None, "cpu", False),
        )
    else:
        native: Any = dispatch.serving("cpu", "add_layer_norm_fwd")
        normed, z = native.add_norm_bare(x, residual, weight, bias, n, eps, rms)
    return normed, x if residual is None else z


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
        if dnormed is None and dstats is None:
            return _stream_backward(ctx, dresidual_out, stats, x, x_bias, layer_scale, seed)
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
        create_graph = not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or batched(dnormed, dresidual_out)
        )
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


def shortcut_backward(
    dnormed: Tensor | None,
    dresidual_out: Tensor | None,
    saved: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    eps: float,
    dropout_p: float,
    rms: bool,
    wanted: list[bool],
    provider: str,
) -> tuple[Tensor | None, ...]:
    """What the shortcut's node leaves to Python: derivatives of its gradients, tensors that are not plain, no `normed`.

    `wanted`: of x, residual, weight, bias, x_bias.
    """
    if dnormed is None:
        if dresidual_out is None:
            return (None,) * 5
        dx, dresidual, dx_bias, _ = reference.stream_bwd(
            *(dresidual_out.to(stats.dtype), None, x_bias, None, seed, normalized_ndim, dropout_p, 0.0),
            *(saved.dtype, saved.dtype, [*wanted[:2], wanted[4], False]),
        )
        found: tuple[Tensor | None, ...] = (dx, dresidual, None, None, dx_bias)
    else:
        create_graph = torch.is_grad_enabled() or batched(dnormed, dresidual_out)
        if create_graph:
            stats = reference.statistics(saved, normalized_ndim, eps, stats.dtype, rms)
        args: Args = (
            *(dnormed, dresidual_out, saved, stats, weight, bias, None, x_bias, None, seed, normalized_ndim),
            *(dropout_p, 0.0, saved.dtype, saved.dtype, rms, False, False, [*wanted, False]),
        )
        if create_graph:
            found = reference.add_layer_norm_bwd(*args)
        else:
            found = _ops.add_layer_norm_bwd(*args, provider=provider)
    return tuple(g if want else None for g, want in zip(found[:5], wanted, strict=True))


# Function.apply itself, without the search of every argument for torch.func's wrappers: no transform is active here
_apply = super(torch.autograd.Function, AddLayerNormFunction).apply


def _stream_backward(
    ctx: Any,
    dresidual_out: Tensor | None,
    stats: Tensor,
    x: Tensor | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """`normed` was not used: its parameters get no gradient, and nothing of the norm may touch the stream's.

    The saved tensors are arguments, since torch.utils.checkpoint lets a backward ask for them once.
    """
    if dresidual_out is None:
        return (None,) * 18
    normalized_ndim, _, dropout_p, drop_path_p, x_dtype, _, _ = ctx.options
    need = ctx.needs_input_grad[:6]
    gradients = reference.stream_bwd(
        *(dresidual_out.to(stats.dtype), x, x_bias, layer_scale, seed, normalized_ndim, dropout_p, drop_path_p),
        *(x_dtype, ctx.residual_dtype or x_dtype, [*need[:2], *need[4:]]),
    )
    dx, dresidual, dx_bias, dlayer_scale = gradients
    results = zip((dx, dresidual, None, None, dx_bias, dlayer_scale), need, strict=True)
    return (*[g if wanted else None for g, wanted in results], *[None] * 12)


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


# CUDA weight -> {options that the verdict depends on: (identity of the values, verdict)}
_verdicts = WeakIdKeyDictionary()


def _invertible(args: Args) -> bool:
    """Whether z can be rebuilt from `normed` accurately.

    normed = w x̂ + b is kept with one rounding u, so x̂ = (normed - b) / w errs by u |x̂ + b/w|: of the order of the
    rounding itself while |b| <= 2 |w|, and while w is a normal number of normed's dtype, or u is not relative. Every
    gradient that looks at x̂ inherits u, so none of them may be kept in a finer dtype than normed.

    On the CPU every call looks at the weights; on CUDA see `_remembered_verdict`.
    """
    weight, bias, normed_dtype = args[2], args[3], args[11]
    finer = [t for t in args[:6] if t is not None and torch.finfo(t.dtype).eps < torch.finfo(normed_dtype).eps]
    if any(t.requires_grad for t in finer if t is not bias):
        _tell("a gradient is kept in a finer dtype than normed")
        return False
    if weight is None:
        return bias is None
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or weight.is_meta or weight.is_inference():
        return False
    if traced():
        return False
    if not weight.is_cuda:
        return _weights_invert(weight, bias, args[14], normed_dtype)
    return _remembered_verdict(weight, bias, args[14], normed_dtype)


def _remembered_verdict(weight: Tensor, bias: Tensor | None, zero_centered: bool, normed_dtype: torch.dtype) -> bool:
    """`_weights_invert`, once for each version of the parameters, because a look waits for the device.

    An edit through ``.data`` bumps no version and is not seen. While a CUDA graph is captured nothing may wait, and
    another verdict would launch other kernels than the warm-up did: the last one holds at any version. Without one z
    is kept, which is always accurate.
    """
    verdicts = _verdicts.setdefault(weight, {})
    options = (zero_centered, normed_dtype, bias is None)
    known = verdicts.get(options)
    if torch.cuda.is_current_stream_capturing():
        return known is not None and known[1]
    values = tuple((t._version, t.data_ptr()) for t in (weight, bias) if t is not None)
    if known is None or known[0] != values:
        known = verdicts[options] = (values, _weights_invert(weight, bias, zero_centered, normed_dtype))
    return known[1]


def _weights_invert(weight: Tensor, bias: Tensor | None, zero_centered: bool, normed_dtype: torch.dtype) -> bool:
    with torch.no_grad():
        size = (weight.double() + 1.0 if zero_centered else weight.double()).abs()
        good = size >= torch.finfo(normed_dtype).tiny
        if bias is not None:
            good &= bias.double().abs() <= 2.0 * size
        verdict = bool(good.all())
    if not verdict:
        _tell("a weight is too near zero, or too small beside its bias")
    return verdict


def _tell(reason: str) -> None:
    if not torch.compiler.is_compiling() and first_time("memory_efficient"):
        _log.warning("memory_efficient: z is kept, because %s (said once, for the first such call)", reason)
