"""Autocast: the dtypes that the norms give, and what attention casts to."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_autocast_active = torch._C._is_any_autocast_enabled


def enabled(kind: str) -> bool:
    """On a device of this kind."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def residual_norm_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `normed` in the residual forms: autocast's where it is enabled (float64 is left alone)."""
    if not _autocast_active() or x.dtype == torch.float64 or not enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


@functools.cache
def _ask_torch(kind: str, dtype: torch.dtype, low: torch.dtype, rms: bool) -> torch.dtype:
    probe = torch.zeros(1, 1, device=kind, dtype=dtype)
    with torch.autocast(kind, dtype=low):
        return (torch.rms_norm(probe, (1,)) if rms else torch.layer_norm(probe, (1,))).dtype


def _probe(*key: Any) -> torch.dtype:
    return _ask_torch(*key)


_probe._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo heeds it on no functools.cache


def norm_dtype(x: Tensor, rms: bool) -> torch.dtype:
    """The dtype of the plain norms' output: under autocast, whatever torch's own function gives."""
    if not _autocast_active() or not enabled(x.device.type):
        return x.dtype
    kind = x.device.type
    return _probe(kind, x.dtype, torch.get_autocast_dtype(kind), rms)


def cast_for_autocast(*tensors: Tensor | None) -> list[Any]:
    """As torch's own function: 16-bit and float32 to autocast's dtype. Whatever else is given is left to the checks."""
    query = tensors[0]
    if not _autocast_active() or not isinstance(query, Tensor):
        return list(tensors)
    kind = query.device.type
    if not enabled(kind):
        return list(tensors)
    low, own = torch.get_autocast_dtype(kind), (torch.float32, torch.bfloat16, torch.float16)
    return [t.to(low) if isinstance(t, Tensor) and t.dtype in own else t for t in tensors]
