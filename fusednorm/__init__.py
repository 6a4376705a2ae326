"""Fused kernels for the Transformer's residual path and attention."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from . import _flops as _flops
from . import modules
from .activation import bias_act_dropout
from .attention import scaled_dot_product_attention
from .autograd import recorded as recorded
from .dispatch import available_providers, batch_invariant, use_provider
from .dispatch.explain import explain
from .dropout import dropout_mask
from .modules import AdaptiveLayerNorm, AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .varlen import varlen_attention

if TYPE_CHECKING:
    from .acceleration import Report, accelerate, restore
    from .generation import generate
    from .modules import (
        KVCache,
        MultiheadAttention,
        Transformer,
        TransformerDecoder,
        TransformerDecoderLayer,
        TransformerEncoder,
        TransformerEncoderLayer,
        activation_bytes,
        attention_weights,
    )
    from .tuning import autotune, recording_shapes, tune

__version__ = "0.1.0"

__all__ = [
    "AdaptiveLayerNorm",
    "AddLayerNorm",
    "AddRMSNorm",
    "KVCache",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Report",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "accelerate",
    "activation_bytes",
    "add_layer_norm",
    "add_rms_norm",
    "attention_weights",
    "autotune",
    "available_providers",
    "batch_invariant",
    "bias_act_dropout",
    "dropout_mask",
    "explain",
    "generate",
    "layer_norm",
    "recording_shapes",
    "restore",
    "rms_norm",
    "scaled_dot_product_attention",
    "tune",
    "use_provider",
    "varlen_attention",
]


_LATER = {
    **dict.fromkeys(("Report", "accelerate", "restore"), ".acceleration"),
    "generate": ".generation",
    **dict.fromkeys(("autotune", "recording_shapes", "tune"), ".tuning"),
}


def __getattr__(name: str) -> Any:
    """The Transformer layers, ``accelerate`` and ``tune``, which are imported when they are first asked for."""
    if name in _LATER:
        value = getattr(importlib.import_module(_LATER[name], __name__), name)
    elif name in modules.LAYERS:
        value = getattr(modules, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if os.environ.get("FUSEDNORM_AUTOTUNE") == "1":
    __getattr__("autotune")().__enter__()
