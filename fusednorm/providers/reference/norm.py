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


def unavailable_reason() -> str | None:
    return None


def refusal(op: str, *args: object) -> str | None:
    return None


def _rows_and_columns(x: Tensor, normalized_ndim: int) -> tuple[int, int]:
    """(M, N). Not Size.numel(), which would make symbolic sizes constant."""
    lead = x.ndim - normalized_ndim
    return math.prod(x.shape[:lead]), math.prod(x.shape[lead:])


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


def _stream(
    x: Tensor,
    residual: Tensor | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    dropout_p: float,
    drop_path_p: float,
    residual_dtype: torch.dtype,
) -> Tensor:
    """z = residual + drop_path(layer_scale * dropout(x + x_bias)), rounded once, to the dtype it is stored in."""
    acc = compute_dtype(x.dtype, residual_dtype)
    z = _dropped(x, x_bias, seed, dropout_p, acc)
    if layer_scale is not None:
        z = z.to(acc) * layer_scale.to(acc)
    if drop_path_p:
        assert seed is not None
        factor = dropout.path_factor(x, normalized_ndim, drop_path_p, seed, acc)
        z = torch.where(factor > 0, z.to(acc) * factor, 0.0)
    if residual is not None:
        same = z.dtype == residual.dtype == residual_dtype
        z = residual + z if same else residual.to(acc) + z.to(acc)
    return z.to(residual_dtype)


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


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy: outputs of an op alias neither its inputs nor one another."""
    return tensor.clone(memory_format=torch.contiguous_format)  # also what would already be fresh: simple before fast


def add_layer_norm_fwd(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, residual_out, stats); residual_out is empty unless `store_residual`."""
    z = _stream(x, residual, x_bias, layer_scale, seed, normalized_ndim, dropout_p, drop_path_p, residual_dtype)
    acc = compute_dtype(x.dtype, residual_dtype)
    rows = z.reshape(_rows_and_columns(x, normalized_ndim)).to(acc)
    stats = _row_statistics(rows, eps, rms)
    normed = _normalized_rows(rows, stats)
    weight = _effective_weight(weight, zero_centered_weight, acc)
    if weight is not None:
        normed = normed * weight.reshape(-1)
    if bias is not None:
        normed = normed + bias.to(acc).reshape(-1)
    normed = normed.to(normed_dtype).reshape(x.shape)
    residual_out = _own(z) if store_residual else x.new_empty(0, dtype=residual_dtype)
    return _own(normed), residual_out, stats


def saved_xhat(
    saved: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized_ndim: int,
    zero_centered_weight: bool,
    saved_is_normed: bool,
) -> Tensor:
    """The normalized rows (M, N), from z and its statistics or from the output by inverting weight and bias."""
    acc = stats.dtype
    rows = saved.reshape(_rows_and_columns(saved, normalized_ndim)).to(acc)
    if not saved_is_normed:
        return _normalized_rows(rows, stats)
    rows = rows if bias is None else rows - bias.to(acc).reshape(-1)
    weight = _effective_weight(weight, zero_centered_weight, acc)
    return rows if weight is None else rows / weight.reshape(-1)


def _row_mean(values: Tensor) -> Tensor:
    return values.sum(1, keepdim=True) / max(values.shape[1], 1)


def add_layer_norm_bwd(
    dnormed: Tensor,
    dresidual_out: Tensor | None,
    saved: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    dropout_p: float,
    drop_path_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    rms: bool,
    zero_centered_weight: bool,
    saved_is_normed: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Gradients of (x, residual, weight, bias, x_bias, layer_scale); empty where `output_mask` is False.

    With :math:`\hat x = (z - \mu) r`, :math:`g = w \odot dy` and bars for row means,
    :math:`dz = r\,(g - \bar g - \hat x\,\overline{g \hat x}) + d\mathrm{residual}`; RMSNorm lacks :math:`\bar g`.
    """
    acc = stats.dtype
    xhat = saved_xhat(saved, stats, weight, bias, normalized_ndim, zero_centered_weight, saved_is_normed)
    dy = dnormed.reshape(xhat.shape).to(acc)
    effective = _effective_weight(weight, zero_centered_weight, acc)
    g = dy if effective is None else dy * effective.reshape(-1)
    dz = g - xhat * _row_mean(g * xhat)
    if not rms:
        dz = dz - _row_mean(g)
    dz = (dz * stats[-1][:, None]).reshape(saved.shape)
    if dresidual_out is not None:
        dz = dz + dresidual_out.to(acc)
    dx, dresidual, dx_bias, dlayer_scale = stream_bwd(
        dz, x, x_bias, layer_scale, seed, normalized_ndim, dropout_p, drop_path_p, x_dtype, residual_dtype,
        [*output_mask[:2], *output_mask[4:]],
    )  # fmt: skip
    dweight = _over_rows(dy * xhat, dy.shape[0], weight) if output_mask[2] else dz
    dbias = _over_rows(dy, dy.shape[0], bias) if output_mask[3] else dz
    gradients = zip((dx, dresidual, dweight, dbias, dx_bias, dlayer_scale), output_mask, strict=True)
    return tuple(g if wanted else saved.new_empty(0) for g, wanted in gradients)  # type: ignore[return-value]


def _over_rows(values: Tensor, n_rows: int, like: Tensor | None) -> Tensor:
    assert like is not None
    return values.reshape(n_rows, math.prod(like.shape)).sum(0).reshape(like.shape).to(like.dtype)


def stream_bwd(
    dz: Tensor,
    x: Tensor | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    dropout_p: float,
    drop_path_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, residual, x_bias, layer_scale) from z's, which is in the compute dtype; dz where not wanted."""
    acc = dz.dtype
    n_rows = _rows_and_columns(dz, normalized_ndim)[0]
    dbranch = dz
    if drop_path_p:
        assert seed is not None
        factor = dropout.path_factor(dz, normalized_ndim, drop_path_p, seed, acc)
        dbranch = torch.where(factor > 0, dbranch * factor, 0.0)
    dx = dbranch if layer_scale is None else dbranch * layer_scale.to(acc)
    if dropout_p:
        assert seed is not None
        dx = torch.where(_element_mask(dz, dropout_p, seed), dx * dropout.keep_scale(dropout_p), 0.0)
    dlayer_scale = dz
    if output_mask[3]:
        assert x is not None
        dlayer_scale = _over_rows(dbranch * _dropped(x, x_bias, seed, dropout_p, acc), n_rows, layer_scale)
    return (
        _own(dx.to(x_dtype)) if output_mask[0] else dz,
        _own(dz.to(residual_dtype)) if output_mask[1] else dz,
        _over_rows(dx, n_rows, x_bias) if output_mask[2] else dz,
        dlayer_scale,
    )


def rstd_cotangent(drstd: Tensor, rstd: Tensor, xhat: Tensor) -> Tensor:
    r"""What a gradient of rstd adds to dz, (M, N): :math:`\partial r / \partial z = -r^2 \hat x / N`."""
    return -(drstd * rstd * rstd)[:, None] * xhat / max(xhat.shape[1], 1)
