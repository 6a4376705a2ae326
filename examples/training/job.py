"""What a training job has to say for itself; all else, every job shares (run.py, loop.py, report.py)."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from examples.training.loop import Curves, Settings, Side
from examples.training.model import ModelConfig, Twin

Report = dict[str, Any]


class Size(NamedTuple):
    """An option whose default depends on --small. None is torch's choice."""

    full: int | float | None
    small: int | float | None
    meaning: str = ""


class Said(NamedTuple):
    """What a job adds to the report, in its places."""

    data: str
    quality: list[str]
    examples: list[str]  # lines that end the report: what the trained model gives
    scores: str = ""  # a table after those of the losses


class Job(ABC):
    """Data, a model, and what the model's quality is measured by."""

    task: ClassVar[str]  # what --task names it by
    files: ClassVar[str]  # what the names of its files begin with
    description: ClassVar[str]
    title: ClassVar[str]
    packages: ClassVar[Mapping[str, str]]  # what it cannot do without: modules, and what pip calls their packages
    special: ClassVar[tuple[str, ...] | None] = None  # tokens that no text is cut into; None: there is no text
    unit: ClassVar[str] = "token"  # what the losses are means over
    betas: ClassVar[tuple[float, float]]  # of AdamW
    head_width: ClassVar[int]
    sizes: ClassVar[Mapping[str, Size]]
    # Largest allowed difference of the two variants' losses, nats a unit, at any epoch, without dropout. The variants
    # compute one function and differ in where and in which order they round. Training amplifies that as it would any
    # change of the last bit, so a bound is measured, not derived.
    bounds: ClassVar[Mapping[str, float]]
    model: ClassVar[type[Twin]]

    source: str  # of the data; load() sets it
    context: int  # positions of the model; known after encode() at the latest, a guess before it
    more_sizes: ClassVar[Mapping[str, int]] = {}  # of the model, that no option sets
    train: Side  # encode() sets these
    test: Side

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Options of this job alone."""

    @abstractmethod
    def load(self) -> Sequence[str]:
        """Read and split the data; return the texts that a tokenizer is trained on, if any."""

    @abstractmethod
    def encode(self, tokenizer: Any) -> str:
        """Make the sides, with texts cut into tokens; say how much there is to train on."""

    @abstractmethod
    def data_facts(self) -> Report:
        """What the report says of the data."""

    def before(self, twins: Mapping[str, Any]) -> None:
        """What is measured before training."""

    @abstractmethod
    def after(self, twins: Mapping[str, Any], reloaded: Any, tokenizer: Any, curves: Curves) -> Report:
        """What is measured after training; the fused model was reloaded from its checkpoint."""

    @staticmethod
    @abstractmethod
    def say(report: Report) -> Said:
        """What the report says of the job's own."""

    @staticmethod
    def draw(report: Report, folder: Path) -> dict[Path, str]:
        """Pictures beside the curves, each with its caption."""
        return {}

    def is_held(self) -> bool:
        """Whether the run is long enough for its model to be held to what it should have learned."""
        return bool(self.arguments.epochs >= (self.sizes["epochs"].small or 0))

    @staticmethod
    def not_learned(report: Report) -> list[str]:
        """What the models should have learned and have not, in words."""
        return []

    def config(self, vocab: int | None) -> ModelConfig:
        sizes = {name: getattr(self.arguments, name) for name in ("layers", "width", "dropout")}
        heads = max(1, self.arguments.width // self.head_width)
        return ModelConfig(vocab=vocab, heads=heads, context=self.context, **sizes, **self.more_sizes)

    def settings(self) -> Settings:
        given = {name: getattr(self.arguments, name) for name in ("epochs", "batch", "decay", "seed", "dtype")}
        return Settings(learning_rate=self.arguments.rate, betas=self.betas, **given)
