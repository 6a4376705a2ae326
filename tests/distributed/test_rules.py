"""The sharding rules of the raw operators: outputs and what moves, against the operator on whole tensors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import REORDERED
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fusednorm
from fusednorm._options import AttentionOptions, NormGradOptions, NormOptions
from fusednorm.integrations import dtensor_rules

OPS, B, S, N = torch.ops.fusednorm, 4, 6, 16
R, F64 = Replicate(), torch.float64
SEED = torch.tensor([7])


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64)


def run(name: str, args: list, placements: dict[int, object], outputs: list) -> None:
    """`placements` of arguments by index, `outputs` as expected. Nothing moves where these are sharded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    op = getattr(OPS, name)
    want = op(*args)
    given = list(args)
    for i, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            given[i] = distribute_tensor(arg, mesh, [placements.get(i, R)])
    with CommDebugMode() as mode:
        found = op(*given)
    want, found = (x if isinstance(x, (tuple, list)) else (x,) for x in (want, found))
    assert [out.placements for out in found] == [(placed,) for placed in outputs]
    if any(isinstance(placed, Shard) for placed in outputs):
        assert not mode.get_total_counts(), name
    for out, whole in zip(found, want, strict=True):
        assert out.shape == whole.shape
        torch.testing.assert_close(out.full_tensor(), whole, **REORDERED)


def norms(dropout_p: float = 0.0) -> None:
    options = NormOptions(1, 1e-5, dropout_p, 0.0, F64, F64, False, False, True)
    seed = SEED if dropout_p else None
    args = [rand(B, S, N), rand(B, S, N), rand(N), None, rand(N), rand(B, N), seed, *options, "reference"]
    if dropout_p:
        return run("add_layer_norm_fwd", args, {0: Shard(0), 1: Shard(0)}, [R, R, R])
    run("add_layer_norm_fwd", args, {0: Shard(0), 1: Shard(0), 5: Shard(0)}, [Shard(0), Shard(0), Shard(1)])
    run("add_layer_norm_fwd", args, {0: Shard(2), 1: Shard(2)}, [R, R, R])
    rows, parameters, grads = rand(B, S, N), (rand(N), rand(N)), NormGradOptions(1, 0.0, 0.0, F64, F64, *[False] * 3)
    stats = torch.stack([rows.mean(-1).flatten(), (rows.var(-1, correction=0) + 1e-5).rsqrt().flatten()])
    mask = [True, True, True, True, False, False]
    args = [rand(B, S, N), None, rows, stats, *parameters, None, None, None, None, *grads, mask, "reference"]
    sharded = [Shard(0), Shard(0), Partial(), Partial(), R, R]
    run("add_layer_norm_bwd", args, {0: Shard(0), 2: Shard(0), 3: Shard(1)}, sharded)
    # another call of the same tensors
    args[-2] = [True, False, False, True, False, False]
    run("add_layer_norm_bwd", args, {0: Shard(0), 2: Shard(0), 3: Shard(1)}, [Shard(0), R, R, Partial(), R, R])
    return None


def sequence_to_the_backward() -> None:
    """Statistics of a sharded sequence pass from the forward to the backward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, weight, dnormed = rand(B, S, N), rand(N), rand(B, S, N)
    options = NormOptions(1, 1e-5, 0.0, 0.0, F64, F64, True, False, False)
    grads = NormGradOptions(1, 0.0, 0.0, F64, F64, True, False, False)

    def both(x, weight, dnormed):
        _, _, stats = OPS.add_layer_norm_fwd(x, None, weight, *[None] * 4, *options, "reference")
        return OPS.add_layer_norm_bwd(
            dnormed, None, x, stats, weight, *[None] * 5, *grads, [True, False, True, False, False, False], "reference"
        )

    want = both(x, weight, dnormed)
    placed = [distribute_tensor(t, mesh, [p]) for t, p in ((x, Shard(1)), (weight, R), (dnormed, R))]
    found = both(*placed)
    assert found[0].placements == (Shard(1),) and found[2].placements == (Partial(),)
    for i in (0, 2):
        torch.testing.assert_close(found[i].full_tensor(), want[i], **REORDERED)


def activations() -> None:
    for dim, bias, dbias in ((0, R, Partial()), (1, R, Partial()), (2, Shard(0), Shard(0))):
        args = [rand(B, S, N), rand(N), None, "gelu", 0.0, "reference"]
        run("bias_act_dropout_fwd", args, {0: Shard(dim), 1: bias}, [Shard(dim)])
        args = [rand(B, S, N), *args[:5], [True, True], "reference"]
        run("bias_act_dropout_bwd", args, {0: Shard(dim), 1: Shard(dim), 2: bias}, [Shard(dim), dbias])
        args[-2] = [True, False]
        run("bias_act_dropout_bwd", args, {0: Shard(dim), 1: Shard(dim), 2: bias}, [Shard(dim), R])
    args = [rand(B, N), None, SEED, "relu", 0.5, "reference"]
    run("bias_act_dropout_fwd", args, {0: Shard(0)}, [R])


def attentions() -> None:
    options = AttentionOptions(S, S, 1 / math.sqrt(8))
    for dim, mask, key_mask in ((0, R, Shard(0)), (1, Shard(0), R)):
        q, k, v, bias = rand(B, 4, S, 8), rand(B, 2, S, 8), rand(B, 2, S, 8), rand(4, S, S)
        rest = [bias, torch.rand(B, S) > 0.3, None, None, None]
        args = [q, k, v, *rest, *options, "reference"]
        places = dict.fromkeys((0, 1, 2), Shard(dim)) | {3: mask, 4: key_mask}
        run("attention_fwd", args, places, [Shard(dim)] * 2)
        out, lse = OPS.attention_fwd(*args)
        args = [rand(B, 4, S, 8), None, q, k, v, out, lse, *rest, *options, [True] * 4, "reference"]
        places = dict.fromkeys((0, 2, 3, 4, 5, 6), Shard(dim)) | {7: mask, 8: key_mask}
        run("attention_bwd", args, places, [Shard(dim)] * 3 + [Partial() if dim == 0 else Shard(0)])
    args = [q, k, v, *[None] * 5, *options, "reference"]
    run("attention_fwd", args, dict.fromkeys((0, 1, 2), Shard(2)), [R, R])
    bounds = torch.tensor([0, 2, S], dtype=torch.int32)
    packed = [rand(S, 4, 8), rand(S, 2, 8), rand(S, 2, 8), *[None] * 3, bounds, bounds, *options, "reference"]
    run("attention_fwd", packed, dict.fromkeys((0, 1, 2), Shard(1)), [Shard(1), Shard(0)])


@pytest.mark.parametrize("calls", [norms, sequence_to_the_backward, activations, attentions])
def test_operators_keep_what_is_independent_where_it_is(two, calls):
    two(calls)


def test_a_norm_with_dropout_is_gathered_because_its_mask_is_of_the_whole_tensor(two):
    two(norms, 0.5)


def mixed() -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    rows = distribute_tensor(rand(B, S, N), mesh, [Shard(0), Shard(1)])
    stats, options = torch.ones(2, B * S, dtype=F64), NormGradOptions(1, 0.0, 0.0, F64, F64, *[False] * 3)
    stats = DTensor.from_local(stats[:, : B * S // 4], mesh, [Shard(1)] * 2)
    with pytest.raises(Exception) as caught:
        OPS.add_layer_norm_bwd(rows, None, rows, stats, *[None] * 6, *options, [True] + [False] * 5, "reference")
    return str(caught.value)


def test_a_backward_that_could_mix_up_rows_is_refused_by_name(four):
    assert all("saved: add_layer_norm_bwd takes rows that are sharded alike" in said for said in four(mixed))


def test_every_operator_has_a_rule():
    registered = dtensor_rules.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    for name in fusednorm._ops.SCHEMAS:
        packet = getattr(OPS, name)
        assert all(getattr(packet, overload) in registered for overload in packet.overloads()), name
