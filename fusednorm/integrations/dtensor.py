"""DTensor: a public function runs on the part of each tensor that this process holds.

Rows of a norm, elements of an activation, batches and heads of attention do not depend on one another. So they stay
where they are, and every provider and the fast path serve them as plain tensors. Only a gradient that is a sum over
rows is reduced, once, in the backward.

Dropout: each shard has a mask of its own, made by the seed of its place in the mesh. Processes that hold the same
elements have the same mask. `seed_of_shard` says how.

Imported by the first call that is given a DTensor, so that `import fusednorm` does not import `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .. import _checks, dropout
from . import dtensor_rules as dtensor_rules  # registers them

Placements = tuple[Placement, ...]

ROWS = ("input", "x", "residual")
SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: no user's small numbers meet
_agreed: set[str] = set()  # groups whose processes have drawn the same seed


def norm(call: str, tensors: Mapping[str, Any], normalized_shape: int | Sequence[int], **options: Any) -> Any:
    """One of the norm functions. `tensors` are its tensor arguments by name, x first; `options` are the others."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    mesh = _mesh(call, given)
    (name, x), *_ = given.items()
    shape = _checks.check_normalized_shape(name, x, normalized_shape)
    _checks.check_residual(given.get("residual"), x)
    lead = x.ndim - len(shape)
    rows = [tensor for name, tensor in given.items() if name in ROWS]
    placements = tuple(_kept(mesh_dim, reversed(rows), range(lead)) for mesh_dim in range(mesh.ndim))
    for name, tensor in given.items():
        if name in ROWS:
            given[name] = local(tensor, placements, placements)
        else:
            samples = tensor.ndim > len(shape) and tensor.shape[0] == x.shape[0]
            given[name] = _local_along(tensor, placements, (lambda d: 0 if d == 0 else None) if samples else _nowhere)
    if "dropout_p" in options:
        options["seed"] = _seed_of_norm(call, placements, mesh, x.device, **options)
    outputs = _public(call)(**{**tensors, **given}, normalized_shape=shape, **options)
    if isinstance(outputs, Tensor):
        return whole(outputs, mesh, placements, x.shape)
    return tuple([whole(output, mesh, placements, x.shape) for output in outputs])


def bias_act_dropout(x: Any, bias: Any, activation: str, dropout_p: float, seed: int | Tensor | None) -> Tensor:
    mesh = _mesh("bias_act_dropout", {"x": x, "bias": bias})
    _checks.check_last_dimension("bias", bias, "x", x)
    placements = tuple(_kept(mesh_dim, [x], range(x.ndim)) for mesh_dim in range(mesh.ndim))
    if bias is not None:
        bias = _local_along(bias, placements, lambda d: 0 if d == x.ndim - 1 else None)
    if _checks.check_probability("dropout_p", dropout_p):
        seed = seed_of_shard(seed, mesh, _sharded(placements), x.device)
    out = _public("bias_act_dropout")(local(x, placements, placements), bias, activation, dropout_p, seed=seed)
    return whole(out, mesh, placements, x.shape)


def attention(
    call: str, tensors: Mapping[str, Any], dropout_p: float, seed: int | Tensor | None, **options: Any
) -> Any:
    """``scaled_dot_product_attention``. `tensors` are its tensor arguments by name, query first."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    mesh, query = _mesh(call, given), given["query"]
    for name in ("query", "key", "value"):
        _refuse_sequence(call, name, given[name])
    grouped = bool(options["enable_gqa"])
    lead = query.ndim - 2
    batch = lead - 1 if lead > 1 or grouped else lead  # dimensions before the heads
    placements = tuple(_kept(mesh_dim, [query], range(lead)) for mesh_dim in range(mesh.ndim))
    for name, tensor in given.items():
        if name == "query":
            given[name] = local(tensor, placements, placements)
        elif name == "key_mask":
            given[name] = _local_along(tensor, placements, lambda d: d if d < batch else None)
        else:
            along = _along_query(call, name, tensor, query, mesh, placements, grouped and name != "attn_mask")
            given[name] = _local_along(tensor, placements, along)
    if _checks.check_probability("dropout_p", dropout_p):
        seed = seed_of_shard(seed, mesh, _sharded(placements), query.device)
    outputs = _public(call)(**given, dropout_p=dropout_p, seed=seed, **options)
    out, lse = outputs if options["return_lse"] else (outputs, None)
    sizes = query.shape[:-1]
    out = whole(out, mesh, placements, (*sizes, out.shape[-1]))
    return out if lse is None else (out, whole(lse, mesh, placements, sizes))


def _public(call: str) -> Callable[..., Any]:
    import fusednorm

    return getattr(fusednorm, call)


def _mesh(call: str, tensors: Mapping[str, Any]) -> DeviceMesh:
    """The mesh that all tensors of a call are on.

    Raises:
        TypeError: one of them is a plain tensor, which may be a part or the whole.
        ValueError: they are on several meshes.
    """
    first, *_ = tensors
    mesh: DeviceMesh = tensors[first].device_mesh
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, DTensor):
            raise TypeError(
                f"{name}: {call} got a {type(tensor).__name__} beside {first}, a DTensor; pass "
                f"DTensor.from_local({name}, mesh, placements), or distribute_tensor({name}, mesh, placements)"
            )
        if tensor is not None and tensor.device_mesh != mesh:
            raise ValueError(f"{name}: is on {tensor.device_mesh}, {first} on {mesh}; redistribute one of them")
    return mesh


def _kept(mesh_dim: int, tensors: Iterable[Any], dims: range) -> Placement:
    """How tensors of one shape are placed along a dimension of the mesh: as the first that is sharded along `dims`."""
    for tensor in tensors:
        placement = tensor.placements[mesh_dim]
        if isinstance(placement, Shard) and placement.dim in dims:
            return placement
    return Replicate()


def _nowhere(dim: int) -> None:
    return None


def _sharded(placements: Placements) -> list[int]:
    return [mesh_dim for mesh_dim, placement in enumerate(placements) if isinstance(placement, Shard)]


def _local_along(tensor: Any, placements: Placements, along: Callable[[int], int | None]) -> Tensor:
    """The local part of an argument that goes along x. `along` names its dimension that is x's, None where it has none.

    Where x is sharded and the argument is not, its gradient is a part of a sum.
    """
    placed: list[Placement] = []
    gradient: list[Placement] = []
    for placement in placements:
        dim = along(placement.dim) if isinstance(placement, Shard) else None
        placed.append(Replicate() if dim is None else Shard(dim))
        gradient.append(Partial() if dim is None and isinstance(placement, Shard) else placed[-1])
    return local(tensor, tuple(placed), tuple(gradient))


def local(tensor: Any, placements: Placements, gradient: Placements) -> Tensor:
    """The part of a DTensor that this process holds, placed so. Its gradient is of the placements `gradient`.

    ``redistribute`` is called even where it moves nothing: its backward reduces the gradient, once. Otherwise a
    parameter's gradient would stay unreduced, and each operator of an optimizer would reduce it anew.
    """
    part = tensor.redistribute(placements=placements).to_local(grad_placements=gradient)
    return _Waited.apply(part) if isinstance(part, AsyncCollectiveTensor) else part


class _Waited(torch.autograd.Function):
    """The plain tensor that a collective gives. The tensor's own ``wait`` leaves autograd's graph."""

    @staticmethod
    def forward(ctx: Any, part: AsyncCollectiveTensor) -> Tensor:
        return part.wait().detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def whole(part: Tensor, mesh: DeviceMesh, placements: Placements, sizes: Sequence[int]) -> DTensor:
    """The DTensor of `sizes` whose parts lie in memory as this one does; shards may differ in size."""
    strides, step = [0] * part.ndim, 1
    for dim in sorted(range(part.ndim), key=lambda dim: (part.stride(dim), -dim)):
        strides[dim] = step
        step *= max(sizes[dim], 1)
    shape = torch.Size(sizes)
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=tuple(strides))


def seed_of_shard(
    seed: int | Tensor | None, mesh: DeviceMesh, mesh_dims: Sequence[int], device: torch.device
) -> Tensor:
    """The seed by which this process makes its mask.

    It is ``seed + place * SEED_STEP`` modulo 2**64. The place is the index of the process along `mesh_dims`, row-major.
    Without a seed each process draws one from torch's generator.

    Raises:
        RuntimeError: processes that must have one mask drew different seeds. This is checked once for each group.
    """
    if isinstance(seed, DTensor):
        seed = seed.full_tensor()
    drawn = dropout.seed_tensor(seed, device)
    if seed is None and not torch.compiler.is_compiling():
        _check_agreement(drawn, mesh, [dim for dim in range(mesh.ndim) if dim not in mesh_dims])
    coordinate, place = mesh.get_coordinate(), 0
    for dim in mesh_dims:
        assert coordinate is not None
        place = place * mesh.size(dim) + coordinate[dim]
    step = (place * SEED_STEP + 2**63) % 2**64 - 2**63
    return drawn + step if place else drawn


def _check_agreement(seed: Tensor, mesh: DeviceMesh, mesh_dims: Sequence[int]) -> None:
    for dim in mesh_dims:
        group = mesh.get_group(dim)
        if mesh.size(dim) == 1 or group.group_name in _agreed:
            continue
        seeds = [torch.empty_like(seed) for _ in range(mesh.size(dim))]
        dist.all_gather(seeds, seed, group)
        if any(other != seeds[0] for other in seeds):
            raise RuntimeError(
                f"seed: processes that hold the same elements drew different ones along dimension {dim} of {mesh}; "
                "call torch.manual_seed with one number in all of them, or pass `seed`"
            )
        _agreed.add(group.group_name)


def _seed_of_norm(
    call: str,
    placements: Placements,
    mesh: DeviceMesh,
    device: torch.device,
    dropout_p: float,
    drop_path_p: float,
    seed: int | Tensor | None,
    **_: Any,
) -> int | Tensor | None:
    """Drop path decides over a sample, so processes that hold parts of one sample need one seed."""
    mesh_dims = _sharded(placements)
    dropout_p, drop_path_p = _checks.check_epilogue(dropout_p, drop_path_p, None)
    if drop_path_p:
        of_samples = [dim for dim in mesh_dims if placements[dim] == Shard(0)]
        if dropout_p and of_samples != mesh_dims:
            raise ValueError(
                f"drop_path_p: {call} takes none beside dropout_p where x is sharded within a sample, {placements}: "
                "one seed gives both masks; pass one of them as 0.0, or shard x along dimension 0"
            )
        mesh_dims = of_samples
    return seed_of_shard(seed, mesh, mesh_dims, device) if dropout_p or drop_path_p else seed


def _refuse_sequence(call: str, name: str, operand: DTensor) -> None:
    for placement in operand.placements:
        if isinstance(placement, Shard) and placement.dim >= operand.ndim - 2:
            which = ("sequence", "head dimension")[placement.dim - operand.ndim + 2]
            raise ValueError(
                f"{name}: {call} takes no operand that is sharded along its {which}, {operand.placements}; "
                "redistribute it to the batch or the heads, or use torch's context_parallel with its own attention"
            )


def _along_query(
    call: str, name: str, operand: Any, query: Any, mesh: DeviceMesh, placements: Placements, grouped: bool
) -> Callable[[int], int | None]:
    """Which dimension of key, value or attn_mask goes along one of query's."""

    def along(query_dim: int) -> int | None:
        dim = query_dim - query.ndim + operand.ndim
        if dim < 0 or operand.shape[dim] == 1 != query.shape[query_dim]:
            return None
        parts = 1
        for mesh_dim in _sharded(placements):
            parts *= mesh.size(mesh_dim) if placements[mesh_dim] == Shard(query_dim) else 1
        sizes = query.shape[query_dim], operand.shape[dim]
        divide = grouped and query_dim == query.ndim - 3 and not any(size % parts for size in sizes)
        if sizes[0] != sizes[1] and not divide:
            raise ValueError(
                f"{name}: {call} cannot share out {sizes[1]} beside query's {sizes[0]} along dimension {query_dim} "
                f"over {parts} processes; both have to be divisible by that, or query replicated"
            )
        return dim

    return along
