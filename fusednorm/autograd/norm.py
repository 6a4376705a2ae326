"""The plans of the norm functions, their autograd Function, and its double backward."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .._once import first_time
from .._options import NormGradOptions, NormInputs, NormOptions, NormSaved
from .._transforms import capturing, traced, transform_active
from ..dispatch import eager, settings
from ..dispatch.resolve import Request, resolve
from ..providers.reference import norm as reference
from ..providers.samples import is_per_sample
from ..providers.torch import norm as torch_norm
from . import plans

_log = logging.getLogger("fusednorm")

Plan = Callable[[NormInputs], tuple[Tensor, Tensor]]


def plan(call: str, inputs: NormInputs, options: NormOptions, memory_efficient: bool = False) -> Plan:
    """The callable that maps the inputs of this call, and of all calls of its signature, to (normed, residual_out)."""
    memory_efficient = memory_efficient and not transform_active()  # transforms hide the values of weights
    if memory_efficient and settings.requested() == "torch":
        _warn_once("torch's own operators were asked for")
        memory_efficient = False
    from_normed = memory_efficient and invertible(inputs, options)
    without = ("torch", "its operators keep z for the backward, not normed") if from_normed else None
    op = "add_layer_norm_fwd"
    decision = resolve(Request(call, op, inputs, options, without))
    if decision.elementary:
        run = plans.elementary(reference.add_layer_norm_fwd, options)
    elif decision.provider == "torch":  # in any grad mode: reentrant checkpointing runs a call in both
        if not torch_norm.is_plain(inputs, options):
            return functools.partial(torch_norm.add_layer_norm, options=options)
        shape = inputs.x.shape[inputs.x.ndim - options.normalized_ndim :]
        return functools.partial(torch_norm.plain_add_layer_norm, shape=shape, eps=options.eps, rms=options.rms)
    else:
        run = plans.fused(op, AddLayerNormFunction, inputs, options, decision.provider, from_normed)
    if options.store_residual:
        return lambda inputs: run(inputs)[:2]
    return lambda inputs: (run(inputs)[0], inputs.x)


class AddLayerNormFunction(torch.autograd.Function):
    """One op forward, one op backward. Saved are z (or normed), the statistics, the parameters and the seed.

    Under ``create_graph=True`` the backward is the reference's differentiable one, on statistics recomputed from the
    saved tensor, which is an input or output of this Function: derivatives of any order follow.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        inputs, options, (provider, from_normed) = NormInputs(*args[:7]), NormOptions(*args[7:16]), args[16:]
        normed, residual_out, stats = eager.call("add_layer_norm_fwd", inputs, options, provider=provider)
        save(ctx, inputs, options, (normed, residual_out, stats), provider, from_normed)
        outputs = (normed, residual_out if options.store_residual else None)
        return (*outputs, stats) if from_normed else outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = NormSaved(*ctx.saved_tensors)  # once: torch.utils.checkpoint lets a backward ask for them once
        wanted = list(ctx.needs_input_grad[:6])
        return (*norm_backward(saved, ctx.options, cotangents, wanted, *ctx.rest), *[None] * 12)


def save(
    ctx: Any,
    inputs: NormInputs,
    options: NormOptions,
    outputs: tuple[Tensor, Tensor, Tensor],
    provider: str,
    from_normed: bool,
) -> None:
    """Keep in `ctx` what `norm_backward` takes."""
    x, residual, weight, bias, x_bias, layer_scale, seed = inputs
    normed, residual_out, stats = outputs
    rows = normed if from_normed else residual_out if options.store_residual else x
    branch = x if ctx.needs_input_grad[5] else None  # only the gradient of layer_scale reads x
    ctx.save_for_backward(*NormSaved(rows, stats, weight, bias, branch, x_bias, layer_scale, seed))
    ctx.options = NormGradOptions(
        *(options.normalized_ndim, options.dropout_p, options.drop_path_p, x.dtype),
        *((x if residual is None else residual).dtype, options.rms, options.zero_centered_weight, from_normed),
    )
    ctx.rest = options.eps, options.normed_dtype, provider
    ctx.set_materialize_grads(False)


def norm_backward(
    saved: NormSaved,
    options: NormGradOptions,
    cotangents: Sequence[Tensor | None],
    wanted: list[bool],
    eps: float,
    normed_dtype: torch.dtype,
    provider: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, residual, weight, bias, x_bias, layer_scale), None where not wanted.

    `cotangents` are those of normed, residual_out and, only in a double backward through a rebuilt z, the statistics.
    """
    dnormed, dresidual_out, dstats = (*cotangents, None, None)[:3]
    found: Sequence[Tensor | None]
    if dnormed is None and dstats is None:
        if dresidual_out is None:
            return (None,) * 6
        # normed was not used: its parameters get no gradient, and nothing of the norm may touch z's.
        dz = dresidual_out.to(saved.stats.dtype)
        dx, dresidual, *others = reference.residual_out_bwd(dz, saved, options, wanted)
        found = (dx, dresidual, None, None, *others)
    else:
        if dnormed is None:
            dnormed = torch.zeros(saved.rows.shape, dtype=normed_dtype, device=saved.rows.device)
        if dstats is not None:
            xhat = reference.saved_xhat(saved, options)
            extra = reference.rstd_cotangent(dstats[-1], saved.stats[-1], xhat).reshape(saved.rows.shape)
            dresidual_out = extra if dresidual_out is None else dresidual_out + extra
        # Without anything between x and z both have the same gradient: it is computed, and written, once.
        shared = options.x_dtype == options.residual_dtype and saved.layer_scale is None and not options.dropped
        output_mask = [wanted[0] or (shared and wanted[1]), wanted[1] and not shared, *wanted[2:]]
        if eager.differentiated(dnormed, dresidual_out):
            if not options.saved_is_normed:
                rows, dtype = saved.rows, saved.stats.dtype
                stats = reference.statistics(rows, options.normalized_ndim, eps, dtype, options.rms)
                saved = saved._replace(stats=stats)
            found = reference.add_layer_norm_bwd(dnormed, dresidual_out, saved, options, output_mask)
        else:
            args = dnormed, dresidual_out, saved, options, output_mask
            found = eager.call("add_layer_norm_bwd", *args, provider=provider)
        if shared:
            found = (found[0], found[0], *found[2:])
    return tuple([g if want else None for g, want in zip(found, wanted, strict=True)])


def fastpath_backward(
    dnormed: Tensor | None,
    dresidual_out: Tensor | None,
    rows: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    eps: float,
    dropout_p: float,
    rms: bool,
    zero_centered_weight: bool,
    wanted: list[bool],
    provider: str,
) -> tuple[Tensor | None, ...]:
    """What the fast path's node leaves to Python: derivatives of its gradients, tensors that are not plain, and no
    gradient of `normed`.

    `wanted`: of x, residual, weight, bias, x_bias, layer_scale.
    """
    saved = NormSaved(rows, stats, weight, bias, x, x_bias, layer_scale, seed)
    options = NormGradOptions(normalized_ndim, dropout_p, 0.0, rows.dtype, rows.dtype, rms, zero_centered_weight, False)
    return norm_backward(saved, options, (dnormed, dresidual_out), wanted, eps, rows.dtype, provider)


# CUDA weight -> {options that the verdict depends on: (identity of the values, verdict)}
_verdicts = WeakIdKeyDictionary()


def invertible(inputs: NormInputs, options: NormOptions) -> bool:
    """Whether z can be rebuilt from `normed` accurately.

    normed = w x̂ + b is kept with one rounding u, so x̂ = (normed - b) / w errs by u |x̂ + b/w|: of the order of the
    rounding itself while |b| <= 2 |w|, and while w is a normal number of normed's dtype, or u is not relative. Every
    gradient that looks at x̂ inherits u, so none of them may be kept in a finer dtype than normed.

    On the CPU every call looks at the weights; on CUDA see `_remembered_verdict`.
    """
    weight, bias, normed_dtype = inputs.weight, inputs.bias, options.normed_dtype
    finer = [t for t in inputs[:6] if t is not None and torch.finfo(t.dtype).eps < torch.finfo(normed_dtype).eps]
    if any(t.requires_grad for t in finer if t is not bias):
        _warn_once("a gradient is kept in a finer dtype than normed")
        return False
    if is_per_sample(weight, options.normalized_ndim) or is_per_sample(bias, options.normalized_ndim):
        _warn_once("a scale or a shift is another one in every step, and would be looked at in each")
        return False
    if weight is None:
        return bias is None
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or weight.is_meta or weight.is_inference():
        return False
    if traced():
        return False
    if not weight.is_cuda:
        return weights_invert(weight, bias, options.zero_centered_weight, normed_dtype)
    return _remembered_verdict(weight, bias, options.zero_centered_weight, normed_dtype)


def _remembered_verdict(weight: Tensor, bias: Tensor | None, zero_centered: bool, normed_dtype: torch.dtype) -> bool:
    """`weights_invert`, once for each version of the parameters, because a look waits for the device.

    An edit through ``.data`` bumps no version and is not seen. While a CUDA graph is captured nothing may wait, and
    another verdict would launch other kernels than the warm-up did: the last one holds at any version. Without one z
    is kept, which is always accurate.
    """
    verdicts = _verdicts.setdefault(weight, {})
    options = (zero_centered, normed_dtype, bias is None)
    known = verdicts.get(options)
    if capturing(weight.get_device()):
        return known is not None and known[1]
    values = tuple((t._version, t.data_ptr()) for t in (weight, bias) if t is not None)
    if known is None or known[0] != values:
        known = verdicts[options] = (values, weights_invert(weight, bias, zero_centered, normed_dtype))
    return known[1]


def weights_invert(weight: Tensor, bias: Tensor | None, zero_centered: bool, normed_dtype: torch.dtype) -> bool:
    with torch.no_grad():
        size = (weight.double() + 1.0 if zero_centered else weight.double()).abs()
        good = size >= torch.finfo(normed_dtype).tiny
        if bias is not None:
            good &= bias.double().abs() <= 2.0 * size
        verdict = bool(good.all())
    if not verdict:
        _warn_once("a weight is too near zero, or too small beside its bias")
    return verdict


def _warn_once(reason: str) -> None:
    if not torch.compiler.is_compiling() and first_time("memory_efficient"):
        _log.warning("memory_efficient: z is kept, because %s (said once, for the first such call)", reason)
