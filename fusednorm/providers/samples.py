"""A norm's parameters that are one vector for each sample, an index along x's dimension 0.

Such a parameter has the shape ``(x.shape[0], *ones, *normalized_shape)``, any number of ones. So it broadcasts to x
where it has as many dimensions. Its gradient is the sum over the rows of each sample.
"""

from __future__ import annotations

import math

from torch import Tensor

from .._options import NormInputs, NormSaved


def is_per_sample(parameter: Tensor | None, normalized_ndim: int) -> bool:
    return parameter is not None and parameter.ndim > normalized_ndim


def has_samples(parameters: NormInputs | NormSaved, normalized_ndim: int) -> bool:
    """Whether weight, bias or layer_scale is one vector for each sample."""
    given = parameters.weight, parameters.bias, parameters.layer_scale
    return any(is_per_sample(parameter, normalized_ndim) for parameter in given)


def samples_and_rows(x: Tensor, normalized_ndim: int) -> tuple[int, int]:
    """(samples, rows of each)."""
    return x.shape[0], math.prod(x.shape[1 : x.ndim - normalized_ndim])


def across_rows(parameter: Tensor, x: Tensor, normalized_ndim: int) -> Tensor:
    """The parameter as it broadcasts to x."""
    if not is_per_sample(parameter, normalized_ndim) or parameter.ndim == x.ndim:
        return parameter
    lead = x.ndim - normalized_ndim
    return parameter.reshape(x.shape[0], *[1] * (lead - 1), *x.shape[lead:])
