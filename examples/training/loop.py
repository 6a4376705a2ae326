"""Train all variants side by side on the same batches, and time their steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from examples.training.machine import autocast, progress_bar, synchronize
from examples.training.model import Batch, Twin, loss_of

Curves = dict[str, dict[str, list[float]]]
WARM_UP = 3  # steps that are trained but not timed: kernels are loaded and memory is found in them


@dataclass(frozen=True, kw_only=True)
class Settings:
    epochs: int
    batch: int
    learning_rate: float
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"rate is {self.learning_rate}; it must be positive and finite")
        if not 0.0 <= self.decay < math.inf:
            raise ValueError(f"decay is {self.decay}; it must be at least 0 and finite")


class Side(Protocol):
    """The data to train on, or the data held out."""

    def batches(self, size: int, seed: int | None = None) -> Sequence[Batch]:
        """All of it in batches, in an order that hangs on the seed alone."""


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model: Twin, side: Side, settings: Settings, device: torch.device) -> float:
    """Mean loss over all batches, dropout off."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    with autocast(device, settings.dtype):
        for batch in side.batches(settings.batch):
            total += float(loss_of(model, batch.to(device))) * batch.tokens()
            tokens += batch.tokens()
    model.train(was_training)
    return total / tokens


class Trainer:
    """One variant with its AdamW state."""

    def __init__(self, model: Twin, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.optimizer = torch.optim.AdamW(
            *(model.parameters(), settings.learning_rate, settings.betas), weight_decay=settings.decay, fused=True
        )

    def step(self, batch: Batch, rate: float, seed: int) -> float:
        """`seed` fixes what dropout draws, whichever variant draws first."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed)
        self.model.train()
        with autocast(batch.wanted.device, self.settings.dtype):
            loss = loss_of(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())


def step_all(
    trainers: dict[str, Trainer], batch: Batch, rate: float, seed: int, step: int, seconds: dict[str, list[float]]
) -> dict[str, float]:
    """One step of every variant on one batch: their losses. Who goes first alternates; times are added to `seconds`."""
    device, losses = batch.wanted.device, {}
    for variant in list(trainers) if step % 2 else list(reversed(trainers)):
        synchronize(device)
        start = time.perf_counter()
        losses[variant] = trainers[variant].step(batch, rate, seed)
        synchronize(device)
        seconds[variant].append(time.perf_counter() - start)
    return losses


def train_twins(
    twins: dict[str, Twin],
    train: Side,
    test: Side,
    settings: Settings,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> tuple[Curves, dict[str, dict[str, float]]]:
    """Train every variant on the same batches in the same order; return their losses and the speed of their steps.

    Losses are nats for each token or class: `train` per epoch, `test` before training and after each epoch, `steps` per
    step. The variants alternate step by step, and who goes first alternates too, so that a drift of the machine hits
    both.
    """
    trainers = {variant: Trainer(model, settings) for variant, model in twins.items()}
    curves: Curves = {variant: {"train": [], "test": [], "steps": []} for variant in twins}
    seconds: dict[str, list[float]] = {variant: [] for variant in twins}
    counts: list[int] = []
    for variant, model in twins.items():
        curves[variant]["test"].append(evaluate(model, test, settings, device))
    for epoch in range(settings.epochs):
        batches = train.batches(settings.batch, settings.seed * 1_000_003 + epoch)
        bar = progress_bar(batches, len(batches), f"epoch {epoch + 1}/{settings.epochs}")
        sums = dict.fromkeys(twins, 0.0)
        for batch in bar:
            step = len(counts)
            counts.append(batch.tokens())
            rate = rate_at(step, settings.epochs * len(batches), settings.learning_rate)
            there = batch.to(device)
            losses = step_all(trainers, there, rate, settings.seed * 1_000_003 + step, step, seconds)
            for variant, loss in losses.items():
                curves[variant]["steps"].append(loss)
                sums[variant] += loss * counts[-1]
            if hasattr(bar, "set_postfix"):
                bar.set_postfix({v: f"{curves[v]['steps'][-1]:.4f}" for v in twins}, refresh=False)
        tokens = sum(counts[-len(batches) :])
        for variant, model in twins.items():
            curves[variant]["train"].append(sums[variant] / tokens)
            curves[variant]["test"].append(evaluate(model, test, settings, device))
        say(
            f"epoch {epoch + 1:2d}/{settings.epochs}   "
            + "   ".join(f"{v}: train {c['train'][-1]:.5f}, test {c['test'][-1]:.5f}" for v, c in curves.items())
        )
    return curves, {variant: speed_of(times, counts) for variant, times in seconds.items()}


def time_steps(
    twins: dict[str, Twin], batches: Sequence[Batch], settings: Settings, device: torch.device, steps: int
) -> dict[str, dict[str, float]]:
    """The speed of a few training steps of every variant, which alternate step by step."""
    trainers = {variant: Trainer(model, settings) for variant, model in twins.items()}
    seconds: dict[str, list[float]] = {variant: [] for variant in twins}
    taken = [batches[step % len(batches)].to(device) for step in range(steps)]
    for step, batch in enumerate(progress_bar(taken, steps, "with dropout")):
        step_all(trainers, batch, settings.learning_rate, step, step, seconds)
    tokens = [batch.tokens() for batch in taken]
    return {variant: speed_of(times, tokens) for variant, times in seconds.items()}


def speed_of(seconds: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """Tokens a second, and the quartiles of a step, after the steps that warm up; of all, if there are no more."""
    first = WARM_UP if len(seconds) > WARM_UP else 0
    seconds, tokens = seconds[first:], tokens[first:]
    quartiles = torch.quantile(torch.tensor(seconds, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75]).double())
    low, median, high = (quartiles * 1e3).tolist()
    return {
        "tokens_per_s": sum(tokens) / sum(seconds),
        "step_ms_median": median,
        "step_ms_quartile_1": low,
        "step_ms_quartile_3": high,
        "steps": len(seconds),
    }
