"""Torch's own operators for the norm family: what eager code would call, differentiated by torch's autograd.

Without a seed, dropout is torch's own: ``F.dropout`` draws its mask, and a dropped NaN stays NaN as it does there. With
a seed the mask is ``dropout_mask``, as in every other provider.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dropout
from ..._dtypes import compute_dtype
from ..._options import Inputs, NormInputs, NormOptions, Options
from ..samples import across_rows, has_samples


def unavailable_reason() -> str | None:
    return None


def refusal(op: str, inputs: Inputs, options: Options) -> str | None:
    return None


def add_layer_norm(inputs: NormInputs, options: NormOptions) -> tuple[Tensor, Tensor]:
    """(normed, z); z may be x itself."""
    x, residual, weight, bias, *_ = inputs
    normed_dtype, residual_dtype = options.normed_dtype, options.residual_dtype
    zero_centered_weight = options.zero_centered_weight
    branch = _branch(inputs, options)
    if residual is None:
        z = cast_where_needed(branch, residual_dtype)
    elif branch.dtype == residual.dtype == residual_dtype:
        z = residual + branch
    else:
        acc = compute_dtype(x.dtype, residual_dtype)
        z = (residual.to(acc) + branch.to(acc)).to(residual_dtype)
    shape, source = x.shape[x.ndim - options.normalized_ndim :], z
    if has_samples(inputs, options.normalized_ndim):
        return cast_where_needed(_adaptive(z, shape, inputs, options), normed_dtype), z
    dtypes = {t.dtype for t in (z, weight, bias) if t is not None} | {normed_dtype}
    if zero_centered_weight or len(dtypes) > 1:
        acc = compute_dtype(*dtypes)
        source = z.to(acc)
        if weight is not None:
            weight = weight.to(acc) + 1.0 if zero_centered_weight else weight.to(acc)
        bias = None if bias is None else bias.to(acc)
    if options.rms:
        normed = torch.rms_norm(source, shape, weight, options.eps)
        normed = normed if bias is None else normed + bias
    else:
        normed = torch.layer_norm(source, shape, weight, bias, options.eps)
    return cast_where_needed(normed, normed_dtype), z


def _adaptive(z: Tensor, shape: torch.Size, inputs: NormInputs, options: NormOptions) -> Tensor:
    """normed where weight or bias is one vector for each sample: the norm, then one operator for both."""
    normed = torch.rms_norm(z, shape, None, options.eps) if options.rms else torch.layer_norm(z, shape, eps=options.eps)
    weight, bias = [
        p if p is None else across_rows(p, z, options.normalized_ndim) for p in (inputs.weight, inputs.bias)
    ]
    if weight is None:
        return normed if bias is None else normed + bias
    factor = weight + 1.0 if options.zero_centered_weight else weight
    return normed * factor if bias is None else torch.addcmul(bias, normed, factor)


def cast_where_needed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast that does nothing would be traced, and fix the dtype of the traced program."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def plain_add_layer_norm(inputs: NormInputs, shape: torch.Size, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """(normed, z) of tensors of one dtype with nothing before the addition."""
    x, residual, weight, bias, *_ = inputs
    z = x if residual is None else residual + x
    normed = torch.rms_norm(z, shape, weight, eps) if rms else torch.layer_norm(z, shape, weight, bias, eps)
    return cast_where_needed(normed, x.dtype), z  # under autocast torch gives another dtype


def is_plain(inputs: NormInputs, options: NormOptions) -> bool:
    """Whether `plain_add_layer_norm` computes a call."""
    dtypes = {t.dtype for t in inputs if t is not None} | {options.normed_dtype, options.residual_dtype}
    bare = inputs.x_bias is inputs.layer_scale is inputs.seed is None and not options.dropped
    bare = bare and not options.zero_centered_weight and not has_samples(inputs, options.normalized_ndim)
    return len(dtypes) == 1 and bare and not (options.rms and inputs.bias is not None)  # torch's has no bias


def _branch(inputs: NormInputs, options: NormOptions) -> Tensor:
    """drop_path(layer_scale * dropout(x + x_bias)): in x's dtype as eager code has it, or rounded once under a seed."""
    x, _, _, _, x_bias, layer_scale, seed = inputs
    dropout_p = options.dropout_p
    same = seed is None and all(t is None or t.dtype == x.dtype for t in (x_bias, layer_scale))
    acc = x.dtype if same else compute_dtype(x.dtype, options.residual_dtype)
    z = x
    if x_bias is not None:
        z = z.to(acc) + x_bias.to(acc)
    if dropout_p:
        if seed is None:
            z = F.dropout(z, dropout_p)
        else:
            kept = dropout.element_mask(x.shape, dropout_p, seed)
            z = torch.where(kept, z.to(acc) * dropout.keep_scale(dropout_p), 0.0)
    if layer_scale is not None:
        z = z.to(acc) * across_rows(layer_scale, x, options.normalized_ndim).to(acc)
    if options.drop_path_p:
        factor = dropout.path_factor(x, options.normalized_ndim, options.drop_path_p, seed, acc)
        z = torch.where(factor > 0, z.to(acc) * factor, 0.0)
    return z
