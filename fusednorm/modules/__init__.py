"""Drop-in modules."""

from .attention import MultiheadAttention, attention_weights
from .layers import TransformerDecoderLayer, TransformerEncoderLayer
from .norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "attention_weights",
]
