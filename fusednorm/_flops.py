"""What ``torch.utils.flop_counter`` counts for the attention operators; no other op of ours has products.

As torch counts its own attention: pairs that a mask hides are counted, and the backward makes the logits once more.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _ops

_COUNTER = "torch.utils.flop_counter"


def _pairs(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, *longest: int) -> int:
    """Of a query and a key, over batch and heads."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if type(cu_seqlens_q) is not Tensor or cu_seqlens_q.is_meta:  # no values to be read: all are as long as the longest
        return q.shape[1] * (cu_seqlens_q.shape[0] - 1) * longest[0] * longest[1]
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    return q.shape[1] * sum(queries * keys for queries, keys in lengths)


def _attention_fwd(q: Tensor, k: Tensor, v: Tensor, *args: Any, **_: Any) -> int:
    return 2 * _pairs(q, k, *args[3:7]) * (q.shape[-1] + v.shape[-1])


def _attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *args: Any, **_: Any
) -> int:
    """Products of width D: logits, dq, dk; of v's width: dv and the gradient of the probabilities."""
    return 2 * _pairs(q, k, *args[3:7]) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _register(counter: ModuleType) -> None:
    ops = getattr(torch.ops, _ops.LIBRARY.ns)
    counter.flop_registry.update({ops.attention_fwd: _attention_fwd, ops.attention_bwd: _attention_bwd})


class _Waiting:
    """Registers once the counter is imported. It loads Triton, 0.2 s; and what is registered later it does not see."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _Waiting())
