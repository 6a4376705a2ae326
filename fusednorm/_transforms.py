"""What the autograd Functions must know of tracing, CUDA graphs, ``torch.func`` and forward-mode AD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._options import ActivationInputs, AttentionInputs, NormInputs

_I = TypeVar("_I", NormInputs, ActivationInputs, AttentionInputs)


def transform_active() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def wants_gradients(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd records what is computed of these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def traced() -> bool:
    """Whether torch.jit.trace, or the ONNX exporter over it, writes down what is done. Sizes are tensors then."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def recorded() -> bool:
    """Whether what is done becomes a program that may run on another machine: by torch.export or torch.jit.trace."""
    return torch.compiler.is_exporting() or traced()


def capturing(index: int) -> bool:
    """Whether a CUDA graph is captured on a GPU's current stream; the GPU need not be the current one."""
    with torch.cuda.device(index):
        return torch.cuda.is_current_stream_capturing()


def readable(*tensors: Tensor) -> bool:
    """Whether what tensors hold may be looked at: not where they hold nothing, or what is done is written down."""
    return not (
        torch.compiler.is_compiling()
        or traced()
        or transform_active()
        or torch._C._len_torch_dispatch_stack()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta for tensor in tensors)
    )


def dealias_for_compile(inputs: _I) -> _I:
    """A tensor in two roles becomes two: torch.compile refuses the same one twice as input of a Function."""
    seen: list[Tensor] = []
    result: list[Any] = []
    for tensor in inputs:
        if tensor is not None and any(tensor is other for other in seen):
            tensor = tensor.view_as(tensor)
        if tensor is not None:
            seen.append(tensor)
        result.append(tensor)
    return type(inputs)(*result)
