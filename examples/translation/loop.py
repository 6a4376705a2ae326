"""Train both variants side by side on the same batches, time their steps, measure their memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from examples.training.shared import allocated_peak, autocast, progress_bar, rate_at, saved_bytes, synchronize
from examples.translation.data import PAD_ID, Batch, Encoded, batch_of, buckets
from examples.translation.model import ModelConfig, Translator, loss_of, make_twins

Curves = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Settings:
    epochs: int
    batch: int
    learning_rate: float
    decay: float = 0.0
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


def predicted(batch: Batch) -> int:
    """How many tokens a batch asks for."""
    return int((batch.target[:, 1:] != PAD_ID).sum())


@torch.no_grad()
def evaluate(model: nn.Module, encoded: Encoded, settings: Settings, device: torch.device) -> float:
    """Mean loss (nats a token) over all pairs, dropout off."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    with autocast(device, settings.dtype):
        for chosen in buckets(encoded, settings.batch):
            batch = batch_of(encoded, chosen).to(device)
            count = predicted(batch)
            total += float(loss_of(model, batch)) * count
            tokens += count
    model.train(was_training)
    return total / tokens


class Trainer:
    """One variant with its AdamW state."""

    def __init__(self, model: Translator, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.decay, fused=True
        )

    def step(self, batch: Batch, rate: float, seed: int) -> float:
        """`seed` fixes what dropout draws, whichever variant draws first."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed)
        self.model.train()
        with autocast(batch.source.device, self.settings.dtype):
            loss = loss_of(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())


def train_twins(
    twins: dict[str, Translator],
    train: Encoded,
    test: Encoded,
    settings: Settings,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> tuple[Curves, dict[str, dict[str, float]]]:
    """Train every variant on the same batches in the same order; return their losses and the speed of their steps.

    Losses are nats a token: `train` per epoch, `test` before training and after each epoch, `steps` per step. The
    variants alternate step by step, and who goes first alternates too, so that a drift of the machine hits both.
    """
    trainers = {variant: Trainer(model, settings) for variant, model in twins.items()}
    curves: Curves = {variant: {"train": [], "test": [], "steps": []} for variant in twins}
    seconds: dict[str, list[float]] = {variant: [] for variant in twins}
    for variant, model in twins.items():
        curves[variant]["test"].append(evaluate(model, test, settings, device))
    per_epoch, step, trained = math.ceil(len(train) / settings.batch), 0, 0
    for epoch in range(settings.epochs):
        batches = buckets(train, settings.batch, settings.seed * 1_000_003 + epoch)
        bar = progress_bar(batches, per_epoch, f"epoch {epoch + 1}/{settings.epochs}")
        sums, tokens = dict.fromkeys(twins, 0.0), 0
        for chosen in bar:
            rate = rate_at(step, settings.epochs * per_epoch, settings.learning_rate)
            batch = batch_of(train, chosen).to(device)
            count = predicted(batch)
            tokens += count
            for variant in list(twins) if step % 2 else list(reversed(twins)):
                synchronize(device)
                start = time.perf_counter()
                loss = trainers[variant].step(batch, rate, settings.seed * 1_000_003 + step)
                synchronize(device)
                seconds[variant].append(time.perf_counter() - start)
                curves[variant]["steps"].append(loss)
                sums[variant] += loss * count
            step += 1
            if hasattr(bar, "set_postfix"):
                bar.set_postfix({v: f"{curves[v]['steps'][-1]:.4f}" for v in twins}, refresh=False)
        trained += tokens
        for variant, model in twins.items():
            curves[variant]["train"].append(sums[variant] / tokens)
            curves[variant]["test"].append(evaluate(model, test, settings, device))
        say(
            f"epoch {epoch + 1:2d}/{settings.epochs}   "
            + "   ".join(f"{v}: train {c['train'][-1]:.5f}, test {c['test'][-1]:.5f}" for v, c in curves.items())
        )
    return curves, {variant: speed_of(times, trained) for variant, times in seconds.items()}


def speed_of(times: list[float], tokens: int) -> dict[str, float]:
    quartiles = torch.quantile(torch.tensor(times, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75]).double())
    low, median, high = (quartiles * 1e3).tolist()
    return {
        "tokens_per_s": tokens / sum(times),
        "step_ms_median": median,
        "step_ms_quartile_1": low,
        "step_ms_quartile_3": high,
        "steps": len(times),
    }


def measure_memory(
    variant: str, config: ModelConfig, settings: Settings, batch: Batch, device: torch.device
) -> dict[str, Any]:
    """Memory of one variant alone: the peak from building it through three training steps, and what a forward keeps."""

    def train() -> None:
        trainer = Trainer(make_twins(config, settings.seed, device, (variant,))[variant], settings)
        for step in range(3):
            trainer.step(batch, settings.learning_rate, step)

    peak = allocated_peak(train, device)
    model = make_twins(config, settings.seed, device, (variant,))[variant].train()

    def forward() -> torch.Tensor:
        with autocast(device, settings.dtype):
            return loss_of(model, batch)

    return {"peak_bytes": peak, "saved_bytes": saved_bytes(model, forward)}
