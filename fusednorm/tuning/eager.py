"""The calls of each class as a user of torch alone writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._activations import FUNCTIONS
from .calls import ACTIVATION_NAMES, EPILOGUES, FAMILIES, Call, CallClass, P, attention_mask


def eager(of: CallClass, call: Call, device: torch.device) -> Call:
    """A call of a class by torch's functions, on the same tensors. Dropout draws from torch's own generator."""
    make = _attention if of.is_attention else _activation if of.operation in FAMILIES["activation"] else _norm
    return dataclasses.replace(call, function=make(of, device))


def _norm(of: CallClass, device: torch.device) -> Callable[..., Any]:
    norm: Callable[..., Tensor] = F.rms_norm if "rms" in of.operation else F.layer_norm
    size = of.shape[1:]

    def plain(x: Tensor, *parameters: Tensor) -> Tensor:
        return norm(x, size, *parameters, eps=1e-5)

    def add(x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm(total, size, *parameters, eps=1e-5), total

    def epilogue(x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        *own, x_bias = parameters
        return add(F.dropout(x + x_bias, P), residual, *own)

    return epilogue if of.operation in EPILOGUES else add if of.operation.startswith("add_") else plain


def _activation(of: CallClass, device: torch.device) -> Callable[..., Any]:
    function = FUNCTIONS[ACTIVATION_NAMES.get(of.operation, "gelu")]

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return function(x + bias)

    def dropped(x: Tensor, bias: Tensor) -> Tensor:
        return F.dropout(function(x + bias), P)

    return dropped if of.draws_mask else plain


def _attention(of: CallClass, device: torch.device) -> Callable[..., Any]:
    mask, causal = attention_mask(of, device), of.operation == "attention_causal"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)

    return attend
