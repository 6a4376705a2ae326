"""Fused kernels for the Transformer's residual path."""

from ._explain import explain
from .activation import bias_act_dropout
from .attention import scaled_dot_product_attention, varlen_attention
from .dropout import dropout_mask
from .modules import (
    AddLayerNorm,
    AddRMSNorm,
    LayerNorm,
    MultiheadAttention,
    RMSNorm,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    activation_bytes,
    attention_weights,
)
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .providers import available_providers, batch_invariant, use_provider

__version__ = "0.1.0"

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
    "add_layer_norm",
    "add_rms_norm",
    "attention_weights",
    "available_providers",
    "batch_invariant",
    "bias_act_dropout",
    "dropout_mask",
    "explain",
    "layer_norm",
    "rms_norm",
    "scaled_dot_product_attention",
    "use_provider",
    "varlen_attention",
]
