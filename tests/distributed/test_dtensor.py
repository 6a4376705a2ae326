"""DTensors in the public functions: results and gradients of the whole tensors, and what moves between processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import REORDERED
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import fusednorm
from fusednorm.integrations.dtensor import SEED_STEP
from fusednorm.integrations.parallel import ResidualSequenceParallel

B, S, N = 4, 6, 16
R = Replicate()


def moved(mode: CommDebugMode) -> dict[str, int]:
    return {str(op).rpartition(".")[2].strip("')>"): n for op, n in mode.get_comm_counts().items() if n}


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def placed(tensor: torch.Tensor, mesh, *placements) -> DTensor:
    return distribute_tensor(tensor.detach().clone(), mesh, list(placements)).requires_grad_(tensor.requires_grad)


def compare(function, tensors: dict, placements: dict, mesh, kept=None) -> tuple[dict[str, int], dict[str, int]]:
    """The function of whole tensors and of DTensors: values and gradients. Gives what moved in forward and backward."""
    whole = function(**tensors)
    whole = whole if isinstance(whole, tuple) else (whole,)
    weights = [torch.randn_like(out) for out in whole]
    sum((out * w).sum() for out, w in zip(whole, weights, strict=True)).backward()
    parts = {name: placed(t, mesh, *placements[name]) for name, t in tensors.items()}
    with CommDebugMode() as forward:
        outs = function(**parts)
    outs = outs if isinstance(outs, tuple) else (outs,)
    kept = next(iter(placements.values())) if kept is None else kept
    for out, want in zip(outs, whole, strict=True):
        assert out.placements == tuple(kept) and out.shape == want.shape and out.stride() == want.stride()
        assert out.to_local().shape == placed(want, mesh, *kept).to_local().shape
    weights = [placed(w, mesh, *out.placements) for out, w in zip(outs, weights, strict=True)]
    with CommDebugMode() as backward:
        torch.autograd.backward(outs, weights)
    for out, want in zip(outs, whole, strict=True):
        torch.testing.assert_close(out.full_tensor(), want, **REORDERED)
    for name, part in parts.items():
        if part.requires_grad:
            assert part.grad.placements == part.placements, name
            torch.testing.assert_close(part.grad.full_tensor(), tensors[name].grad, **REORDERED)
    return moved(forward), moved(backward)


def norms_of_sharded_rows(dim: int, batch: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows, vector = [Shard(dim)], [R]
    samples = [Shard(0)] if dim == 0 else [R]

    def plain(input, weight, bias):
        return fusednorm.layer_norm(input, N, weight, bias)

    tensors = {"input": leaf(batch, S, N), "weight": leaf(N), "bias": leaf(N)}
    places = {"input": rows, "weight": vector, "bias": vector}
    assert compare(plain, tensors, places, mesh) == ({}, {"all_reduce": 2})

    def step(**tensors):
        return fusednorm.add_rms_norm(normalized_shape=N, **tensors)

    names = ("weight", "x_bias", "layer_scale")
    tensors = {"x": leaf(batch, S, N), "residual": leaf(batch, S, N)} | {name: leaf(N) for name in names}
    places = {"x": rows, "residual": rows} | dict.fromkeys(names, vector)
    assert compare(step, tensors, places, mesh) == ({}, {"all_reduce": 3})

    tensors |= {"gate": leaf(batch, 1, N), "scale": leaf(batch, N)}
    places |= {"gate": samples, "scale": samples}
    for tensor in tensors.values():
        tensor.grad = None
    assert compare(step, tensors, places, mesh) == ({}, {"all_reduce": 3 if dim == 0 else 5})


@pytest.mark.parametrize(("dim", "batch"), [(0, 4), (1, 4), (0, 3)], ids=["samples", "sequence", "uneven"])
def test_norms_of_sharded_rows_move_nothing_but_gradients_of_parameters(two, dim, batch):
    two(norms_of_sharded_rows, dim, batch)


def norms_of_other_shards() -> None:
    mesh = init_device_mesh("cpu", (2,))

    def step(x, residual, weight):
        return fusednorm.add_layer_norm(x, residual, N, weight)

    tensors = {"x": leaf(B, S, N), "residual": leaf(B, S, N), "weight": leaf(N)}
    # what a row-wise linear leaves is scattered to where the residual is
    parts = {name: placed(t, mesh, Shard(1) if name == "residual" else R) for name, t in tensors.items()}
    partial = DTensor.from_local(parts["x"].to_local().detach() / 2, mesh, [Partial()])
    with CommDebugMode() as mode:
        normed, total = step(partial, parts["residual"], parts["weight"])
    assert moved(mode) == {"reduce_scatter_tensor": 1} and total.placements == (Shard(1),)
    want = step(**tensors)
    torch.testing.assert_close(normed.full_tensor(), want[0], **REORDERED)
    torch.testing.assert_close(total.full_tensor(), want[1], **REORDERED)
    # sharded columns are gathered, as by torch's own norm
    places = {"x": [Shard(2)], "residual": [Shard(2)], "weight": [R]}
    forward, backward = compare(step, tensors, places, mesh, kept=[R])
    assert forward == {"all_gather_into_tensor": 2} and not backward


def test_a_partial_branch_is_scattered_and_columns_are_gathered(two):
    two(norms_of_other_shards)


def on_two_dimensions() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def step(**tensors):
        return fusednorm.add_layer_norm(normalized_shape=N, **tensors)

    tensors = {"x": leaf(B, S, N), "residual": leaf(B, S, N), "weight": leaf(N), "bias": leaf(N), "shift": leaf(B, N)}
    rows = [Shard(0), Shard(1)]
    places = {"x": rows, "residual": rows, "weight": [R, R], "bias": [R, R], "shift": [Shard(0), R]}
    forward, backward = compare(step, tensors, places, mesh)
    assert not forward and set(backward) == {"all_reduce"}
    for tensor in tensors.values():
        tensor.grad = None
    rows = [Shard(0), R]
    places |= {"x": rows, "residual": rows}
    assert compare(step, tensors, places, mesh) == ({}, {"all_reduce": 2})


def test_a_mesh_of_two_dimensions(four):
    four(on_two_dimensions)


def activations() -> None:
    mesh = init_device_mesh("cpu", (2,))

    def act(x, bias):
        return fusednorm.bias_act_dropout(x, bias, "gelu")

    for dim, bias, reduced in ((0, R, {"all_reduce": 1}), (1, R, {"all_reduce": 1}), (2, Shard(0), {})):
        tensors = {"x": leaf(B, S, N), "bias": leaf(N)}
        assert compare(act, tensors, {"x": [Shard(dim)], "bias": [bias]}, mesh) == ({}, reduced)


def test_activations_of_rows_and_of_columns_move_no_activation(two):
    two(activations)


def compiled() -> None:
    mesh = init_device_mesh("cpu", (2,))

    def step(x, weight):
        normed, total = fusednorm.add_layer_norm(x, x, N, weight)
        return fusednorm.bias_act_dropout(normed, weight, "gelu", 0.5, seed=3) + total

    x, weight = torch.randn(B, S, N), torch.randn(N)
    found = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        tensors = placed(x.requires_grad_(), mesh, Shard(1)), placed(weight.requires_grad_(), mesh, R)
        out = function(*tensors)
        out.square().sum().backward()
        found.append([out.to_local(), *(t.grad.to_local() for t in tensors)])
    for eager, graph in zip(*found, strict=True):
        # float32: the graph's operators add the weight's gradient, a sum over all rows, in another order
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-5)


def test_a_graph_computes_the_same(two):
    two(compiled)


def of_a_collective() -> None:
    """A plain tensor that a collective has not finished yet, as torch's parallel styles hand on."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_gather_tensor

    group = init_device_mesh("cpu", (2,)).get_group()
    x, weight = torch.randn(B, N), torch.ones(N, requires_grad=True)
    for step in (
        lambda t: fusednorm.layer_norm(t, N, weight),
        lambda t: fusednorm.add_rms_norm(t, t, N, weight)[0],
        lambda t: fusednorm.bias_act_dropout(t, weight, "gelu"),
    ):
        with torch.no_grad():
            gathered = all_gather_tensor(x, 0, group)
        assert isinstance(gathered, AsyncCollectiveTensor)
        out = step(gathered)
        torch.testing.assert_close(torch.add(out, 0.0), step(torch.cat([x, x])))
        out.sum().backward()


def test_a_pending_collective_is_waited_for(two):
    two(of_a_collective)


def attentions() -> None:
    mesh = init_device_mesh("cpu", (2,))

    def attend(query, key, value, **masks):
        return fusednorm.scaled_dot_product_attention(query, key, value, enable_gqa=True, return_lse=True, **masks)

    for dim in (0, 1):
        tensors = {"query": leaf(B, 4, S, 8), "key": leaf(B, 2, S, 8), "value": leaf(B, 2, S, 8)}
        places = {name: [Shard(dim)] for name in tensors}
        assert compare(attend, tensors, places, mesh) == ({}, {})
        tensors |= {"attn_mask": leaf(4, S, S), "key_mask": torch.rand(B, S) > 0.3}
        places |= {"attn_mask": [R if dim == 0 else Shard(0)], "key_mask": [Shard(0) if dim == 0 else R]}
        for tensor in tensors.values():
            tensor.grad = None
        assert compare(attend, tensors, places, mesh) == ({}, {"all_reduce": 1} if dim == 0 else {})


def test_attention_of_batches_and_of_heads_moves_nothing(two):
    two(attentions)


def refusals() -> None:
    mesh = init_device_mesh("cpu", (2,))
    q = torch.randn(B, 4, S, 8)
    sequence, heads, three = placed(q, mesh, Shard(2)), placed(q, mesh, Shard(1)), placed(q[:, :3], mesh, Shard(1))
    attend = fusednorm.scaled_dot_product_attention
    with pytest.raises(ValueError, match=r"query: .* sharded along its sequence.*redistribute it to the batch"):
        attend(sequence, sequence, sequence)
    with pytest.raises(ValueError, match=r"value: .* sharded along its head dimension"):
        attend(heads, heads, placed(q, mesh, Shard(3)))
    with pytest.raises(ValueError, match=r"key: .* cannot share out 3 beside query's 4"):
        attend(heads, three, three, enable_gqa=True)
    with pytest.raises(TypeError, match=r"query: varlen_attention takes no DTensor"):
        bounds = torch.tensor([0, S], dtype=torch.int32)
        fusednorm.varlen_attention(heads[0], heads[0], heads[0], bounds, bounds, S, S)
    x, rows = torch.randn(B, S, N), placed(torch.randn(B, S, N), mesh, Shard(1))
    with pytest.raises(TypeError, match=r"weight: layer_norm got a Tensor beside input, a DTensor"):
        fusednorm.layer_norm(rows, N, torch.ones(N))
    with pytest.raises(TypeError, match=r"residual: add_rms_norm got a Tensor beside x, a DTensor"):
        fusednorm.add_rms_norm(rows, x, N)
    with pytest.raises(ValueError, match=r"normalized_shape: \(8,\) is not the end of x's shape"):
        fusednorm.add_rms_norm(rows, rows, 8)
    with pytest.raises(ValueError, match=r"drop_path_p: add_layer_norm takes none beside dropout_p"):
        fusednorm.add_layer_norm(rows, rows, N, dropout_p=0.1, drop_path_p=0.1)


def test_what_does_not_fit_is_refused_by_name(two):
    two(refusals)


def sequence_parallel() -> dict[str, dict[str, int]]:
    mesh = init_device_mesh("cpu", (2,))
    counts = {}
    x, residual = torch.randn(B, S, N), torch.randn(B, S, N)
    for name, module, style in (
        ("LayerNorm", fusednorm.LayerNorm(N), SequenceParallel()),
        ("RMSNorm", fusednorm.RMSNorm(N), SequenceParallel()),
        ("AddLayerNorm", fusednorm.AddLayerNorm(N), ResidualSequenceParallel()),
        ("AddRMSNorm", fusednorm.AddRMSNorm(N), ResidualSequenceParallel(use_local_output=True)),
    ):
        inputs = (x, residual) if name.startswith("Add") else (x,)
        outputs = module(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(out.square().sum() for out in outputs).backward()
        want = {own: p.grad for own, p in module.named_parameters()}
        module.zero_grad()
        module = parallelize_module(module, mesh, style)
        parts = [t.chunk(2, 1)[mesh.get_rank()].clone().requires_grad_() for t in inputs]  # plain: this process's part
        with CommDebugMode() as mode:
            found = module(*parts)
            found = found if isinstance(found, tuple) else (found,)
            part = [out.to_local() if isinstance(out, DTensor) else out for out in found]
            sum(out.square().sum() for out in part).backward()
        for out, whole in zip(part, outputs, strict=True):
            torch.testing.assert_close(out, whole.chunk(2, 1)[mesh.get_rank()])
        for own, parameter in module.named_parameters():
            assert parameter.grad.placements == (R,)
            # float32: two halves of the rows are summed apart, then added
            torch.testing.assert_close(parameter.grad.to_local(), want[own], rtol=1e-5, atol=1e-5)
        optimizer = torch.optim.AdamW(module.parameters())
        with CommDebugMode() as step:
            optimizer.step()
        counts[name] = moved(mode) | {f"optimizer's {op}": n for op, n in moved(step).items()}
    return counts


def test_modules_under_sequence_parallel_reduce_each_gradient_once(two):
    reduced = {"all_reduce": 2}, {"all_reduce": 1}
    want = dict(zip(("LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm"), reduced * 2, strict=True))
    assert two(sequence_parallel) == [want] * 2


def masks(dim: int | None, p: float, drop_path: float) -> tuple:
    """(which elements of this process's part are kept, what `dropout_mask` says of the seed of its place)"""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(5)
    ones = placed(torch.ones(B, 8, N), mesh, R if dim is None else Shard(dim))
    options = {"dropout_p": p, "drop_path_p": drop_path}
    kept = fusednorm.add_layer_norm(ones, None, N, **options, seed=3)[1].to_local() != 0
    place = 0 if dim is None else mesh.get_rank()
    said = fusednorm.dropout_mask(kept.shape, p, 3 + place * SEED_STEP)
    drawn = fusednorm.add_layer_norm(ones, None, N, **options)[1].to_local() != 0
    tensor_seed = fusednorm.add_layer_norm(ones, None, N, **options, seed=torch.tensor([3]))[1].to_local() != 0
    assert torch.equal(tensor_seed, kept)
    return kept, said, drawn


def test_masks_are_those_of_the_place_in_the_mesh(two):
    for dim in (0, 1):
        (kept, said, drawn), (other, other_said, other_drawn) = two(masks, dim, 0.5, 0.0)
        assert torch.equal(kept, said) and torch.equal(other, other_said)
        assert not torch.equal(kept, other) and not torch.equal(drawn, other_drawn)


def test_masks_of_what_every_process_holds_agree(two):
    (kept, said, drawn), (other, _, other_drawn) = two(masks, None, 0.5, 0.0)
    assert torch.equal(kept, said) and torch.equal(kept, other) and torch.equal(drawn, other_drawn)
    assert 0.4 < drawn.double().mean() < 0.6 and not torch.equal(drawn, kept)


def test_drop_path_decides_over_a_sample_wherever_its_parts_are(two):
    (kept, _, drawn), (other, _, other_drawn) = two(masks, 1, 0.0, 0.5)
    assert torch.equal(kept, other) and torch.equal(drawn, other_drawn)
    (kept, _, _), (other, _, _) = two(masks, 0, 0.0, 0.5)
    assert kept.flatten(1).all(1).logical_or(kept.flatten(1).logical_not().all(1)).all()


def test_masks_on_two_dimensions_differ_along_the_sharded_ones(four):
    found = four(masks_on_two_dimensions)
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3]) and not torch.equal(found[0], found[2])


def masks_on_two_dimensions() -> torch.Tensor:
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(mesh.get_coordinate()[0])  # data-parallel processes draw on their own
    return fusednorm.bias_act_dropout(placed(torch.ones(B, N), mesh, Shard(0), R), None, "relu", 0.5).to_local()


def gradients_see_the_mask(shard: int | None) -> None:
    mesh = init_device_mesh("cpu", (2,))
    x = placed(torch.randn(B, S, N), mesh, R if shard is None else Shard(shard)).requires_grad_()
    out = fusednorm.bias_act_dropout(x + 10.0, None, "relu", 0.5)
    out.sum().backward()
    assert torch.equal(x.grad.to_local() != 0, out.to_local() != 0)


def test_backward_has_the_mask_of_the_forward(two):
    for shard in (None, 1, 2):
        two(gradients_see_the_mask, shard)


def different_generators() -> str:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(dist.get_rank())
    from fusednorm.integrations import dtensor

    dtensor._agreed.clear()
    with pytest.raises(RuntimeError) as caught:
        fusednorm.bias_act_dropout(placed(torch.ones(B, N), mesh, R), None, "relu", 0.5)
    return str(caught.value)


def test_generators_that_differ_where_masks_must_agree_are_told(two):
    for said in two(different_generators):
        assert said.startswith("seed: processes that hold the same elements drew different ones")
