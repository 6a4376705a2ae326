"""How many bytes a layer keeps from its forward to its backward, by the part that keeps them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._dtypes import compute_dtype
from ..autograd import norm as autograd_norm
from ..dispatch import rules
from ._layer import FusedLayer, activation_name, effective_p
from .layers import TransformerDecoderLayer, TransformerEncoderLayer
from .transformer import TransformerDecoder, TransformerEncoder

_SEED = 8


class _Run(NamedTuple):
    """Sizes of one call, and the bytes of an element and of a statistic."""

    batch: int
    length: int
    memory_length: int
    element: int
    statistic: int
    dtype: torch.dtype

    def tensor(self, width: int, memory: bool = False) -> int:
        return self.batch * (self.memory_length if memory else self.length) * width * self.element


def activation_bytes(
    module: nn.Module,
    batch: int,
    length: int,
    memory_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, int]:
    """The bytes that a layer or stack of this package keeps for its backward, by part.

    Counted is what the fused steps save, in the module's present mode, for its dropout rates and its `recompute`, each
    tensor once: not the parameters, nor what the module is given (inputs, memory, masks). "attention" has q, k, v, the
    output and a number for each query and head; "feed_forward" the hidden layer before and after its activation; a norm
    the sum it normalizes, its output where a linear layer takes it, and its statistics. Without dropout torch's own
    operators may serve a call on the CPU and keep less.

    Args:
        module: a TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder or TransformerDecoder that takes
            the fused path; the activation one that :func:`fusednorm.bias_act_dropout` knows.
        batch, length: sizes of the input.
        memory_length: of a decoder's memory; `length` if not given.
        dtype: of the activations; the parameters' if not given.

    Returns:
        Bytes by part; a stack's parts are called ``layers.0.attention`` and so on. Their sum is what is kept.

    Raises:
        TypeError: the module is none of these.
        ValueError: the module does not take the fused path; the message says why.

    Example:
        >>> layer = fusednorm.TransformerEncoderLayer(8, 2, 32, batch_first=True, norm_first=True)
        >>> sum(fusednorm.activation_bytes(layer, batch=2, length=5).values()) > 0
        True
    """
    layers: list[Any]
    if isinstance(module, TransformerEncoder | TransformerDecoder):
        layers = list(module.layers)
        kind = TransformerEncoderLayer if isinstance(module, TransformerEncoder) else TransformerDecoderLayer
        reason = module._obstacle(kind)
    elif isinstance(module, FusedLayer):
        layers, reason = [module], module._obstacle()
    else:
        raise TypeError(
            "module: expected one of this package's TransformerEncoderLayer, TransformerDecoderLayer, "
            f"TransformerEncoder or TransformerDecoder, got {type(module).__module__}.{type(module).__qualname__}"
        )
    if not reason and any(activation_name(layer.activation) is None for layer in layers):
        reason = "the activation is a function whose needs are not known"
    if reason:
        raise ValueError(f"module: does not take the fused path, whose memory is known: {reason}")
    dtype = dtype or next(module.parameters()).dtype
    run = _Run(batch, length, memory_length or length, dtype.itemsize, compute_dtype(dtype).itemsize, dtype)
    if isinstance(module, FusedLayer):
        parts = _layer(module, run, None, False)
        return parts | _open_end(module, run)
    found: dict[str, int] = {}
    previous = None
    for i, layer in enumerate(layers):
        parts = _layer(layer, run, previous, i < len(layers) - 1 or module.norm is not None)
        found |= {f"layers.{i}.{name}": size for name, size in parts.items()}
        previous = layer
    if module.norm is None:
        return found | _open_end(layers[-1], run)
    last = layers[-1]
    p = _branch_rate(last) if last.norm_first else 0.0  # after a post-norm layer there is nothing left to add
    return found | {"norm": _norm(module.norm, run, last, p, last.norm_first, False)}


def _branch_rate(layer: Any) -> float:
    """Of the last branch."""
    return effective_p(getattr(layer, layer._dropouts[-1]))


def _open_end(layer: Any, run: _Run) -> dict[str, int]:
    """A pre-norm layer's last sum, which no norm follows: torch's dropout keeps its mask."""
    if not layer.norm_first or not _branch_rate(layer):
        return {}
    width = layer.linear2.out_features
    on_cpu = layer.linear2.weight.device.type == "cpu"  # where the mask is one of factors
    return {"sum": run.tensor(width) if on_cpu else run.batch * run.length * width}


def _layer(layer: Any, run: _Run, previous: Any, followed: bool) -> dict[str, int]:
    """`previous` is the layer before in a stack; `followed` whether a layer or norm takes the output."""
    parts = {"attention": _attention(layer.self_attn, layer, run, False)}
    if isinstance(layer, TransformerDecoderLayer):
        parts["cross_attention"] = _attention(layer.multihead_attn, layer, run, True)
    seed = _SEED if effective_p(layer.dropout) else 0
    kept = 1 if "activation" in layer.recompute else 2
    parts["feed_forward"] = run.tensor(layer.linear1.out_features) * kept + seed
    rates = [effective_p(getattr(layer, name)) for name in layer._dropouts]
    if layer.norm_first:  # a norm follows the branch before it
        rates = [_branch_rate(previous) if previous is not None else 0.0, *rates[:-1]]
    for i, (name, p) in enumerate(zip(layer._norms, rates, strict=True)):
        feeds = layer.norm_first or followed or i < len(rates) - 1
        adds = not layer.norm_first or i > 0 or previous is not None
        parts[name] = _norm(getattr(layer, name), run, layer, p, adds, feeds)
    return parts


def _norm(norm: nn.LayerNorm, run: _Run, layer: Any, p: float, adds: bool, feeds: bool) -> int:
    weight = norm.weight
    rows, columns = run.batch * run.length, math.prod(norm.normalized_shape)
    plain_on_cpu = not adds and not p and (weight is None or weight.is_cpu)
    # torch's own statistics have the parameters' dtype
    torchs = plain_on_cpu and rules.torch_serves_layer_norm(run.dtype, rows, columns)
    statistic = (run.dtype if weight is None else weight.dtype).itemsize if torchs else run.statistic
    statistics = 2 * rows * statistic
    efficient = adds and "norms" in layer.recompute and _invertible(weight, norm.bias, run.dtype)
    tensors = (adds and not efficient) + (feeds or efficient)
    return tensors * run.tensor(columns) + statistics + (_SEED if p else 0)


def _invertible(weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> bool:
    return bias is None if weight is None else autograd_norm.weights_invert(weight, bias, False, dtype)


def _attention(attention: Any, layer: Any, run: _Run, cross: bool) -> int:
    seed = _SEED if attention.training and attention.dropout else 0
    if "attention" in layer.recompute:
        return seed
    width = attention.embed_dim
    lse = run.batch * attention.num_heads * run.length * run.statistic
    return run.tensor(2 * width) + 2 * run.tensor(width, memory=cross) + lse + seed
