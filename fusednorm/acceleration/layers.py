"""``torch.nn``'s Transformer classes, whose instances become ours."""

from __future__ import annotations

from torch import nn

from ..modules import (
    LayerNorm,
    MultiheadAttention,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from ..modules._fusible import class_path
from . import swap
from .handover import without_hooks

OURS: dict[type, type] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Transformer: Transformer,
}
_STACKS = {nn.TransformerEncoder: nn.TransformerEncoderLayer, nn.TransformerDecoder: nn.TransformerDecoderLayer}


def why_left(module: nn.Module) -> str | None:
    """Why an instance of torch's classes, or of one derived from them, stays; "" if it becomes ours; None: neither."""
    kind = type(module)
    if kind not in OURS:
        base = next((c for c in kind.__mro__ if c in OURS), None)
        ours = any(c in OURS.values() for c in kind.__mro__)
        return None if base is None or ours else f"{class_path(kind)} is derived from {class_path(base)}"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if kind is nn.MultiheadAttention and (getattr(module, "bias_k", None) is not None or module.add_zero_attn):
        return "torch's lets its is_causal hint replace the mask of the appended keys too"
    wanted = _STACKS.get(kind)
    stacked = () if wanted is None else module.get_submodule("layers").children()
    if wanted is not None and any(type(layer) not in (wanted, OURS[wanted]) for layer in stacked):
        return f"its layers are not all {class_path(wanted)}"
    if kind is nn.Transformer and any(type(part) not in (*OURS, *OURS.values()) for part in module.children()):
        return "its encoder or decoder is a class of its own"
    return ""


def convert(module: nn.Module) -> None:
    """Give a module of torch's, and the norms in it, our class."""
    for part in (module, *module.children()):
        kind = type(part)
        ours = LayerNorm if kind is nn.LayerNorm else OURS.get(kind)
        if ours is not None and (part is module or kind is nn.LayerNorm) and without_hooks(part):
            part.__dict__[swap.WAS] = kind
            part.__class__ = ours
