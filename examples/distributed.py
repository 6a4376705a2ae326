"""Train a small language model on several devices, by torch's own engines.

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --strategy tp --checkpoint run --steps 200
    torchrun --nproc-per-node 4 examples/distributed.py --strategy fsdp --checkpoint run --steps 300

It takes GPUs where there is one for each process, else the CPU. Strategies: `ddp` copies the model, `fsdp` shards its
parameters, `tp` shards its linear layers and, between these, the sequence. With `--checkpoint` it goes on from the
newest checkpoint of that folder, which another strategy or number of processes may have saved.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from tqdm import tqdm

import fusednorm
from fusednorm.integrations.parallel import ResidualSequenceParallel

STRATEGIES, VOCAB = ("ddp", "fsdp", "tp"), 32


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.head_dim = width // heads

    def forward(self, x: Tensor) -> Tensor:
        # the number of heads is not named: under tensor parallel a process has some of them
        linears = self.query, self.key, self.value
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in linears)
        attended = fusednorm.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.down(fusednorm.bias_act_dropout(self.up(x), None, "gelu", dropout))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = fusednorm.AddLayerNorm(width, dropout_p=dropout)
        self.norm2 = fusednorm.AddLayerNorm(width, dropout_p=dropout)
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width, dropout)

    def forward(self, branch: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        normed, residual = self.norm1(branch, residual)
        normed, residual = self.norm2(self.attention(normed), residual)
        return self.feed_forward(normed), residual


class LanguageModel(nn.Module):
    def __init__(
        self, vocab: int = VOCAB, width: int = 64, layers: int = 2, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.first = fusednorm.RMSNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.last = fusednorm.AddLayerNorm(width)
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        residual = self.embed(tokens)
        branch = self.first(residual)
        for block in self.blocks:
            branch, residual = block(branch, residual)
        return self.head(self.last(branch, residual)[0])


def parallelize(model: LanguageModel, strategy: str, mesh: DeviceMesh) -> nn.Module:
    """The model under one of torch's engines. `mesh` has one dimension."""
    if strategy == "ddp":
        return nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    if strategy == "fsdp":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    sequence = Shard(1)
    split = ColwiseParallel(use_local_output=False)
    joined = RowwiseParallel(output_layouts=sequence, use_local_output=False)
    gathered = PrepareModuleInput(input_layouts=sequence, desired_input_layouts=Replicate())
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence, use_local_output=False),
        "first": SequenceParallel(),
        "last": ResidualSequenceParallel(),
        "head": ColwiseParallel(input_layouts=sequence, output_layouts=Replicate()),
    }
    of_block = {
        **dict.fromkeys(("norm1", "norm2"), ResidualSequenceParallel()),
        **dict.fromkeys(("attention", "feed_forward"), gathered),
        **dict.fromkeys(("attention.query", "attention.key", "attention.value", "feed_forward.up"), split),
        **dict.fromkeys(("attention.out", "feed_forward.down"), joined),
    }
    for i in range(len(model.blocks)):
        plan |= {f"blocks.{i}.{name}": style for name, style in of_block.items()}
    return parallelize_module(model, mesh, plan)


def batch(step: int, part: int, size: int, device: torch.device) -> Tensor:
    """Sequences that count up modulo VOCAB by a stride of their own: (size, 33) tokens."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    start, stride = (torch.randint(low, VOCAB, (size, 1), generator=generator) for low in (0, 1))
    return ((start + stride * torch.arange(33)) % VOCAB).to(device)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters, states = get_state_dict(model, optimizer)
    dcp.save({"model": parameters, "optimizer": states, "step": step}, checkpoint_id=folder / f"step-{step}")


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint that is complete: its metadata is written last. Returns its step, 0 without one."""
    steps = [int(path.parent.name.removeprefix("step-")) for path in folder.glob("step-*/.metadata")]
    if not steps:
        return 0
    parameters, states = get_state_dict(model, optimizer)
    state = {"model": parameters, "optimizer": states, "step": 0}
    dcp.load(state, checkpoint_id=folder / f"step-{max(steps)}")
    set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=states)
    return int(state["step"])


def train(arguments: argparse.Namespace, device: torch.device, mesh: DeviceMesh) -> float:
    rank, shards_data = mesh.get_rank(), arguments.strategy != "tp"
    torch.manual_seed(0)
    model = parallelize(LanguageModel(dropout=arguments.dropout).to(device), arguments.strategy, mesh)
    # Masks differ between processes with data of their own. Those that share their data draw alike.
    torch.manual_seed(1 + (rank if shards_data else 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    folder = None if arguments.checkpoint is None else Path(arguments.checkpoint)
    start = 0 if folder is None else resume(folder, model, optimizer)
    loss = torch.tensor(float("nan"))
    bar = tqdm(range(start, arguments.steps), desc=arguments.strategy, unit="step", disable=None if rank == 0 else True)
    for step in bar:
        tokens = batch(step, rank if shards_data else 0, 16, device)
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        done = step + 1
        if folder is not None and (done % arguments.save_every == 0 or done == arguments.steps):
            save(folder, done, model, optimizer)
    if rank == 0:
        done = f"{arguments.strategy}, {mesh.size()} processes, steps {start} to {arguments.steps}"
        print(f"{done}: loss {loss:.4f} nats a token; guessing among {VOCAB} tokens has {math.log(VOCAB):.4f}")
    return loss.item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a small language model on several devices.")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--checkpoint", metavar="DIR", help="save there, and go on from the newest one")
    parser.add_argument("--save-every", type=int, default=50, metavar="N")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="of waiting for another process")
    arguments = parser.parse_args(argv)
    if "LOCAL_RANK" not in os.environ:
        sys.exit("start it by torchrun: torchrun --nproc-per-node 2 examples/distributed.py")
    local_rank, local_processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpu = torch.cuda.device_count() >= local_processes
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=arguments.timeout))
    try:
        train(arguments, device, init_device_mesh(device.type, (dist.get_world_size(),)))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
