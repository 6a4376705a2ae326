"""Attention of Hugging Face models: ``attn_implementation="fusednorm"``, or :func:`switch_attention` for one model."""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._attention_checks import MOST_HEAD_DIM
from ..attention import scaled_dot_product_attention
from ..varlen import varlen_attention

try:
    PreTrainedModel: Any = import_module("transformers.modeling_utils").PreTrainedModel
    PreTrainedConfig: Any = import_module("transformers.configuration_utils").PreTrainedConfig
    AttentionInterface: Any = import_module("transformers.modeling_utils").AttentionInterface
    AttentionMaskInterface: Any = import_module("transformers.masking_utils").AttentionMaskInterface
    logger: Any = import_module("transformers.utils.logging").get_logger(__name__)
    _masks: Any = import_module("fusednorm.integrations._transformers_masks")
except (ImportError, AttributeError) as fault:
    raise ImportError(
        'fusednorm.integrations.transformers needs transformers 5.24 or later: pip install "transformers>=5.24"'
    ) from fault

__all__ = ["NAME", "Switch", "attention", "attention_mask", "restore_attention", "switch_attention"]

NAME = "fusednorm"
attention_mask = _masks.attention_mask
_SWITCHED = ("eager", "sdpa")  # what a model has by default; anything else was asked for
_RECORD = "_fusednorm_attention"  # of a module: the configurations that it held before, by name

_REFUSED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "head_mask": "a mask of heads",
    "layer_head_mask": "a mask of heads",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "topk_indices": "sparse attention",
    "attention_bias": "an additive bias beside the mask",
    "score_mod": "a function of the scores",
    "block_mask": "a mask in blocks",
    "block_table": "a paged cache",
    "k_cache": "a paged cache",
    "v_cache": "a paged cache",
    "read_index": "a paged cache",
    "write_index": "a paged cache",
}
# Floating-point tensors that reach every layer with the model's keywords, and which no attention function reads.
_ELSEWHERE = {
    *("inputs_embeds", "hidden_states", "encoder_hidden_states", "position_embeddings", "labels", "num_items_in_batch"),
    *("pixel_values", "pixel_values_videos", "input_features", "input_values", "per_layer_inputs", "per_layer_input"),
}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    r"""Attention as ``transformers`` calls it, computed by :func:`fusednorm.scaled_dot_product_attention`.

    .. math:: O = \mathrm{dropout}(\mathrm{softmax}(c \tanh(\mathrm{scaling}\, Q K^T / c) + B + M))\, V

    B is `position_bias` and M the mask. A query that sees no key has a zero output.

    Args:
        module: its ``is_causal`` holds where `is_causal` is None; in eval mode nothing is dropped.
        query: (B, Hq, Sq, D), key: (B, H, Sk, D), value: (B, H, Sk, Dv); H divides Hq. Over 256 dimensions torch's
            own function computes.
        attention_mask: of three kinds.

            * Of four dimensions: complete, as ``sdpa`` takes it. bool is True: attend; floating point is added.
            * (B, Sk), True or 1: attend. `is_causal` and `sliding_window` hold too. Keys after Sk are left out.
            * None: `is_causal` and `sliding_window` say all.
        scaling: of the logits, a number or a learned tensor; :math:`1 / \sqrt D` if not given.
        dropout: probability that an attention weight is dropped.
        is_causal: the last query sees all keys, each one before it one key less.
        sliding_window: of w, query i sees keys from i - w + 1 to i if causal, else to i + w - 1.
        softcap: c, the bound of the scaled logits; None is no cap.
        position_bias: broadcasts to (B, Hq, Sq, Sk), added to the logits, differentiable.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: boundaries and longest lengths of packed sequences,
            for a batch of one. A mask of four dimensions holds instead of them.

    Returns:
        ((B, Sq, Hq, Dv), None): no weights, whether ``output_attentions`` asks for them or not.

    Raises:
        ValueError: a keyword asks for what is not computed here, or does not fit the others.

    Source: ``sdpa_attention_forward`` and ``flash_attention_forward`` of transformers 5.24.

    Example:
        >>> from fusednorm.integrations.transformers import attention
        >>> q, k, v = torch.randn(3, 2, 4, 6, 8).unbind()
        >>> attention(torch.nn.Module(), q, k[:, :2], v[:, :2], None, is_causal=True, softcap=30.0)[0].shape
        torch.Size([2, 6, 4, 8])
    """
    _check_keywords(kwargs)
    n_queries, n_keys = query.shape[-2], key.shape[-2]
    p = float(dropout) if module.training else 0.0
    cap = 0.0 if softcap is None else float(softcap)
    if isinstance(scaling, Tensor):
        query, scaling = query * scaling.to(query.dtype), 1.0
    scale = None if scaling is None else float(scaling)
    given: Any = attention_mask
    if isinstance(given, _masks.PatternMask):  # what does not fit is said by the checks of a full mask
        given = given.described() if given.shape[-2:] == (n_queries, n_keys) else given.full()
    if isinstance(given, Tensor) and not _masks.is_key_mask(given, query):
        full, pattern = given, _masks.Pattern(None, False, None, "upper_left")
    else:
        full = None
        if isinstance(given, Tensor):
            key, value, given = _masks.of_one_length(key, value, given)
            n_keys = key.shape[-2]
        pattern = given if isinstance(given, _masks.Pattern) else None
        if pattern is None:
            causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and n_queries > 1
            window = None
            if sliding_window is not None and n_keys > sliding_window:
                window = (sliding_window - 1, 0 if causal else sliding_window - 1)
            pattern = _masks.Pattern(given, causal, window, "lower_right")
        if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
            packed = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
            return _packed(query, key, value, pattern, packed, position_bias, p, scale, cap), None
    keys = pattern.key_mask
    if keys is not None and keys.shape[0] != query.shape[0]:
        keys = keys.expand(query.shape[0], -1)
    if full is not None and full.is_floating_point() and full.dtype not in (torch.float32, query.dtype):
        full = full.to(query.dtype)
    if position_bias is not None:
        position_bias = position_bias[..., :n_keys] if position_bias.shape[-1] > n_keys else position_bias
        full = _masks.with_bias(position_bias, full, query)
    if max(query.shape[-1], value.shape[-1]) > MOST_HEAD_DIM:
        pattern = pattern._replace(key_mask=keys)
        return _by_torch(query, key, value, full, pattern, p, scale, cap).transpose(1, 2).contiguous(), None
    aligned = n_queries == n_keys or not (pattern.is_causal or pattern.window)  # then both alignments are one
    out = scaled_dot_product_attention(
        *(query, key, value, full, p, pattern.is_causal, scale, query.shape[1] != key.shape[1]),
        key_mask=keys,
        window=pattern.window,
        softcap=cap,
        causal_align="upper_left" if aligned else pattern.causal_align,
    )
    return out.transpose(1, 2).contiguous(), None


def _check_keywords(kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if given is None or given is False or name in _ELSEWHERE:
            continue
        if name == "output_attentions":
            logger.warning_once(
                "`fusednorm` attention gives no weights for `output_attentions=True`. Set attn_implementation='eager'."
            )
        elif name in _REFUSED or callable(given) or (isinstance(given, Tensor) and given.is_floating_point()):
            what = _REFUSED.get(name, "a keyword unknown here that may change the result")
            raise ValueError(f'{name}: {what}; load the model with attn_implementation="eager"')


def _packed(
    query: Any, key: Any, value: Any, pattern: Any, packed: Any, bias: Any, p: Any, scale: Any, cap: Any
) -> Any:
    """(1, Sq, Hq, Dv) of sequences one after another."""
    if packed[0] is None or packed[1] is None:
        raise ValueError("cu_seq_lens_q: without cu_seq_lens_k, or the other way round; pass both")
    if pattern.key_mask is not None or bias is not None or query.shape[0] != 1:
        other = "position_bias" if bias is not None else "a batch" if query.shape[0] != 1 else "a padding mask"
        raise ValueError(f"cu_seq_lens_q: together with {other}; pass position_ids and no mask, or the mask alone")
    bounds = [b.to(torch.int32) for b in packed[:2]]
    longest = [int(b.diff().max() if n is None else n) for b, n in zip(bounds, packed[2:])]
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    out = varlen_attention(
        *(q, k, v, *bounds, *longest, p, pattern.is_causal, scale),
        window=pattern.window,
        softcap=cap,
        causal_align=pattern.causal_align,
    )
    return out[None].contiguous()


def _by_torch(query: Any, key: Any, value: Any, full: Any, pattern: Any, p: float, scale: Any, cap: float) -> Tensor:
    if cap:
        raise ValueError(f'softcap: over {MOST_HEAD_DIM} dimensions; load the model with attn_implementation="eager"')
    if pattern.key_mask is not None or pattern.is_causal or pattern.window is not None:
        seen = pattern.full(query.shape[-2], key.shape[-2], query.device)
        full = seen if full is None else _masks.with_bias(full, seen, query)
    full = full.to(query.dtype) if full is not None and full.is_floating_point() else full
    return nn.functional.scaled_dot_product_attention(
        query, key, value, full, p, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


class Switch(NamedTuple):
    """An attention module of a model, and whether this package computes it now.

    Example:
        >>> from fusednorm.integrations.transformers import Switch
        >>> Switch("encoder.layer.0.attention.self", False, "its attention is code of its own").fused
        False
    """

    path: str
    fused: bool
    reason: str


def switch_attention(model: nn.Module, dry_run: bool = False) -> list[Switch]:
    """Let this package compute the attention of the Hugging Face models in `model`, and of no others.

    Each configuration that a module of it holds is replaced by a copy, which says so. What shared one shares its copy.

    Args:
        model: a PreTrainedModel, or a module that contains some.
        dry_run: say what would be done, and do nothing.

    Returns:
        A :class:`Switch` for each attention module, in the order of ``model.named_modules()``.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from fusednorm.integrations.transformers import restore_attention, switch_attention
        >>> sizes = dict(hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1)
        >>> model = BertModel(BertConfig(**sizes))
        >>> switch_attention(model)
        [Switch(path='encoder.layer.0.attention.self', fused=True, reason='')]
        >>> restore_attention(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = list(_attention_modules(model))
    reasons: dict[int, str] = {}  # of configurations, by identity: one config, one implementation
    for _, module, owner in found:
        for config in _configs(module, owner):
            against = _against(module, owner, config)
            if not _calls_interface(module) and not _compares_sdpa(module):
                # code of its own that takes sdpa's masks takes ours; eager's are added
                against = against if config._attn_implementation != "sdpa" and _takes_mask(module) else ""
            reasons[id(config)] = reasons.get(id(config)) or against
    said = []
    for path, module, owner in found:
        configs = _configs(module, owner)
        reason = next((r for r in (_against(module, owner, configs[0]), *(reasons[id(c)] for c in configs)) if r), "")
        said.append(Switch(path, not reason, reason))
    switched = {
        id(config): config
        for (_, module, owner), switch in zip(found, said)
        for config in _configs(module, owner)
        if switch.fused and config._attn_implementation != NAME
    }
    if dry_run or not switched:
        return said
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, held in list(vars(module).items()):
            if isinstance(held, PreTrainedConfig):
                vars(module).setdefault(_RECORD, {}).setdefault(name, held)
                setattr(module, name, copy.deepcopy(held, memo))
    for config in switched.values():  # on the internal name: the public one sets it of all in it
        copy.deepcopy(config, memo)._attn_implementation_internal = NAME
    return said


def is_switched(model: nn.Module) -> bool:
    return any(_RECORD in vars(module) for module in model.modules())


def restore_attention(model: nn.Module) -> None:
    """Give the modules of a switched model the very configurations that they had.

    What was written to the copies since is lost.

    Raises:
        ValueError: the model is not switched.

    Example:
        >>> from fusednorm.integrations.transformers import restore_attention
        >>> restore_attention(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: model: its attention is not switched; call switch_attention(model) first
    """
    if not is_switched(model):
        raise ValueError("model: its attention is not switched; call switch_attention(model) first")
    for module in model.modules():
        for name, held in vars(module).pop(_RECORD, {}).items():
            setattr(module, name, held)


def _attention_modules(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(path, module, the PreTrainedModel it is in) of what computes attention, by the interface or code of its own."""
    owners = {"": model} | {name: m for name, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    for path, module in model.named_modules():
        parts = path.split(".")
        within = (".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1))
        owner = next((owners[name] for name in within if name in owners), None)
        if not isinstance(owner, PreTrainedModel) or isinstance(module, PreTrainedModel):
            continue
        if _calls_interface(module) or (
            _has_own_code(module, owner)
            and not any(_calls_interface(m) or _has_own_code(m, owner) for m in module.modules() if m is not module)
        ):
            yield path, module, owner


def _configs(module: Any, owner: Any) -> list[Any]:
    """Those that choose its function and its mask."""
    own = getattr(module, "config", owner.config)
    return [owner.config] if own is owner.config else [own, owner.config]


def _against(module: Any, owner: Any, config: Any) -> str:
    """Why the module's attention is left alone; empty if it is not."""
    kind, model = type(module).__name__, type(owner).__name__
    if not _calls_interface(module):
        return f"{kind} computes attention by code of its own"
    if not (owner._supports_sdpa or owner._supports_attention_backend) or not owner._can_set_attn_implementation():
        return f"{model} does not support other attention functions"
    if getattr(module, "sinks", None) is not None:
        return f"{kind} has attention sinks"
    if config._attn_implementation not in (*_SWITCHED, NAME):
        return f"its attn_implementation is {config._attn_implementation!r}, which was asked for"
    if getattr(config, "output_attentions", False):
        return "config.output_attentions asks for the weights"
    if _compares_sdpa(module):
        return f"{kind} does otherwise where the implementation is not 'sdpa'"
    return ""


def _has_own_code(module: Any, owner: Any) -> bool:
    """Whether it looks like attention: a class of the model's own file, named so, that takes a mask or a softmax."""
    kind = type(module)
    if "Attention" not in kind.__name__ or kind.__module__ != type(owner).__module__:
        return False
    names = {name for code in _codes(kind) for name in code.co_names}
    return _takes_mask(module) or not names.isdisjoint({"softmax", "scaled_dot_product_attention"})


def _takes_mask(module: Any) -> bool:
    return any("mask" in name for name in inspect.signature(inspect.unwrap(type(module).forward)).parameters)


def _calls_interface(module: nn.Module) -> bool:
    return any("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in _codes(type(module)))


def _compares_sdpa(module: nn.Module) -> bool:
    """Whether its code compares something, the implementation's name, with "sdpa"."""
    return any(
        after.opname in ("COMPARE_OP", "CONTAINS_OP")
        and (step.argval == "sdpa" or (isinstance(step.argval, tuple) and "sdpa" in step.argval))
        for code in _codes(type(module))
        for step, after in pairwise(dis.get_instructions(code))
    )


def _codes(kind: type) -> Iterator[CodeType]:
    """Of the methods that a model's own classes define."""
    for base in kind.__mro__:
        if base in PreTrainedModel.__mro__ or base.__module__.startswith(("torch.", "transformers.generation.")):
            continue
        for method in vars(base).values():
            function = inspect.unwrap(method) if callable(method) else None
            if isinstance(function, FunctionType):
                yield function.__code__


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)
