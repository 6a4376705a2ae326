"""``memory_efficient``: what it keeps, and when it keeps z after all."""

from __future__ import annotations

import logging

import pytest
import torch
from oracle import Call, check
from shapes import FUSED, Shape, affine, inputs, random_leaves

import fusednorm
from fusednorm import _once

SHAPE = Shape("several_rows", (6, 40))
OPTIONS = {"memory_efficient": True}


@pytest.fixture
def rebuilding(provider: str, using):
    """The context of a provider that rebuilds z; torch's own operators keep it (dispatch/test_torch_provider.py)."""
    if provider == "torch":
        pytest.skip("torch's own operators keep z whatever is asked for")
    return using


def kept_storages(call: Call, leaves: dict[str, torch.Tensor]) -> tuple[set[int], tuple[torch.Tensor, ...]]:
    """Addresses of what autograd keeps for the backward, and the outputs."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = call.ours(leaves)
    return {tensor.data_ptr() for tensor in kept}, outputs


def requiring(leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}


@pytest.mark.parametrize("function", FUSED)
def test_keeps_normed_and_neither_z_nor_x(function, rebuilding, device, generator):
    leaves = requiring(random_leaves(SHAPE, inputs(function), torch.float32, device, generator))
    with rebuilding:
        kept, (normed, z) = kept_storages(Call(function, options=OPTIONS), leaves)
    assert normed.data_ptr() in kept
    assert not kept & {z.data_ptr(), leaves["x"].data_ptr(), leaves["residual"].data_ptr()}


@pytest.mark.parametrize("function", FUSED)
def test_default_keeps_z_and_not_normed(function, device, generator):
    """The other branch, so that the test above cannot pass by looking at the wrong tensors."""
    leaves = requiring(random_leaves(SHAPE, inputs(function), torch.float32, device, generator))
    with fusednorm.use_provider("reference"):
        kept, (normed, z) = kept_storages(Call(function), leaves)
    assert z.data_ptr() in kept
    assert normed.data_ptr() not in kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("small", [0.0, 1e-30, "subnormal"], ids=str)
@pytest.mark.parametrize("function", FUSED)
def test_weight_near_zero_keeps_z(function, small, dtype, using, device, generator):
    """A zero weight makes the rebuilt z NaN, a tiny one makes it noise (Fast-LLM#220): both keep z."""
    leaves = random_leaves(SHAPE, (*inputs(function), "x_bias"), dtype, device, generator)
    leaves["weight"][3] = torch.finfo(dtype).tiny / 4 if small == "subnormal" else small
    with using:
        check(Call(function, options=OPTIONS, rebuilds=False), leaves, generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_far_larger_than_weight_is_as_accurate_as_keeping_z(dtype, using, device, generator):
    """normed - bias cancels: with |bias| >> |weight| nothing of z is left in a rounded normed."""
    leaves = random_leaves(SHAPE, inputs("add_layer_norm"), dtype, device, generator)
    leaves["bias"] = leaves["bias"] * 1000
    with using:
        check(Call("add_layer_norm", options=OPTIONS, rebuilds=False), leaves, generator)


def test_keeping_z_after_all_is_said_once(rebuilding, device, generator, caplog, monkeypatch):
    monkeypatch.setattr(_once, "_said", set())
    leaves = random_leaves(SHAPE, inputs("add_layer_norm"), torch.float32, device, generator)
    leaves["weight"].zero_()
    with rebuilding, caplog.at_level(logging.WARNING, logger="fusednorm"):
        for _ in range(3):
            Call("add_layer_norm", options=OPTIONS).ours(requiring(leaves))
    records = [record for record in caplog.records if "memory_efficient" in record.getMessage()]
    assert len(records) == 1
    assert "weight" in records[0].getMessage()


@pytest.mark.parametrize("how", ["no_grad", "data", "load_state_dict", "copy_"])
def test_weight_changed_after_a_call_is_looked_at_again(how, using, device):
    """Weights that become zero between two calls, in each way that training code changes them."""
    module = fusednorm.AddLayerNorm(40, memory_efficient=True, device=device)
    x = torch.randn(6, 40, device=device, requires_grad=True)
    with using:
        module(x, x)
        zero = torch.zeros(40, device=device)
        if how == "no_grad":
            with torch.no_grad():
                module.weight.mul_(0)
        elif how == "data":
            module.weight.data.zero_()
        elif how == "load_state_dict":
            module.load_state_dict({"weight": zero, "bias": zero})
        else:
            module.weight.detach().copy_(zero)
        normed, z = module(x, x)
        gradients = torch.autograd.grad(
            (normed, z), (x, *module.parameters()), (torch.randn_like(normed), torch.randn_like(z))
        )
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("function", FUSED)
def test_without_affine_and_zero_centered(function, using, device, generator):
    """weight None rebuilds directly; a zero-centred weight near zero is a factor near one."""
    with using:
        check(
            Call(function, options=OPTIONS),
            random_leaves(SHAPE, ("x", "residual"), torch.bfloat16, device, generator),
            generator,
        )
        leaves = random_leaves(SHAPE, ("x", "residual", *affine(function)), torch.bfloat16, device, generator)
        leaves["weight"] = leaves["weight"] * 1e-3
        check(Call(function, options=OPTIONS | {"zero_centered_weight": True}), leaves, generator)


@pytest.mark.parametrize("function", FUSED)
def test_normed_may_not_be_changed_in_place_before_the_backward(function, rebuilding, device):
    """It is what the backward reads; autograd says so instead of giving a wrong gradient."""
    x = torch.randn(3, 40, device=device, requires_grad=True)
    with rebuilding:
        normed, _ = getattr(fusednorm, function)(x, x, (40,), memory_efficient=True)
        normed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            normed.backward(torch.randn_like(normed))
