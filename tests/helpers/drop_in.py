"""One of torch's modules and ours in the same state, and what both make of the same inputs."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import torch
from torch import nn

import fusednorm

_LAYERS = {nn.TransformerEncoderLayer: "TransformerEncoderLayer", nn.TransformerDecoderLayer: "TransformerDecoderLayer"}


def converted(layer: nn.Module) -> nn.Module:
    """Our layer for one of torch's, by its attributes and its state."""
    first, attention = layer.linear1, layer.self_attn
    sizes = (first.in_features, attention.num_heads, first.out_features, layer.dropout.p, layer.activation)
    form = (layer.norm1.eps, attention.batch_first, layer.norm_first, first.bias is not None)
    ours = getattr(fusednorm, _LAYERS[type(layer)])(*sizes, *form, first.weight.device, first.weight.dtype)
    ours.load_state_dict(layer.state_dict())
    return ours


def twins(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(torch's module, ours), both made from one seed; a layer among the arguments is ours in ours."""
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's encoder says why it makes no nested tensors
        theirs = getattr(nn, name)(*args, **kwargs)
    torch.manual_seed(11)
    ours = getattr(fusednorm, name)(*[converted(a) if type(a) in _LAYERS else a for a in args], **kwargs)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(t, o) for t, o in zip(theirs.parameters(), ours.parameters(), strict=True))
    with torch.no_grad():
        for parameter, other in zip(theirs.parameters(), ours.parameters(), strict=True):
            if parameter.ndim == 1:  # made as zeros and ones, which hide errors
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            other.copy_(parameter)
    return theirs, ours


def tensors(values: Any) -> list[torch.Tensor]:
    """What a gradient is asked of, in a call's arguments."""
    found = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.requires_grad]
    return list({id(t): t for t in found}.values())


def results(module: nn.Module, args: tuple, kwargs: dict | None = None) -> list[torch.Tensor]:
    """Outputs, and the gradients of inputs and parameters for random cotangents."""
    kwargs = kwargs or {}
    with warnings.catch_warnings():
        if type(module).__module__.startswith("torch."):
            warnings.filterwarnings("ignore", "(Support for mismatched|The PyTorch API of nested)")
        outputs = module(*args, **kwargs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    leaves = tensors([*args, *kwargs.values()]) + list(module.parameters())
    gradients = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)]
    return [o.detach() for o in outputs] + zeros


def wide(value: Any) -> Any:
    """In float64, a leaf again."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def largest(pairs: Any) -> float:
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest error, each tensor's beside its own largest entry."""
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        a, b = a.detach(), b.detach()
        if b.numel():
            worst = max(worst, float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1.0)))
            assert not a.isnan().any()
    return worst


def grid(**choices: Any) -> list[dict[str, Any]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
