"""What encoder and decoder layers share: the residual stream, the feed-forward block, when neither can be fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks, dropout, norm
from .._activations import GELUS, MODULES, TABLE
from ..activation import bias_act_dropout
from ..autograd.linear import linear
from . import _recompute
from ._arguments import check_activation, check_count, check_eps, check_heads, check_rate
from ._fusible import AtomicStateDict, first_not_fused, record, why_not_fused
from ._masks import Masks
from .attention import LINEARS, MultiheadAttention, Projections, attend
from .cache import KVCache
from .norm import LayerNorm

NORMS = (nn.LayerNorm, LayerNorm)


class Stream(NamedTuple):
    """What travels between layers: residual + dropout(branch + bias), not yet added where the next norm will add it."""

    branch: Tensor
    residual: Tensor | None = None
    bias: Tensor | None = None
    dropout_p: float = 0.0


def add_pending(stream: Stream) -> Tensor:
    """The sum, where no norm follows."""
    branch, residual, bias, dropout_p = stream
    if bias is not None:
        branch = branch + bias
    if dropout_p:
        branch = F.dropout(branch, dropout_p)
    return branch if residual is None else residual + branch


def add_norm(module: nn.LayerNorm, stream: Stream, memory_efficient: bool) -> tuple[Tensor, Tensor]:
    """The pending sum and the norm after it, fused: (normed, sum)."""
    branch, residual, bias, dropout_p = stream
    return norm.add_layer_norm(
        *(branch, residual, module.normalized_shape, module.weight, module.bias, module.eps),
        x_bias=bias,
        dropout_p=dropout_p,
        memory_efficient=memory_efficient,
    )


def activation_name(activation: Any) -> str | None:
    """What ``bias_act_dropout`` calls it, or None if it does not know it."""
    for known in TABLE:
        if activation is known.torch_function:
            return known.name
    if activation is F.relu:  # another function than torch.relu
        return "relu"
    if not isinstance(activation, nn.Module) or why_not_fused("activation", activation, (nn.GELU, *MODULES)):
        return None
    return GELUS.get(activation.approximate) if isinstance(activation, nn.GELU) else MODULES[type(activation)]


def effective_p(module: nn.Dropout) -> float:
    """Of the module's own mode: it may differ from the layer's."""
    return float(module.p) if module.training else 0.0


def swap_submodules(layer: nn.Module) -> None:
    """Attention and norms of a layer that torch's constructor has just made become ours, parameters as they are."""
    for module in layer.children():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = MultiheadAttention
        elif type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm


class FusedLayer(AtomicStateDict):
    """The constructor of both layers, and their blocks, each as the branch that the next ``add_layer_norm`` adds."""

    recompute: tuple[str, ...] = ()
    linear1: nn.Linear
    linear2: nn.Linear
    dropout: nn.Dropout
    activation: Any
    _attentions: tuple[str, ...]
    _norms: tuple[str, ...]
    _dropouts: tuple[str, ...]  # of the branches

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: Iterable[str] = (),
    ) -> None:
        checked = _recompute.check(recompute)
        check_heads(d_model, nhead, ("d_model", "nhead"))
        check_count("dim_feedforward", dim_feedforward)
        check_rate("dropout", dropout)
        activation = check_activation(activation)
        check_eps("layer_norm_eps", layer_norm_eps)
        _checks.check_dtype("dtype", dtype)
        super().__init__(  # torch's layer, the other base of each
            *(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first),
            *(bias, device, dtype),
        )
        self.recompute = checked
        swap_submodules(self)

    def _obstacle(self) -> str:
        """Why the submodules have to be called one by one, or nothing."""
        modules = self._modules  # looked up in every call
        parts: list[tuple[str, Any, tuple[type, ...]]] = []
        for name in self._attentions:
            attention = modules.get(name)
            parts += [(name, attention, (MultiheadAttention,))]
            parts += [(f"{name}.out_proj", getattr(attention, "out_proj", None), LINEARS)]
        parts += [(name, modules.get(name), (nn.Linear,)) for name in ("linear1", "linear2")]
        parts += [(name, modules.get(name), NORMS) for name in self._norms]
        dropouts = ("dropout", *self._dropouts)
        parts += [(name, modules.get(name), (nn.Dropout,)) for name in dropouts]
        reason = first_not_fused(parts)
        for name in () if reason else dropouts:
            if effective_p(modules[name]) >= 1.0:  # type: ignore[arg-type]
                return f"{name} drops everything"
        return reason

    def _attention_branch(
        self,
        name: str,
        inputs: tuple[Tensor, ...],
        masks: Masks,
        residual: Tensor,
        dropout_name: str,
        cache: KVCache | None = None,
    ) -> Stream:
        attention = getattr(self, name)
        projection, sources = attention.out_proj, "self" if len(inputs) == 1 else "cross"
        if "attention" in self.recompute and not attention._kept_weights and cache is None:
            form = attention._form(sources)
            tensors = (*inputs, *attention._projections(), masks.attn_mask, masks.key_mask, attention._seed(inputs[0]))
            n = len(inputs)

            def attended(*given: Any) -> Tensor:
                parameters, (attn_mask, key_mask, seed) = Projections(*given[n:-3]), given[-3:]
                return attend(given[:n], parameters, Masks(attn_mask, key_mask, masks.is_causal), seed, form)[0]

            product = _recompute.linear_of(attended, projection.weight, tensors)
        else:
            product = linear(attention._attend(inputs, masks, sources, cache=cache)[0], projection.weight)
        return Stream(product, residual, projection.bias, effective_p(getattr(self, dropout_name)))

    def _feed_forward_branch(self, x: Tensor, residual: Tensor, dropout_name: str) -> Stream:
        name, p = activation_name(self.activation), effective_p(self.dropout)
        second = self.linear2
        if name is None:
            product = linear(self.dropout(self.activation(self.linear1(x))), second.weight)
        else:
            hidden, bias = linear(x, self.linear1.weight), self.linear1.bias
            if "activation" in self.recompute:
                seed = dropout.default_seed(x.device) if p else None

                def activated(u: Tensor, b: Tensor | None, s: Tensor | None) -> Tensor:
                    return bias_act_dropout(u, b, name, p, seed=s)

                product = _recompute.linear_of(activated, second.weight, (hidden, bias, seed))
            else:
                product = linear(bias_act_dropout(hidden, bias, name, p), second.weight)
        return Stream(product, residual, second.bias, effective_p(getattr(self, dropout_name)))

    def _record(self, reason: str) -> None:
        if reason and self.recompute:
            reason += f"; recompute {self.recompute} has no effect"
        record(self, self._how(), reason)

    def _how(self) -> str:
        how = "residual steps with the norms after them, q, k and v in one product"
        if activation_name(self.activation) is None:
            how += "; the activation is a function of the caller's and runs by itself"
        return how + (f"; recomputed: {', '.join(self.recompute)}" if self.recompute else "")
