"""Every module of the package, made as torch's is, with inputs that fit."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import fusednorm

E = 8


def _stack(name: str) -> Any:
    def make(space: Any, **options: Any) -> nn.Module:
        layer = getattr(space, f"{name}Layer")(E, 2, 16, batch_first=True, **options)
        keywords = {"enable_nested_tensor": False} if name == "TransformerEncoder" else {}
        return getattr(space, name)(layer, 2, space.LayerNorm(E, **options), **keywords)

    return make


def _transformer(space: Any, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")
        return space.Transformer(E, 2, 1, 1, 16, batch_first=True, **options)


# space is torch.nn or fusednorm
MAKERS: dict[str, Any] = {
    "LayerNorm": lambda space, **options: space.LayerNorm(E, **options),
    "RMSNorm": lambda space, **options: space.RMSNorm(E, **options),
    "MultiheadAttention": lambda space, **options: space.MultiheadAttention(E, 2, batch_first=True, **options),
    "TransformerEncoderLayer": lambda space, **options: space.TransformerEncoderLayer(E, 2, 16, **options),
    "TransformerDecoderLayer": lambda space, **options: space.TransformerDecoderLayer(E, 2, 16, **options),
    "TransformerEncoder": _stack("TransformerEncoder"),
    "TransformerDecoder": _stack("TransformerDecoder"),
    "Transformer": _transformer,
}
OPTIONS = {"dropout_p": 0.25, "drop_path_p": 0.5, "layer_scale": 0.5, "x_bias": True, "residual_dtype": torch.float32}
OPTIONS |= {"zero_centered_weight": True, "memory_efficient": True}
ADDED = {
    "AddLayerNorm": lambda **options: fusednorm.AddLayerNorm(E, **OPTIONS | options),
    "AddRMSNorm": lambda **options: fusednorm.AddRMSNorm(E, **OPTIONS | options),
    "AdaptiveLayerNorm": lambda **options: fusednorm.AdaptiveLayerNorm(E, **OPTIONS | options),
}


def make(name: str, **options: Any) -> nn.Module:
    module = ADDED[name](**options) if name in ADDED else MAKERS[name](fusednorm, **options)
    return module.eval()


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    """(torch's, ours) with the same parameters, none of them the zeros and ones of a constructor."""
    theirs, ours = MAKERS[name](nn).eval(), make(name)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    return theirs, ours


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    count = {"MultiheadAttention": 3, "Transformer": 2, **dict.fromkeys(ADDED, 2)}.get(name, 1)
    count = 2 if "Decoder" in name else count
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(2, 3, E, generator=generator).to(dtype) for _ in range(count))


def output(module: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    result = module(*inputs(name, dtype))
    return result[0] if isinstance(result, tuple) else result
