"""The operators: schemas, fake kernels, and dispatch to the provider named in the call.

One pair serves ``layer_norm``, ``rms_norm``, ``add_layer_norm`` and ``add_rms_norm``, another ``bias_act_dropout``, a
third attention.
Every op has fixed arity, mutates nothing and returns no alias; an output not asked for has no elements. The provider's
name is an argument because the backward runs outside any ``use_provider`` block, on CUDA in another thread.
A program that may run on another machine has the forward ops' overload ``recorded``, which has gradients of its own
(`autograd/recorded.py`) and whose provider may be None: it then chooses where it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, library

from . import _options, dispatch
from ._dtypes import compute_dtype
from ._op_checks import check
from ._options import (
    ActivationInputs,
    ActivationOptions,
    AttentionInputs,
    AttentionOptions,
    NormGradOptions,
    NormInputs,
    NormOptions,
    NormSaved,
)
from .dispatch.resolve import provider_of_raw_op
from .providers.strides import rows_like

LIBRARY = library.Library("fusednorm", "DEF")

# Attention's q is (B, Hq, Sq, D), k and v (B, Hk, Sk, D) with Hq a multiple of Hk, or, where cu_seqlens are given,
# packed: (total, H, D). attn_mask broadcasts to (B, Hq, Sq, Sk); a window of -1 is unbounded. lse is (B, Hq, Sq) or
# (Hq, total). out, dq, dk, dv lie in memory as q, k, v do, contiguously where these have another last stride than 1
# (out also where v's head dim is another).
_ATTENTION = (
    "Tensor? attn_mask, Tensor? key_mask, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float dropout_p, bool causal, bool lower_right, "
    "int window_left, int window_right, float softcap, "
)

SCHEMAS = {
    "add_layer_norm_fwd": (
        "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? x_bias, Tensor? layer_scale, Tensor? seed, "
        "int normalized_ndim, float eps, float dropout_p, float drop_path_p, ScalarType normed_dtype, "
        "ScalarType residual_dtype, bool rms, bool zero_centered_weight, bool store_residual, str provider) "
        "-> (Tensor normed, Tensor residual_out, Tensor stats)"
    ),
    "add_layer_norm_bwd": (
        "(Tensor dnormed, Tensor? dresidual_out, Tensor saved, Tensor stats, Tensor? weight, Tensor? bias, Tensor? x, "
        "Tensor? x_bias, Tensor? layer_scale, Tensor? seed, int normalized_ndim, float dropout_p, float drop_path_p, "
        "ScalarType x_dtype, ScalarType residual_dtype, bool rms, bool zero_centered_weight, bool saved_is_normed, "
        "bool[] output_mask, str provider) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, "
        "Tensor dx_bias, Tensor dlayer_scale)"
    ),
    "bias_act_dropout_fwd": (
        "(Tensor x, Tensor? bias, Tensor? seed, str activation, float dropout_p, str provider) -> Tensor"
    ),
    "bias_act_dropout_bwd": (
        "(Tensor dy, Tensor x, Tensor? bias, Tensor? seed, str activation, float dropout_p, bool[] output_mask, "
        "str provider) -> (Tensor dx, Tensor dbias)"
    ),
    "attention_fwd": f"(Tensor q, Tensor k, Tensor v, {_ATTENTION}str provider) -> (Tensor out, Tensor lse)",
    "attention_bwd": (
        f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ATTENTION}"
        "bool[] output_mask, str provider) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)"
    ),
}


RECORDED = tuple(_options.FORWARD)


def _run(name: str) -> Callable[..., Any]:
    ready: dict[str | None, Callable[..., Any]] = {}

    def run(*args: Any) -> Any:
        provider, grouped = args[-1], _options.from_flat(name, args[:-1])
        check(name, grouped)
        function = ready.get(provider)
        if function is None:
            function = _function(provider, name, grouped)
            if provider is not None:
                ready[provider] = function
        outputs = function(*grouped)
        if isinstance(outputs, Tensor):
            return outputs
        # a provider may leave out what was not asked for; an op has as many outputs as its schema says
        like = _options.inputs_and_options(grouped)[0][0]
        return tuple([like.new_empty(0) if output is None else output for output in outputs])

    return run


def _function(provider: str | None, name: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The provider's function for an op, which may be the first that the process asks of the provider."""
    if provider is None:
        return dispatch.function(provider_of_raw_op(name, *args), name)
    if provider not in dispatch.registry.PROVIDERS:
        known = ", ".join(map(repr, dispatch.registry.PROVIDERS))
        raise ValueError(f"provider: {name} knows no {provider!r}; expected one of {known}")
    reason = dispatch.unavailable_reason(provider)
    if reason is None and dispatch.serving(provider, name) is None:
        reason = "it has no such operator"
    if reason is not None:
        raise RuntimeError(
            f"provider: {provider!r} cannot run {name} here: {reason}; a program that torch.export made outside of "
            "`use_provider` names no provider, and takes what there is"
        )
    return dispatch.function(provider, name)


for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, _run(_name), "CompositeExplicitAutograd")
for _name in RECORDED:
    LIBRARY.define(f"{_name}.recorded{SCHEMAS[_name].replace('str provider', 'str? provider')}")
    LIBRARY.impl(f"{_name}.recorded", _run(_name), "CompositeExplicitAutograd")


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what an op gives without data. `library.register_fake` reads source files: 0.5 ms of import each."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def fake(*args: Any) -> Any:
            grouped = _options.from_flat(name, args[:-1])
            check(name, grouped)
            return function(*grouped)

        for overload in (name, f"{name}.recorded") if name in RECORDED else (name,):
            LIBRARY.impl(overload, fake, "Meta")
        return function

    return register


@_fake("add_layer_norm_fwd")
def _(inputs: NormInputs, options: NormOptions) -> tuple[Tensor, Tensor, Tensor]:
    x, residual_dtype = inputs.x, options.residual_dtype
    n_rows = math.prod(x.shape[: x.ndim - options.normalized_ndim])  # Size.numel() would make a symbolic count constant
    return (
        x.new_empty(x.shape, dtype=options.normed_dtype),
        x.new_empty(x.shape if options.store_residual else (0,), dtype=residual_dtype),
        x.new_empty((1 if options.rms else 2, n_rows), dtype=compute_dtype(x.dtype, residual_dtype)),
    )


@_fake("add_layer_norm_bwd")
def _(
    dnormed: Tensor, dresidual_out: Tensor | None, saved: NormSaved, options: NormGradOptions, output_mask: list[bool]
) -> tuple[Tensor, ...]:
    rows = saved.rows
    full = [rows.new_empty(rows.shape, dtype=dtype) for dtype in (options.x_dtype, options.residual_dtype)]
    parameters = (saved.weight, saved.bias, saved.x_bias, saved.layer_scale)
    gradients = full + [None if p is None else p.new_empty(p.shape) for p in parameters]
    return tuple(
        gradient if wanted and gradient is not None else rows.new_empty(0)
        for gradient, wanted in zip(gradients, output_mask, strict=True)
    )


@_fake("bias_act_dropout_fwd")
def _(inputs: ActivationInputs, options: ActivationOptions) -> Tensor:
    return inputs.x.new_empty(inputs.x.shape)


@_fake("bias_act_dropout_bwd")
def _(
    dy: Tensor, inputs: ActivationInputs, options: ActivationOptions, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    x, bias, _ = inputs
    dx, dbias = x.new_empty(x.shape if output_mask[0] else (0,)), x.new_empty(0)
    return dx, dbias if bias is None or not output_mask[1] else bias.new_empty(bias.shape)


@_fake("attention_fwd")
def _(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    q, _, v, *_ = inputs
    same = v.shape[-1] == q.shape[-1]
    out = rows_like(q) if same else q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.shape[:-1] if inputs.cu_seqlens_q is None else (q.shape[1], q.shape[0])
    return out, q.new_empty(lse, dtype=compute_dtype(q.dtype))


@_fake("attention_bwd")
def _(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    wanted = zip(inputs[:4], output_mask, strict=True)
    return tuple(rows_like(t) if w and t is not None else inputs.q.new_empty(0) for t, w in wanted)
