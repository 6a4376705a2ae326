"""Sharding rules of the operators ``torch.ops.fusednorm.*``, for a program that calls them with DTensors.

The public functions call no operator with a DTensor (`dtensor.py`). Importing this module registers the rules.

An operator's mask is that of the whole tensor, whose rows its kernels do not know. So with dropout all is gathered. So
are columns of a norm, and sequences of attention. The statistics of a norm are for its backward alone: rows of each
process in their own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from .._options import FORWARD, from_flat
from ..providers.samples import is_per_sample

# Placements of the outputs, and those of the tensor arguments by name. An argument that is not named is replicated.
Choice = tuple[list[Placement], dict[str, Placement]]
Acceptable = list[tuple[list[Placement], list[Placement | None]]]


def _norm_parameters(parameters: Any, normalized_ndim: int, dim: int) -> dict[str, Placement]:
    names = [name for name in ("weight", "bias", "layer_scale") if dim == 0]
    return {name: Shard(0) for name in names if is_per_sample(getattr(parameters, name), normalized_ndim)}


def add_layer_norm_fwd(*args: Any) -> Iterable[Choice]:
    inputs, options = from_flat("add_layer_norm_fwd", args[:-1])
    for dim in range(0 if options.dropped else inputs.x.ndim - options.normalized_ndim):
        rows: Placement = Shard(dim)
        outputs = [rows, rows if options.store_residual else Replicate(), Shard(1)]
        yield outputs, {"x": rows, "residual": rows} | _norm_parameters(inputs, options.normalized_ndim, dim)


def add_layer_norm_bwd(*args: Any) -> Iterable[Choice]:
    """The saved rows stay where they are, because their statistics cannot be told apart from another order of rows."""
    _, _, saved, options, output_mask = from_flat("add_layer_norm_bwd", args[:-1])
    placements = set(saved.rows.placements)
    if len(placements) > 1:
        raise NotImplementedError(
            f"saved: add_layer_norm_bwd takes rows that are sharded alike along all dimensions of a mesh, got "
            f"{saved.rows.placements}; call the functions of fusednorm, which take any"
        )
    (rows,) = placements
    lead = saved.rows.ndim - options.normalized_ndim
    if not isinstance(rows, Shard) or rows.dim >= lead or options.dropped:
        return
    parameters = _norm_parameters(saved, options.normalized_ndim, rows.dim)
    gradients = [rows, rows, *(parameters.get(name, Partial()) for name in ("weight", "bias", "x_bias", "layer_scale"))]
    given = [True, True, *(getattr(saved, name) is not None for name in ("weight", "bias", "x_bias", "layer_scale"))]
    outputs = [
        placed if wanted and there else Replicate()
        for placed, wanted, there in zip(gradients, output_mask, given, strict=True)
    ]
    yield (
        outputs,
        {
            **dict.fromkeys(("dnormed", "dresidual_out", "saved", "x"), rows),
            "stats": Shard(1),
            **parameters,
        },
    )


def bias_act_dropout_fwd(*args: Any) -> Iterable[Choice]:
    inputs, options = from_flat("bias_act_dropout_fwd", args[:-1])
    last = inputs.x.ndim - 1
    for dim in range(0 if options.dropped else inputs.x.ndim):
        yield [Shard(dim)], {"x": Shard(dim), "bias": Shard(0) if dim == last else Replicate()}


def bias_act_dropout_bwd(*args: Any) -> Iterable[Choice]:
    _, inputs, options, output_mask = from_flat("bias_act_dropout_bwd", args[:-1])
    last = inputs.x.ndim - 1
    for dim in range(0 if options.dropped else inputs.x.ndim):
        bias: Placement = Shard(0) if dim == last else Replicate()
        dbias = bias if dim == last else Partial()
        outputs = [
            Shard(dim) if output_mask[0] else Replicate(),
            dbias if output_mask[1] and inputs.bias is not None else Replicate(),
        ]
        yield outputs, {"dy": Shard(dim), "x": Shard(dim), "bias": bias}


def _attention(inputs: Any, options: Any) -> Iterable[tuple[Shard, Shard, dict[str, Placement]]]:
    """(q, lse, the other arguments) for each dimension that may be sharded."""
    q, k, packed = inputs.q, inputs.k, inputs.cu_seqlens_q is not None
    if options.dropped:
        return
    for dim in (1,) if packed else (0, 1):
        if dim == 1 and (q.shape[1] % q.mesh.size() or k.shape[1] % q.mesh.size()):
            continue
        masks: dict[str, Placement] = {"key_mask": Shard(0)} if dim == 0 else {}
        if inputs.attn_mask is not None:
            mask_dim = dim - 4 + inputs.attn_mask.ndim
            if mask_dim >= 0 and inputs.attn_mask.shape[mask_dim] == q.shape[dim]:
                masks["attn_mask"] = Shard(mask_dim)
        yield Shard(dim), Shard(0 if packed else dim), dict.fromkeys("qkv", Shard(dim)) | masks


def attention_fwd(*args: Any) -> Iterable[Choice]:
    for out, lse, arguments in _attention(*from_flat("attention_fwd", args[:-1])):
        yield [out, lse], arguments


def attention_bwd(*args: Any) -> Iterable[Choice]:
    _, _, inputs, _, _, options, output_mask = from_flat("attention_bwd", args[:-1])
    for out, lse, arguments in _attention(inputs, options):
        gradients = [out, out, out, arguments.get("attn_mask", Partial())]
        given = [True, True, True, inputs.attn_mask is not None]
        outputs = [
            placed if wanted and there else Replicate()
            for placed, wanted, there in zip(gradients, output_mask, given, strict=True)
        ]
        yield outputs, {"dout": out, "out": out, "dlse": lse, "lse": lse, **arguments}


def _register(choices: Callable[..., Iterable[Choice]]) -> None:
    name = choices.__name__
    packet = getattr(torch.ops.fusednorm, name)
    overloads = [packet.default, packet.recorded] if name in FORWARD else [packet.default]
    names = [argument.name for argument in packet.default._schema.arguments]
    n_outputs = len(packet.default._schema.returns)

    def acceptable(*args: Any) -> Acceptable:
        replicated: Sequence[Choice] = [([Replicate()] * n_outputs, {})]
        return [
            (
                outputs,
                [
                    placed.get(name, Replicate()) if isinstance(arg, DTensorSpec) else None
                    for name, arg in zip(names, args, strict=True)
                ],
            )
            for outputs, placed in [*replicated, *choices(*args)]
        ]

    register_sharding(overloads)(acceptable)
    for overload in overloads:
        # The rules look at all arguments. Torch would take one rule for calls that differ before the first int.
        DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[overload].static_argnum = 0


for _choices in (
    *(add_layer_norm_fwd, add_layer_norm_bwd, bias_act_dropout_fwd, bias_act_dropout_bwd),
    *(attention_fwd, attention_bwd),
):
    _register(_choices)
