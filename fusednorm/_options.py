"""The arguments of the operators, by name: tensors in one tuple, everything else in another.

The order of the fields is the order of the arguments in the operators' schemas (`_ops.py`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class NormInputs(NamedTuple):
    """weight, bias and layer_scale have the normalized shape, or a vector for each sample (`providers/samples.py`)."""

    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    x_bias: Tensor | None = None
    layer_scale: Tensor | None = None
    seed: Tensor | None = None


class NormOptions(NamedTuple):
    normalized_ndim: int
    eps: float
    dropout_p: float
    drop_path_p: float
    normed_dtype: torch.dtype
    residual_dtype: torch.dtype  # of residual_out
    rms: bool
    zero_centered_weight: bool
    store_residual: bool  # False where residual_out is x itself

    @property
    def dropped(self) -> bool:
        return bool(self.dropout_p or self.drop_path_p)


class NormSaved(NamedTuple):
    """What the backward of a norm reads."""

    rows: Tensor  # z, or normed where `saved_is_normed`
    stats: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    x: Tensor | None = None  # only the gradient of layer_scale reads it
    x_bias: Tensor | None = None
    layer_scale: Tensor | None = None
    seed: Tensor | None = None


class NormGradOptions(NamedTuple):
    normalized_ndim: int
    dropout_p: float
    drop_path_p: float
    x_dtype: torch.dtype
    residual_dtype: torch.dtype  # of the gradient of residual
    rms: bool
    zero_centered_weight: bool
    saved_is_normed: bool

    @property
    def dropped(self) -> bool:
        return bool(self.dropout_p or self.drop_path_p)


class ActivationInputs(NamedTuple):
    x: Tensor
    bias: Tensor | None = None
    seed: Tensor | None = None


class ActivationOptions(NamedTuple):
    activation: str
    dropout_p: float

    @property
    def dropped(self) -> bool:
        return bool(self.dropout_p)


class AttentionInputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None = None
    key_mask: Tensor | None = None
    seed: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


class AttentionOptions(NamedTuple):
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float
    dropout_p: float = 0.0
    causal: bool = False
    lower_right: bool = False
    window_left: int = -1  # -1: unbounded
    window_right: int = -1
    softcap: float = 0.0

    @property
    def dropped(self) -> bool:
        return bool(self.dropout_p)


Inputs = NormInputs | ActivationInputs | AttentionInputs
Options = NormOptions | ActivationOptions | AttentionOptions

# by the name of a forward op
FORWARD: dict[str, tuple[type[Any], type[Any]]] = {
    "add_layer_norm_fwd": (NormInputs, NormOptions),
    "bias_act_dropout_fwd": (ActivationInputs, ActivationOptions),
    "attention_fwd": (AttentionInputs, AttentionOptions),
}


def _pack(inputs: type[Any], options: type[Any], args: tuple[Any, ...]) -> tuple[Any, Any]:
    n = len(inputs._fields)
    return inputs._make(args[:n]), options._make(args[n:])


def from_flat(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a provider's function, from those of an operator without the provider's name."""
    if name in FORWARD:
        return _pack(*FORWARD[name], args)
    if name == "add_layer_norm_bwd":
        return *args[:2], *_pack(NormSaved, NormGradOptions, args[2:-1]), args[-1]
    if name == "bias_act_dropout_bwd":
        return args[0], *_pack(ActivationInputs, ActivationOptions, args[1:-1]), args[-1]
    assert name == "attention_bwd", name
    dout, dlse, q, k, v, out, lse, *rest, output_mask = args
    inputs, options = _pack(AttentionInputs, AttentionOptions, (q, k, v, *rest))
    return dout, dlse, inputs, out, lse, options, output_mask


def inputs_and_options(args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The tensors and the options among the arguments of a provider's function: its only two tuples."""
    inputs, options = [arg for arg in args if isinstance(arg, tuple)]
    return inputs, options


def to_flat(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an operator without the provider's name, from those of a provider's function."""
    if name == "attention_bwd":
        dout, dlse, inputs, out, lse, options, output_mask = args
        return dout, dlse, *inputs[:3], out, lse, *inputs[3:], *options, output_mask
    flat: list[Any] = []
    for arg in args:
        flat.extend(arg) if isinstance(arg, tuple) else flat.append(arg)
    return tuple(flat)
