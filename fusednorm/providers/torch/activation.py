"""Torch's own operators for bias, activation and dropout, differentiated by torch's autograd.

Without a seed, dropout is torch's own: ``F.dropout`` draws its mask, and a dropped NaN stays NaN as it does there. With
a seed the mask is ``dropout_mask``, and what is dropped is taken out before anything is computed of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import dropout
from ..._activations import FUNCTIONS
from ..._dtypes import compute_dtype
from ..._options import ActivationInputs, ActivationOptions, Inputs, Options
from .norm import cast_where_needed


def refusal(op: str, inputs: Inputs, options: Options) -> str | None:
    return None


def bias_act_dropout(inputs: ActivationInputs, options: ActivationOptions) -> Tensor:
    (x, bias, seed), (activation, dropout_p) = inputs, options
    if seed is None and (bias is None or bias.dtype == x.dtype):
        u = x if bias is None else x + bias
    else:
        acc = compute_dtype(x.dtype)
        u = x.to(acc) if bias is None else x.to(acc) + bias.to(acc)
        if seed is not None:
            u = torch.where(dropout.element_mask(x.shape, dropout_p, seed), u, 0.0)
    y = FUNCTIONS[activation](u)
    if dropout_p:
        y = F.dropout(y, dropout_p) if seed is None else y * dropout.keep_scale(dropout_p)
    return cast_where_needed(y, x.dtype)
