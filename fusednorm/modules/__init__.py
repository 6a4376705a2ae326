"""Drop-in modules."""

from .attention import MultiheadAttention, attention_weights
from .layers import TransformerDecoderLayer, TransformerEncoderLayer
from .memory import activation_bytes
from .norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from .transformer import Transformer, TransformerDecoder, TransformerEncoder

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
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
