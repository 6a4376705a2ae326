"""Readable PyTorch that defines the semantics of the norms: forward and backward by hand.

Both are what the kernels do, step by step, in elementary differentiable operators: transforms (``torch.func``,
forward-mode AD) and double backward go through them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import dropout
from ..._dtypes import compute_dtype
from ..._options import Inputs, NormGradOptions, NormInputs, NormOptions, NormSaved, Options
from ..samples import across_rows, is_per_sample, samples_and_rows


def unavailable_reason() -> str | None:
    return None


def refusal(op: str, inputs: Inputs, options: Options) -> str | None:
    return None


def _rows_and_columns(x: Tensor, normalized_ndim: int) -> tuple[int, int]:
    """(M, N). Not Size.numel(), which would make symbolic sizes constant."""
    lead = x.ndim - normalized_ndim
    return math.prod(x.shape[:lead]), math.prod(x.shape[lead:])


def _by_row(parameter: Tensor, x: Tensor, normalized_ndim: int) -> Tensor:
    """A parameter that multiplies rows (M, N): (N,), or a vector for each sample as (M, N)."""
    if not is_per_sample(parameter, normalized_ndim):
        return parameter.reshape(-1)
    n = math.prod(parameter.shape[parameter.ndim - normalized_ndim :])
    samples, rows = samples_and_rows(x, normalized_ndim)
    return parameter.reshape(samples, 1, n).expand(samples, rows, n).reshape(samples * rows, n)


def _element_mask(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return dropout.element_mask(x.shape, p, seed)


def _dropped(x: Tensor, x_bias: Tensor | None, seed: Tensor | None, p: float, acc: torch.dtype) -> Tensor:
    """dropout(x + x_bias), in the compute dtype once anything is done to x."""
    if x_bias is not None:
        x = x.to(acc) + x_bias.to(acc)
    if p:
        assert seed is not None
        x = torch.where(_element_mask(x, p, seed), x.to(acc) * dropout.keep_scale(p), 0.0)
    return x


def _residual_out(inputs: NormInputs, options: NormOptions) -> Tensor:
    """z = residual + drop_path(layer_scale * dropout(x + x_bias)), rounded once, to the dtype it is stored in."""
    x, residual, _, _, x_bias, layer_scale, seed = inputs
    acc = compute_dtype(x.dtype, options.residual_dtype)
    z = _dropped(x, x_bias, seed, options.dropout_p, acc)
    if layer_scale is not None:
        z = z.to(acc) * across_rows(layer_scale, x, options.normalized_ndim).to(acc)
    if options.drop_path_p:
        assert seed is not None
        factor = dropout.path_factor(x, options.normalized_ndim, options.drop_path_p, seed, acc)
        z = torch.where(factor > 0, z.to(acc) * factor, 0.0)
    if residual is not None:
        same = z.dtype == residual.dtype == options.residual_dtype
        z = residual + z if same else residual.to(acc) + z.to(acc)
    return z.to(options.residual_dtype)


def _effective_weight(weight: Tensor | None, zero_centered_weight: bool, acc: torch.dtype) -> Tensor | None:
    if weight is None:
        return None
    return weight.to(acc) + 1.0 if zero_centered_weight else weight.to(acc)


def _row_statistics(rows: Tensor, eps: float, rms: bool) -> Tensor:
    """(2, M) mean and rstd, or (1, M) rstd: two passes, the second over centred values.

    The mean scales before it sums: the sum of finite values near the largest float would overflow. It scales by a power
    of two, which rounds nothing.
    """
    n = rows.shape[1]
    if rms:
        return torch.rsqrt((rows * rows).sum(1) / n + eps)[None]
    scale = 0.5 ** (n - 1).bit_length() if n else 1.0
    mean = (rows * scale).sum(1) / (n * scale)
    centred = rows - mean[:, None]
    return torch.stack((mean, torch.rsqrt((centred * centred).sum(1) / n + eps)))


def statistics(z: Tensor, normalized_ndim: int, eps: float, dtype: torch.dtype, rms: bool) -> Tensor:
    """The statistics of z's rows, as a differentiable function of z."""
    return _row_statistics(z.reshape(_rows_and_columns(z, normalized_ndim)).to(dtype), eps, rms)


def _normalized_rows(rows: Tensor, stats: Tensor) -> Tensor:
    centred = rows - stats[0][:, None] if stats.shape[0] == 2 else rows
    return centred * stats[-1][:, None]


def _fresh_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy: outputs of an op alias neither its inputs nor one another."""
    return tensor.clone(memory_format=torch.contiguous_format)  # also what would already be fresh: simple before fast


def add_layer_norm_fwd(inputs: NormInputs, options: NormOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, residual_out, stats); residual_out is empty unless `store_residual`."""
    x, z = inputs.x, _residual_out(inputs, options)
    acc = compute_dtype(x.dtype, options.residual_dtype)
    rows = z.reshape(_rows_and_columns(x, options.normalized_ndim)).to(acc)
    stats = _row_statistics(rows, options.eps, options.rms)
    normed = _normalized_rows(rows, stats)
    weight = _effective_weight(inputs.weight, options.zero_centered_weight, acc)
    if weight is not None:
        normed = normed * _by_row(weight, x, options.normalized_ndim)
    if inputs.bias is not None:
        normed = normed + _by_row(inputs.bias.to(acc), x, options.normalized_ndim)
    normed = normed.to(options.normed_dtype).reshape(x.shape)
    residual_out = _fresh_copy(z) if options.store_residual else x.new_empty(0, dtype=options.residual_dtype)
    return _fresh_copy(normed), residual_out, stats


def saved_xhat(saved: NormSaved, options: NormGradOptions) -> Tensor:
    """The normalized rows (M, N), from z and its statistics or from the output by inverting weight and bias."""
    acc = saved.stats.dtype
    rows = saved.rows.reshape(_rows_and_columns(saved.rows, options.normalized_ndim)).to(acc)
    if not options.saved_is_normed:
        return _normalized_rows(rows, saved.stats)
    if saved.bias is not None:
        rows = rows - _by_row(saved.bias.to(acc), saved.rows, options.normalized_ndim)
    weight = _effective_weight(saved.weight, options.zero_centered_weight, acc)
    return rows if weight is None else rows / _by_row(weight, saved.rows, options.normalized_ndim)


def _row_mean(values: Tensor) -> Tensor:
    return values.sum(1, keepdim=True) / max(values.shape[1], 1)


def add_layer_norm_bwd(
    dnormed: Tensor, dresidual_out: Tensor | None, saved: NormSaved, options: NormGradOptions, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Gradients of (x, residual, weight, bias, x_bias, layer_scale); empty where `output_mask` is False.

    With :math:`\hat x = (z - \mu) r`, :math:`g = w \odot dy` and bars for row means,
    :math:`dz = r\,(g - \bar g - \hat x\,\overline{g \hat x}) + d\mathrm{residual}`; RMSNorm lacks :math:`\bar g`.
    """
    rows, stats = saved.rows, saved.stats
    acc = stats.dtype
    xhat = saved_xhat(saved, options)
    dy = dnormed.reshape(xhat.shape).to(acc)
    effective = _effective_weight(saved.weight, options.zero_centered_weight, acc)
    g = dy if effective is None else dy * _by_row(effective, rows, options.normalized_ndim)
    dz = g - xhat * _row_mean(g * xhat)
    if not options.rms:
        dz = dz - _row_mean(g)
    dz = (dz * stats[-1][:, None]).reshape(rows.shape)
    if dresidual_out is not None:
        dz = dz + dresidual_out.to(acc)
    dx, dresidual, dx_bias, dlayer_scale = residual_out_bwd(dz, saved, options, output_mask)
    dweight = _over_rows(dy * xhat, rows, saved.weight, options) if output_mask[2] else dz
    dbias = _over_rows(dy, rows, saved.bias, options) if output_mask[3] else dz
    gradients = zip((dx, dresidual, dweight, dbias, dx_bias, dlayer_scale), output_mask, strict=True)
    return tuple(g if wanted else rows.new_empty(0) for g, wanted in gradients)  # type: ignore[return-value]


def _over_rows(values: Tensor, x: Tensor, parameter: Tensor | None, options: NormGradOptions) -> Tensor:
    """A parameter's gradient: values of x's size added up over all rows, or over those of each sample."""
    assert parameter is not None
    rows, n = _rows_and_columns(x, options.normalized_ndim)
    sizes: tuple[int, ...] = (rows, n)
    if is_per_sample(parameter, options.normalized_ndim):
        sizes = (*samples_and_rows(x, options.normalized_ndim), n)
    return values.reshape(sizes).sum(-2).reshape(parameter.shape).to(parameter.dtype)


def residual_out_bwd(
    dz: Tensor, saved: NormSaved, options: NormGradOptions, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, residual, x_bias, layer_scale) from z's, which is in the compute dtype; dz where not wanted."""
    x_bias, layer_scale, seed, dropout_p = saved.x_bias, saved.layer_scale, saved.seed, options.dropout_p
    acc = dz.dtype
    dbranch = dz
    if options.drop_path_p:
        assert seed is not None
        factor = dropout.path_factor(dz, options.normalized_ndim, options.drop_path_p, seed, acc)
        dbranch = torch.where(factor > 0, dbranch * factor, 0.0)
    dx = dbranch if layer_scale is None else dbranch * across_rows(layer_scale, dz, options.normalized_ndim).to(acc)
    if dropout_p:
        assert seed is not None
        dx = torch.where(_element_mask(dz, dropout_p, seed), dx * dropout.keep_scale(dropout_p), 0.0)
    dlayer_scale = dz
    if output_mask[5]:
        assert saved.x is not None
        dropped = _dropped(saved.x, x_bias, seed, dropout_p, acc)
        dlayer_scale = _over_rows(dbranch * dropped, dz, layer_scale, options)
    return (
        _fresh_copy(dx.to(options.x_dtype)) if output_mask[0] else dz,
        _fresh_copy(dz.to(options.residual_dtype)) if output_mask[1] else dz,
        _over_rows(dx, dz, x_bias, options) if output_mask[4] else dz,
        dlayer_scale,
    )


def rstd_cotangent(drstd: Tensor, rstd: Tensor, xhat: Tensor) -> Tensor:
    r"""What a gradient of rstd adds to dz, (M, N): :math:`\partial r / \partial z = -r^2 \hat x / N`."""
    return -(drstd * rstd * rstd)[:, None] * xhat / max(xhat.shape[1], 1)
