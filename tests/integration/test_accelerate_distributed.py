"""Accelerated models under DDP and FSDP2, in two gloo processes on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusednorm
from fusednorm.acceleration import fused

D = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mix, self.fc1, self.fc2, self.act = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.GELU()

    def forward(self, x):
        x = x + self.mix(self.norm1(x))
        x = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return x


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def batch(rank: int) -> torch.Tensor:
    return torch.randn(4, 5, D, generator=torch.Generator().manual_seed(rank))


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def train(rank: int, world: int, meeting: str, kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    torch.manual_seed(0)
    plain = Stack()
    wanted = [gradients(copy.deepcopy(plain), batch(r)) for r in range(world)]
    model = copy.deepcopy(plain)
    assert len(fusednorm.accelerate(model).fused) > 8
    if kind == "ddp":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        wrapped = fully_shard(model)
    for call in (fusednorm.accelerate, fusednorm.restore):
        with pytest.raises(ValueError, match=r"wrapped for several devices; \w+ before wrapping"):
            call(wrapped)
    fused_sums: list[nn.Module] = []
    with fused.listening(lambda norm, total, steps: fused_sums.append(norm)):
        found = gradients(wrapped, batch(rank))
    # FSDP2 has gathered the norms of a block while it runs, and not those of the next one
    assert len(fused_sums) == (4 if kind == "ddp" else 2)
    for name, grad in found.items():
        name = name.removeprefix("module.")
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        mean = sum(each[name] for each in wanted) / world
        torch.testing.assert_close(grad, mean, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_gradients_are_the_mean_of_those_of_single_processes(kind, tmp_path):
    torch.multiprocessing.spawn(train, (2, str(tmp_path / "meeting"), kind), nprocs=2)
