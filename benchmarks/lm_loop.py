"""Train both variants side by side, measure their speed and their memory."""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks import lm_data
from benchmarks.lm_model import LanguageModel, ModelConfig, loss_of, make_twins, use_torch_dropout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


@contextmanager
def deterministic() -> Iterator[None]:
    """Only deterministic kernels, without the debugging aid that fills new tensors (it would be timed too)."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Parameters stay in float32; with bfloat16 the operators run under torch's autocast."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, dtype=DTYPES[dtype])


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


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


class Trainer:
    """One variant with its Adam state."""

    def __init__(self, model: LanguageModel, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))

    def step(self, rows: torch.Tensor, rate: float, seed: int) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        with autocast(rows.device, self.settings.dtype):
            loss = loss_of(self.model, rows, seed)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def progress_bar(items: Iterable[Any], total: int, label: str) -> Any:
    """tqdm where it is installed and stderr is a terminal; otherwise the bare iterable."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc=label, unit="step", leave=False, disable=not sys.stderr.isatty())


def train_twins(
    twins: dict[str, LanguageModel],
    train: torch.Tensor,
    test: torch.Tensor,
    settings: Settings,
    say: Callable[[str], None] = print,
) -> dict[str, Curve]:
    """Train every variant on the same batches in the same order with the same dropout seeds."""
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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_speed(
    twins: dict[str, LanguageModel], rows: torch.Tensor, settings: Settings, pairs: int = 15, warm_up: int = 3
) -> dict[str, dict[str, float]]:
    """Time whole training steps of copies of the twins.

    The variants alternate step by step, and who goes first alternates too, so that a drift of the machine hits both.
    The eager copy draws dropout as torch's users do, not through the masks that make the curves comparable.
    """
    trainers = {variant: Trainer(copy.deepcopy(model), settings) for variant, model in twins.items()}
    for trainer in trainers.values():
        use_torch_dropout(trainer.model)
    seconds: dict[str, list[float]] = {variant: [] for variant in twins}
    for pair in range(-warm_up, pairs):
        for variant in list(trainers) if pair % 2 else list(reversed(trainers)):
            synchronize(rows.device)
            start = time.perf_counter()
            trainers[variant].step(rows, settings.learning_rate / 10, pair + warm_up)
            synchronize(rows.device)
            if pair >= 0:
                seconds[variant].append(time.perf_counter() - start)
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    result = {}
    for variant, times in seconds.items():
        quartiles = torch.quantile(torch.tensor(times, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75]).double())
        low, median, high = quartiles.tolist()
        result[variant] = {
            "tokens_per_s": tokens / median,
            "step_ms_median": median * 1e3,
            "step_ms_quartile_1": low * 1e3,
            "step_ms_quartile_3": high * 1e3,
            "steps": len(times),
        }
    return result


def saved_bytes(model: LanguageModel, rows: torch.Tensor, dtype: str) -> int:
    """Bytes that one forward keeps for its backward: distinct storages, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(rows.device, dtype):
        loss = loss_of(model, rows, 0)
    total = sum(kept.values())
    del loss
    return total


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
    from torch.profiler import ProfilerActivity, profile

    # acc_events: without it torch warns that events of earlier cycles are dropped; there is one cycle.
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(records, key=lambda record: record.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure_memory(variant: str, config: ModelConfig, settings: Settings, device: torch.device) -> dict[str, int]:
    """Memory of one variant alone: the peak from building it through three training steps, and what a forward keeps."""
    generator = torch.Generator().manual_seed(settings.seed)
    rows = torch.randint(config.vocab, (settings.batch, config.context + 1), generator=generator).to(device)

    def train() -> None:
        model = make_twins(config, settings.seed, device, (variant,))[variant]
        use_torch_dropout(model)
        trainer = Trainer(model, settings)
        for step in range(3):
            trainer.step(rows, settings.learning_rate, step)

    peak = allocated_peak(train, device)
    model = make_twins(config, settings.seed, device, (variant,))[variant]
    use_torch_dropout(model)
    return {"peak_bytes": peak, "saved_bytes": saved_bytes(model, rows, settings.dtype)}
