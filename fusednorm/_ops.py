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

import torch
from torch import Tensor, library

from . import dispatch
from ._dtypes import compute_dtype
from ._op_checks import CHECKS, check_rows
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


# the argument whose dtype an output of a backward has that was not asked for
_LIKE = {"add_layer_norm_bwd": 2, "bias_act_dropout_bwd": 1, "attention_bwd": 2}
RECORDED = ("add_layer_norm_fwd", "bias_act_dropout_fwd", "attention_fwd")


def _run(name: str) -> Callable[..., Any]:
    like = _LIKE.get(name, 0)
    check = CHECKS[name]
    ready: dict[str | None, Callable[..., Any]] = {}

    def run(*args: Any) -> Any:
        provider, args = args[-1], args[:-1]
        check(*args)
        function = ready.get(provider)
        if function is None:
            function = _function(provider, name, args)
            if provider is not None:
                ready[provider] = function
        outputs = function(*args)
        if isinstance(outputs, Tensor):
            return outputs
        # a provider may leave out what was not asked for; an op has as many outputs as its schema says
        return tuple([args[like].new_empty(0) if output is None else output for output in outputs])

    return run


def _function(provider: str | None, name: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The provider's function for an op, which may be the first that the process asks of the provider."""
    if provider is None:
        return dispatch.function(chosen(name, args), name)
    if provider not in dispatch.PROVIDERS:
        known = ", ".join(map(repr, dispatch.PROVIDERS))
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


def chosen(name: str, args: tuple[Any, ...]) -> str:
    """For a forward op that names no provider: the requested one, or else the first of the table that can run it.

    What was measured to be fastest is not looked at: there torch's own operators are meant, which are no op of ours.
    """
    if dispatch.requested() is not None:
        return dispatch.choose(name, args)[0]
    return next(provider for provider in dispatch.PROVIDERS if dispatch.refusal(provider, name, args) is None)


for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, _run(_name), "CompositeExplicitAutograd")
for _name in RECORDED:
    LIBRARY.define(f"{_name}.recorded{SCHEMAS[_name].replace('str provider', 'str? provider')}")
    LIBRARY.impl(f"{_name}.recorded", _run(_name), "CompositeExplicitAutograd")


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what an op gives without data. `library.register_fake` reads source files: 0.5 ms of import each."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.impl(name, function, "Meta")
        return function

    return register


@_fake("add_layer_norm_fwd")
@_fake("add_layer_norm_fwd.recorded")
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    eps: float,
    dropout_p: float,
    drop_path_p: float,
    normed_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    rms: bool,
    zero_centered_weight: bool,
    store_residual: bool,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_rows("add_layer_norm_fwd", x, normalized_ndim, seed, dropout_p or drop_path_p)
    n_rows = math.prod(x.shape[: x.ndim - normalized_ndim])  # Size.numel() would make a symbolic count constant
    return (
        x.new_empty(x.shape, dtype=normed_dtype),
        x.new_empty(x.shape if store_residual else (0,), dtype=residual_dtype),
        x.new_empty((1 if rms else 2, n_rows), dtype=compute_dtype(x.dtype, residual_dtype)),
    )


@_fake("add_layer_norm_bwd")
def _(
    dnormed: Tensor,
    dresidual_out: Tensor | None,
    saved: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x: Tensor | None,
    x_bias: Tensor | None,
    layer_scale: Tensor | None,
    seed: Tensor | None,
    normalized_ndim: int,
    dropout_p: float,
    drop_path_p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    rms: bool,
    zero_centered_weight: bool,
    saved_is_normed: bool,
    output_mask: list[bool],
    provider: str,
) -> tuple[Tensor, ...]:
    check_rows("add_layer_norm_bwd", saved, normalized_ndim, seed, dropout_p or drop_path_p)
    full = [saved.new_empty(saved.shape, dtype=dtype) for dtype in (x_dtype, residual_dtype)]
    parameters = [None if p is None else p.new_empty(p.shape) for p in (weight, bias, x_bias, layer_scale)]
    return tuple(
        gradient if wanted and gradient is not None else saved.new_empty(0)
        for gradient, wanted in zip(full + parameters, output_mask, strict=True)
    )


@_fake("bias_act_dropout_fwd")
@_fake("bias_act_dropout_fwd.recorded")
def _(x: Tensor, bias: Tensor | None, seed: Tensor | None, activation: str, dropout_p: float, provider: str) -> Tensor:
    return x.new_empty(x.shape)


@_fake("bias_act_dropout_bwd")
def _(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    output_mask: list[bool],
    provider: str,
) -> tuple[Tensor, Tensor]:
    dx, dbias = x.new_empty(x.shape if output_mask[0] else (0,)), x.new_empty(0)
    return dx, dbias if bias is None or not output_mask[1] else bias.new_empty(bias.shape)


@_fake("attention_fwd")
@_fake("attention_fwd.recorded")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    same = v.shape[-1] == q.shape[-1]
    out = rows_like(q) if same else q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.shape[:-1] if cu_seqlens_q is None else (q.shape[1], q.shape[0])
    return out, q.new_empty(lse, dtype=compute_dtype(q.dtype))


@_fake("attention_bwd")
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    wanted = zip((q, k, v, attn_mask), rest[-2], strict=True)
    return tuple(rows_like(t) if w and t is not None else q.new_empty(0) for t, w in wanted)


_MOST_TENSORS = 10  # the tensors of an op come first
# of arguments that nobody watches: no subclass that the dispatcher would have to show the op to
PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), int, float, str, list})


def _call(name: str, args: tuple[Any, ...], provider: str) -> Any:
    """Straight to the provider where nobody watches; through the dispatcher under tracing and dispatch modes."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or args[0].is_meta
        or not PLAIN.issuperset(map(type, args[:_MOST_TENSORS]))
    ):
        return getattr(torch.ops.fusednorm, name)(*args, provider)
    return dispatch.function(provider, name)(*args)


def recorded(name: str, args: tuple[Any, ...]) -> Any:
    """A forward op of a program that may run elsewhere, which names a provider only where one is requested."""
    return getattr(torch.ops.fusednorm, name).recorded(*args, dispatch.requested())


def add_layer_norm_fwd(*args: Any, provider: str) -> tuple[Tensor, Tensor, Tensor]:
    return _call("add_layer_norm_fwd", args, provider)


def add_layer_norm_bwd(*args: Any, provider: str) -> tuple[Tensor, ...]:
    return _call("add_layer_norm_bwd", args, provider)


def bias_act_dropout_fwd(*args: Any, provider: str) -> Tensor:
    return _call("bias_act_dropout_fwd", args, provider)


def bias_act_dropout_bwd(*args: Any, provider: str) -> tuple[Tensor, Tensor]:
    return _call("bias_act_dropout_bwd", args, provider)


def attention_fwd(*args: Any, provider: str) -> tuple[Tensor, Tensor]:
    return _call("attention_fwd", args, provider)


def attention_bwd(*args: Any, provider: str) -> tuple[Tensor, ...]:
    return _call("attention_bwd", args, provider)
