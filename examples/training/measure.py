"""What a training run is measured by: who serves its calls, what memory it takes."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import profile

from examples.training.loop import Settings, Trainer, time_steps
from examples.training.machine import autocast, synchronize
from examples.training.model import Batch, ModelConfig, Twin, loss_of, make_twins
from fusednorm._saved_bytes import saved_bytes
from fusednorm.dispatch.explain import decisions


def routes(model: nn.Module, *inputs: torch.Tensor) -> list[dict[str, Any]]:
    """Who serves the calls of one forward, how, how many they are, and why not another."""
    made = Counter(route._replace(where="") for route in decisions(model.train(), *inputs))
    return [
        {
            "function": route.function,
            "provider": route.provider,
            "how": route.how,
            "calls": calls,
            "refusals": [f"{who} is not used: {why}" for who, why in route.refusals],
        }
        for route, calls in made.items()
        if route.function[0].islower()  # of functions; modules say whether they are fused
    ]


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Silence what C++ writes to stderr: the profiler announces its start and stop there, and no setting stops it."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def allocated_peak(work: Callable[[], None], device: torch.device) -> int:
    """Largest sum of bytes that torch's allocator had lent out at once during `work`, beyond what it had before.

    CUDA: the caching allocator's own count. CPU: the profiler's record of every allocation; unlike the resident size
    of the process it repeats to the byte.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The backend of torch.profiler, which would parse every event too: seconds, and only the allocations are wanted.
    with quiet_stderr(), profile(use_kineto=True, profile_memory=True) as profiler:
        work()
    records = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(records, key=lambda record: record.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure_memory(
    kind: type[Twin], variant: str, config: ModelConfig, settings: Settings, batch: Batch
) -> dict[str, int]:
    """Memory of one variant alone: the peak from building it through three training steps, and what a forward keeps."""
    device = batch.wanted.device

    def build() -> Twin:
        return make_twins(kind, config, settings.seed, device, (variant,))[variant]

    def train() -> None:
        trainer = Trainer(build(), settings)
        for step in range(3):
            trainer.step(batch, settings.learning_rate, step)

    peak = allocated_peak(train, device)
    return {"peak_bytes": peak, "saved_bytes": kept_by_a_forward(build(), settings, batch)}


def kept_by_a_forward(model: Twin, settings: Settings, batch: Batch) -> int:
    """Bytes that one forward in training mode keeps for its backward."""
    model.train()

    def forward() -> torch.Tensor:
        with autocast(batch.wanted.device, settings.dtype):
            return loss_of(model, batch)

    return saved_bytes(model.parameters(), forward)


DROPOUT, STEPS = 0.1, 40  # as people train


def measure_dropout(
    kind: type[Twin], config: ModelConfig, settings: Settings, batches: Sequence[Batch], device: torch.device
) -> dict[str, dict[str, float]]:
    """Step time, and what a forward keeps, of both variants with dropout. Each draws masks of its own."""
    twins = make_twins(kind, replace(config, dropout=DROPOUT), settings.seed, device)
    speed = time_steps(twins, batches, settings, device, STEPS)
    batch = batches[(len(batches) - 1) // 2].to(device)
    return {v: speed[v] | {"saved_bytes": kept_by_a_forward(model, settings, batch)} for v, model in twins.items()}
