"""Drop-in modules. The norms are imported at once, the Transformer layers when they are first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .adaptive import AdaptiveLayerNorm
from .norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

if TYPE_CHECKING:
    from .attention import MultiheadAttention, attention_weights
    from .cache import KVCache
    from .layers import TransformerDecoderLayer, TransformerEncoderLayer
    from .memory import activation_bytes
    from .transformer import Transformer, TransformerDecoder, TransformerEncoder

# a third of what the package's import would cost
LAYERS = {
    **dict.fromkeys(("MultiheadAttention", "attention_weights"), "attention"),
    **dict.fromkeys(("TransformerDecoderLayer", "TransformerEncoderLayer"), "layers"),
    **dict.fromkeys(("Transformer", "TransformerDecoder", "TransformerEncoder"), "transformer"),
    "KVCache": "cache",
    "activation_bytes": "memory",
}


def __getattr__(name: str) -> Any:
    if name not in LAYERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{LAYERS[name]}", __name__), name)
    globals()[name] = value
    return value


__all__ = [
    "AdaptiveLayerNorm",
    "AddLayerNorm",
    "AddRMSNorm",
    "KVCache",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "activation_bytes",
    "attention_weights",
]
