"""DDP, FSDP2 and tensor with sequence parallel of a small model: three steps are those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import examples.distributed as example

LAYERS = 2


def model(dropout: float = 0.0) -> example.LanguageModel:
    torch.manual_seed(0)
    return example.LanguageModel(width=32, layers=LAYERS, heads=4, dropout=dropout).double()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(module: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> tuple[torch.Tensor, dict]:
    optimizer.zero_grad()
    loss = example.loss_of(module, tokens)
    loss.backward()
    gradients = {name.removeprefix("module."): whole(p.grad).clone() for name, p in module.named_parameters()}
    optimizer.step()
    return loss.detach(), gradients


def three_steps(strategy: str) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    alone, parallel = model(), example.parallelize(model(), strategy, mesh)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-2) for each in (alone, parallel)]
    for i in range(3):
        tokens = example.batch(i, 0, 2 * world, torch.device("cpu"))
        part = tokens if strategy == "tp" else tokens.chunk(world)[rank]
        want, wanted = step(alone, optimizers[0], tokens)
        loss, gradients = step(parallel, optimizers[1], part)
        if strategy != "tp":
            dist.all_reduce(loss)
            loss /= world
        # float64, sums in another order; AdamW divides by gradients that are nearly zero
        torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-9)
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("strategy", example.STRATEGIES)
def test_three_steps_of_two_processes_are_those_of_one(two, strategy):
    two(three_steps, strategy)


@pytest.mark.parametrize("strategy", example.STRATEGIES)
def test_three_steps_of_four_processes_are_those_of_one(four, strategy):
    four(three_steps, strategy)


def collectives(dropout: float) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallel = example.parallelize(model(dropout), "tp", mesh)
    tokens = example.batch(0, 0, 2, torch.device("cpu"))
    example.loss_of(parallel, tokens)  # processes that share elements compare their seeds once
    counts = []
    with CommDebugMode() as forward:
        loss = example.loss_of(parallel, tokens)
    with CommDebugMode() as backward:
        loss.backward()
    optimizer = torch.optim.AdamW(parallel.parameters())
    with CommDebugMode() as update:
        optimizer.step()
    for mode in (forward, backward, update):
        counts.append({str(op).rpartition(".")[2].strip("')>"): n for op, n in mode.get_comm_counts().items() if n})
    return tuple(counts)


# Liger-Kernel #982: a DTensor was gathered before each norm, and each process computed all of it. #1076 is about
# sharded sequences.
def test_tensor_parallel_does_not_gather_everything(two):
    blocks = 2 * LAYERS  # an attention and a feed-forward
    for dropout in (0.0, 0.1):
        for forward, backward, update in two(collectives, dropout):
            # what enters a column-wise linear, and the logits; what leaves a row-wise one, and the embedding
            assert forward == {"all_gather_into_tensor": blocks + 2, "reduce_scatter_tensor": blocks + 1}
            assert backward["all_gather_into_tensor"] == blocks + 1
            assert backward["reduce_scatter_tensor"] == blocks + 1
            norms = 1 + 2 * (blocks + 1)  # the weight of `first`; weight and bias of the others, each reduced once
            assert backward["all_reduce"] == norms
            assert not update


def drawn(strategy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What leaves the first norm with dropout, on this process, all processes having the same data."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallel = example.parallelize(model(dropout=0.5), strategy, mesh)
    torch.manual_seed(7 if strategy == "tp" else dist.get_rank())
    block = (parallel.module if strategy == "ddp" else parallel).blocks[0]
    seen = []
    block.norm1.register_forward_hook(lambda module, args, outputs: seen.append(outputs[1]))
    loss = example.loss_of(parallel, example.batch(0, 0, 2, torch.device("cpu")))
    loss.backward()
    out = seen[0].detach()
    return loss.detach(), out.to_local() if isinstance(out, DTensor) else out


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_data_parallel_processes_draw_masks_of_their_own(two, strategy):
    (loss, out), (other_loss, other) = two(drawn, strategy)
    assert not torch.equal(out, other) and loss != other_loss


def test_tensor_parallel_processes_agree_on_the_loss_under_dropout(two):
    (loss, out), (other_loss, other) = two(drawn, "tp")
    assert torch.equal(loss, other_loss) and not torch.equal(out, other)
