"""Train both variants side by side, measure their speed and their memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from examples.language_model import data as lm_data
from examples.language_model.model import LanguageModel, ModelConfig, loss_of, make_twins
from examples.training.shared import allocated_peak, autocast, progress_bar, rate_at, saved_bytes, time_steps


@dataclass(frozen=True)
class Settings:
    epochs: int
    batch: int
    learning_rate: float
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"rate is {self.learning_rate}; it must be positive and finite")


@dataclass
class Curve:
    """Losses in nats a token: `train` per epoch, `test` before training and after each epoch, `steps` per step."""

    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


@torch.no_grad()
def evaluate(model: nn.Module, rows: torch.Tensor, batch: int, dtype: str) -> float:
    """Mean loss over all rows, dropout off."""
    was_training = model.training
    model.eval()
    total = 0.0
    with autocast(rows.device, dtype):
        for part in rows.split(batch):
            total += float(loss_of(model, part)) * len(part)
    model.train(was_training)
    return total / len(rows)


class Trainer:
    """One variant with its Adam state."""

    def __init__(self, model: LanguageModel, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))

    def step(self, rows: torch.Tensor, rate: float, seed: int) -> torch.Tensor:
        """`seed` fixes what dropout draws, whichever variant draws first."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed)
        self.model.train()
        with autocast(rows.device, self.settings.dtype):
            loss = loss_of(self.model, rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def train_twins(
    twins: dict[str, LanguageModel],
    train: torch.Tensor,
    test: torch.Tensor,
    settings: Settings,
    say: Callable[[str], None] = print,
) -> dict[str, Curve]:
    """Train every variant on the same batches in the same order."""
    trainers = {variant: Trainer(model, settings) for variant, model in twins.items()}
    curves = {variant: Curve() for variant in twins}
    for variant, model in twins.items():
        curves[variant].test.append(evaluate(model, test, settings.batch, settings.dtype))
    per_epoch = math.ceil(len(train) / settings.batch)
    for epoch in range(settings.epochs):
        order = lm_data.epoch_order(len(train), settings.seed, epoch)
        bar = progress_bar(order.split(settings.batch), per_epoch, f"epoch {epoch + 1}/{settings.epochs}")
        sums = dict.fromkeys(twins, 0.0)
        for index, chosen in enumerate(bar):
            step = epoch * per_epoch + index
            rate = rate_at(step, settings.epochs * per_epoch, settings.learning_rate)
            rows = train[chosen.to(train.device)]
            for variant, trainer in trainers.items():
                loss = float(trainer.step(rows, rate, settings.seed * 1_000_003 + step))
                curves[variant].steps.append(loss)
                sums[variant] += loss * len(rows)
            if hasattr(bar, "set_postfix"):
                bar.set_postfix({variant: f"{curves[variant].steps[-1]:.4f}" for variant in twins}, refresh=False)
        for variant, model in twins.items():
            curves[variant].train.append(sums[variant] / len(train))
            curves[variant].test.append(evaluate(model, test, settings.batch, settings.dtype))
        say(
            f"epoch {epoch + 1:2d}/{settings.epochs}   "
            + "   ".join(f"{v}: train {c.train[-1]:.5f}, test {c.test[-1]:.5f}" for v, c in curves.items())
        )
    return curves


def measure_speed(
    twins: dict[str, LanguageModel], rows: torch.Tensor, settings: Settings, pairs: int = 15, warm_up: int = 3
) -> dict[str, dict[str, float]]:
    """Time whole training steps of copies of the twins, in turn."""
    trainers = {variant: Trainer(copy.deepcopy(model), settings) for variant, model in twins.items()}
    steps = {v: partial(t.step, rows, settings.learning_rate / 10) for v, t in trainers.items()}
    return time_steps(steps, rows.shape[0] * (rows.shape[1] - 1), rows.device, pairs, warm_up)


def measure_memory(variant: str, config: ModelConfig, settings: Settings, device: torch.device) -> dict[str, int]:
    """Memory of one variant alone: the peak from building it through three training steps, and what a forward keeps."""
    generator = torch.Generator().manual_seed(settings.seed)
    rows = torch.randint(config.vocab, (settings.batch, config.context + 1), generator=generator).to(device)

    def train() -> None:
        trainer = Trainer(make_twins(config, settings.seed, device, (variant,))[variant], settings)
        for step in range(3):
            trainer.step(rows, settings.learning_rate, step)

    peak = allocated_peak(train, device)
    model = make_twins(config, settings.seed, device, (variant,))[variant].train()

    def forward() -> torch.Tensor:
        with autocast(device, settings.dtype):
            return loss_of(model, rows)

    return {"peak_bytes": peak, "saved_bytes": saved_bytes(model, forward)}
