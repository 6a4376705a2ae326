"""``MultiheadAttention`` for torch's, and the attention weights of a whole model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import _checks, dropout
from .._attention_checks import MOST_HEAD_DIM
from ..attention import scaled_dot_product_attention
from ..autograd.linear import linear
from ._arguments import check_count, check_heads, check_operand, check_rate
from ._attention_weights import append_keys, causal_mask, dense_weights, format_weights
from ._fusible import AtomicStateDict, record, why_not_fused
from ._masks import Masks, Sizes, pad_for_extra_keys, prepare
from .cache import KVCache, Memory, Past, check_no_graph

LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)


class Projections(NamedTuple):
    """The parameters of :class:`torch.nn.MultiheadAttention` before the output projection."""

    in_proj_weight: Tensor | None
    q_proj_weight: Tensor | None
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None


class Form(NamedTuple):
    """What is no tensor."""

    heads: int
    batch_first: bool
    sources: str  # "self": key and value are query; "cross": value is key; "apart"
    add_zero_attn: bool = False
    dropout_p: float = 0.0


def _project(inputs: tuple[Tensor, ...], parameters: Projections, form: Form) -> tuple[Tensor, ...]:
    """q, k, v in the inputs' layout, (.., .., heads, head_dim): slices of one product where they have one source."""
    heads, bias = form.heads, parameters.in_proj_bias
    weight = parameters.in_proj_weight
    query = inputs[0]
    if weight is None:
        weights = (parameters.q_proj_weight, parameters.k_proj_weight, parameters.v_proj_weight)
        biases: tuple[Tensor | None, ...] = (None,) * 3 if bias is None else bias.chunk(3)
        sources = {"self": (query,) * 3, "cross": (query, inputs[-1], inputs[-1]), "apart": inputs}[form.sources]
        products = [linear(x, w, b) for x, w, b in zip(sources, weights, biases, strict=True)]  # type: ignore[arg-type]
        return tuple(p.unflatten(-1, (heads, p.shape[-1] // heads)) for p in products)
    width = weight.shape[1]
    head = (heads, width // heads)
    if form.sources == "self":
        return linear(query, weight, bias).unflatten(-1, (3, *head)).unbind(-3)
    parts = [width, 2 * width] if form.sources == "cross" else [width] * 3
    weights = weight.split(parts)
    biases = (None,) * len(parts) if bias is None else bias.split(parts)
    products = [linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]
    if form.sources == "apart":
        return tuple(p.unflatten(-1, head) for p in products)
    return (products[0].unflatten(-1, head), *products[1].unflatten(-1, (2, *head)).unbind(-3))


def _project_query(query: Tensor, parameters: Projections, form: Form) -> Tensor:
    """q alone, for keys and values that are held."""
    weight, bias = parameters.in_proj_weight, parameters.in_proj_bias
    width = query.shape[-1]
    weight = parameters.q_proj_weight if weight is None else weight[:width]
    return linear(query, weight, None if bias is None else bias[:width]).unflatten(-1, (form.heads, -1))  # type: ignore[arg-type]


def _heads_first(tensor: Tensor, batch_first: bool) -> Tensor:
    """(batch, heads, positions, head_dim), a view."""
    return tensor.transpose(1, 2) if batch_first else tensor.permute(1, 2, 0, 3)


def attend(
    inputs: tuple[Tensor, ...],
    parameters: Projections,
    masks: Masks,
    seed: Tensor | None,
    form: Form,
    need_weights: bool = False,
    past: Past | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(what the output projection takes, in the inputs' layout; the weights (batch, heads, queries, keys) or None).

    With a `past`, the keys and values of the inputs are appended to it, and all of it is attended to.

    One seed gives one dropout mask whether the weights are asked for or not. Without one, a mask that both take is of a
    seed drawn here; else whoever serves the attention draws its own.
    """
    if isinstance(past, Memory) and past.keys is not None and past.values is not None:
        q = _heads_first(_project_query(inputs[0], parameters, form), form.batch_first)
        return _attend_heads(q, past.keys, past.values, masks, seed, form, need_weights)
    q, k, v = _project(inputs, parameters, form)
    extra = (parameters.bias_k is not None) + form.add_zero_attn
    if extra:
        k = append_keys(k, parameters.bias_k, form.add_zero_attn, form.batch_first)
        v = append_keys(v, parameters.bias_v, form.add_zero_attn, form.batch_first)
        masks = pad_for_extra_keys(masks, extra)
    q, k, v = (_heads_first(t, form.batch_first) for t in (q, k, v))
    if past is not None:
        if extra:
            raise ValueError("cache: add_bias_kv and add_zero_attn append keys, which no cache holds; leave them out")
        check_no_graph(k, v)
        k, v = past.append(k, v)
    return _attend_heads(q, k, v, masks, seed, form, need_weights, extra)


def _attend_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Masks,
    seed: Tensor | None,
    form: Form,
    need_weights: bool,
    extra: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """As `attend`, from (batch, heads, positions, head_dim); the last `extra` keys were appended."""
    fused = q.shape[-1] <= MOST_HEAD_DIM and form.dropout_p < 1.0
    weights = None
    if need_weights or not fused:
        if seed is None and 0.0 < form.dropout_p < 1.0:
            seed = dropout.default_seed(q.device)
        weights = dense_weights(q, k, masks, form.dropout_p, seed, extra)
    if fused:
        attn_mask = masks.attn_mask
        is_causal = masks.is_causal
        if is_causal and extra:  # what is appended is no future
            attn_mask, is_causal = causal_mask(q, k, attn_mask, extra), False
        out = scaled_dot_product_attention(
            *(q, k, v, attn_mask, form.dropout_p, is_causal),
            key_mask=masks.key_mask,
            causal_align="lower_right" if masks.lower_right else "upper_left",
            seed=seed,
        )
    else:
        size = q.shape[-1]
        reason = f"head dim {size} is over {MOST_HEAD_DIM}" if size > MOST_HEAD_DIM else "everything is dropped"
        record("MultiheadAttention", "", reason, "the weights of every query and key are stored")
        assert weights is not None
        out = weights.to(v.dtype) @ v
    merged = out.transpose(1, 2) if form.batch_first else out.permute(2, 0, 1, 3)
    return merged.flatten(2), weights if need_weights else None


class MultiheadAttention(AtomicStateDict, nn.MultiheadAttention):
    r""":class:`torch.nn.MultiheadAttention` through :func:`fusednorm.scaled_dot_product_attention`.

    .. math:: \mathrm{head}_i = \mathrm{attention}(Q W_i^Q, K W_i^K, V W_i^V), \qquad
              \mathrm{out} = [\mathrm{head}_1, \dots, \mathrm{head}_h]\, W^O

    Same constructor, forward, state_dict and results. Self-attention takes one product for q, k and v, whose slices
    attention reads as they lie; a padding mask stays (N, S). Attention is fused whether the weights are asked for or
    not. One seed of torch's generator gives one dropout mask in both cases, unless torch's own dropout serves the call
    without weights.

    `is_causal` says that `attn_mask`, which must be given, is the causal mask. As in torch's, it replaces the mask
    where there is no `key_padding_mask` and `need_weights` is False; elsewhere the mask counts and the hint does not.
    That holds in training and in eval mode, where torch's goes by a bool mask whenever it takes its fast path.

    Where torch's has NaN, for a query that may attend to nothing, the output is what the output projection makes of
    zeros, and gradients are zero. Nested tensors go to torch's own module.

    Raises:
        TypeError, ValueError: an argument, input or mask does not fit; the message names it.

    Example:
        >>> attention = fusednorm.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(2, 5, 8)
        >>> out, _ = attention(x, x, x, need_weights=False)
        >>> out.shape
        torch.Size([2, 5, 8])
    """

    _kept_weights: tuple[list[Tensor], ...] = ()  # where each attention_weights() around the call collects

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_heads(embed_dim, num_heads)
        check_rate("dropout", dropout)
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None:
                check_count(name, width)
        _checks.check_dtype("dtype", dtype)
        super().__init__(
            *(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what is only being collected: a copy is in no block."""
        state: dict[str, Any] = super().__getstate__()  # torch leaves out what was compiled for this module
        state.pop("_kept_weights", None)
        return state

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of every query to the keys.

        Args:
            query: (N, L, E) with `batch_first`, else (L, N, E); or (L, E).
            key: (N, S, kdim), (S, N, kdim) or (S, kdim).
            value: (N, S, vdim), (S, N, vdim) or (S, vdim).
            key_padding_mask: (N, S), or (S,) without a batch; True hides, a float is added to the logits.
            need_weights: whether the weights are returned.
            attn_mask: (L, S) or (N * num_heads, L, S); True hides, a float is added to the logits.
            average_attn_weights: whether the weights are the mean over the heads.
            is_causal: a hint that `attn_mask` is causal, see above.

        Returns:
            The output, of query's shape, and the weights, (N, L, S) or (N, num_heads, L, S), or None.
        """
        if getattr(query, "is_nested", False) or getattr(key, "is_nested", False) or getattr(value, "is_nested", False):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        sizes = self._sizes(query, key, value)
        masks = prepare(attn_mask, key_padding_mask, is_causal, query, sizes, need_weights=need_weights)
        sources = "apart" if key is not value else "cross" if query is not key else "self"
        inputs = {"self": (query,), "cross": (query, key), "apart": (query, key, value)}[sources]
        if not sizes.batched:
            inputs = tuple(t.unsqueeze(0 if self.batch_first else 1) for t in inputs)
        merged, weights = self._attend(inputs, masks, sources, need_weights)
        reason = why_not_fused("out_proj", self.out_proj, LINEARS)
        if reason:
            out = self.out_proj(merged)
        else:
            out = linear(merged, self.out_proj.weight, self.out_proj.bias)
        if not sizes.batched:
            out = out.squeeze(0 if self.batch_first else 1)
        return out, None if weights is None else format_weights(weights, average_attn_weights, sizes.batched)

    def _attend(
        self,
        inputs: tuple[Tensor, ...],
        masks: Masks,
        sources: str,
        need_weights: bool = False,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Batched inputs in, what the output projection takes out, and the weights of every head."""
        kept = self._kept_weights
        form = self._form(sources)
        past: Past | None = None
        if cache is not None and sources == "self":
            past = cache.own(self)
        elif cache is not None:
            past = cache.across(self, inputs[1]) or cache.remember(self, inputs[1], masks)
            masks = past.masks
        merged, weights = attend(inputs, self._projections(), masks, None, form, need_weights or bool(kept), past)
        if weights is not None:
            for collected in kept:
                collected.append(weights.detach())
        return merged, weights

    def _projections(self) -> Projections:
        own = self._parameters  # a fifth of the time of the attributes, which are looked up in every call
        return Projections(*(own[name] if name in own else getattr(self, name) for name in Projections._fields))

    def _form(self, sources: str) -> Form:
        p = float(self.dropout) if self.training else 0.0
        return Form(self.num_heads, self.batch_first, sources, self.add_zero_attn, p)

    def _seed(self, query: Tensor) -> Tensor | None:
        return dropout.default_seed(query.device) if self.training and 0.0 < self.dropout < 1.0 else None

    def _sizes(self, query: Any, key: Any, value: Any, names: tuple[str, ...] = ("query", "key", "value")) -> Sizes:
        """Batch, heads and lengths, checked; `names` are the caller's for the three."""
        widths = (self.embed_dim, self.kdim, self.vdim)
        weight = self._parameters.get("in_proj_weight")  # None where it is parametrised
        if weight is None:
            weight = self._parameters.get("q_proj_weight")
        dtype, device = (None, None) if weight is None else (weight.dtype, weight.device)
        for name, tensor, width in zip(names, (query, key, value), widths, strict=True):
            _checks.check_tensor(name, tensor)
            if tensor.ndim not in (2, 3):
                form = "(N, L, E)" if self.batch_first else "(L, N, E)"
                raise ValueError(f"{name}: expected {form}, or (L, E) without a batch, got shape {tuple(tensor.shape)}")
            if tensor.ndim != query.ndim:
                raise ValueError(
                    f"{name}: has {tensor.ndim} dimensions, {names[0]} {query.ndim}; give both a batch or none"
                )
            if tensor.shape[-1] != width:
                raise ValueError(f"{name}: expected {width} features (its last size), got {tuple(tensor.shape)}")
            if weight is not None and (tensor.dtype != dtype or tensor.device != device):
                check_operand(name, tensor, weight)
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{names[2]}: shape {tuple(value.shape)} does not fit {names[1]}'s {tuple(key.shape)}; "
                "pass one value for each key"
            )
        if query.ndim == 2:
            return Sizes(1, self.num_heads, query.shape[0], key.shape[0], False)
        batch, length = (0, 1) if self.batch_first else (1, 0)
        if query.shape[batch] != key.shape[batch]:
            raise ValueError(
                f"{names[1]}: a batch of {key.shape[batch]}, {names[0]}'s is {query.shape[batch]}; batch_first is "
                f"{self.batch_first}"
            )
        return Sizes(query.shape[batch], self.num_heads, query.shape[length], key.shape[length])


@contextlib.contextmanager
def attention_weights(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the attention weights of every :class:`MultiheadAttention` in a model, as a context manager.

    The layers around them ask for no weights, so torch's hooks have none to show. In nested blocks each collects; a
    copy made inside does not.

    Yields:
        For the name of each such module, a list with the weights (N, heads, L, S) of each of its calls, detached; with
        dropout they are those that were used.

    Raises:
        ValueError: the model has no such module.

    Example:
        >>> attention = fusednorm.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(2, 5, 8)
        >>> with fusednorm.attention_weights(attention) as kept:
        ...     _ = attention(x, x, x, need_weights=False)
        >>> len(kept)
        1
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, MultiheadAttention)}
    if not found:
        raise ValueError(
            f"model: no fusednorm.MultiheadAttention in {type(model).__name__}, so there are no weights to collect"
        )
    kept: dict[str, list[Tensor]] = {name: [] for name in found}
    for name, module in found.items():
        module._kept_weights = (*module._kept_weights, kept[name])
    try:
        yield kept
    finally:
        for name, module in found.items():
            module._kept_weights = tuple(other for other in module._kept_weights if other is not kept[name])
            if not module._kept_weights and not torch.compiler.is_compiling():  # a graph deletes what it never set
                del module._kept_weights
