"""The two training jobs with models and data small enough to train in a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from examples.language_model.data import Rows
from examples.language_model.job import LanguageModelJob
from examples.training.job import Job
from examples.training.loop import Settings, Side
from examples.training.machine import threads
from examples.training.model import Batch, ModelConfig, Twin, make_twins
from examples.translation.data import BEGIN_ID, END_ID, Encoded, Sentences
from examples.translation.job import TranslationJob


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads and lose much where other work runs beside them."""
    with threads(1):
        yield


@dataclass(frozen=True)
class Case:
    """A job and a side of random tokens."""

    job: type[Job]
    config: ModelConfig
    side: Callable[[int], Side]
    device = torch.device("cpu")
    settings = Settings(epochs=2, batch=4, learning_rate=5e-3, decay=0.1, seed=3)

    def twins(self, config: ModelConfig | None = None) -> dict[str, Twin]:
        return make_twins(self.job.model, config or self.config, 5, self.device)

    def batch(self, count: int) -> Batch:
        (batch,) = self.side(count).batches(count)
        return batch


def pairs_of(count: int, longest: int = 11) -> Encoded:
    """Pairs of random tokens, sources and targets of 1 to `longest` tokens beside the marks."""
    generator = torch.Generator().manual_seed(11)

    def tokens() -> list[int]:
        size = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(3, 61, (size,), generator=generator).tolist()

    return [([*tokens(), END_ID], [BEGIN_ID, *tokens(), END_ID]) for _ in range(count)]


@pytest.fixture
def drawn() -> Callable[..., Encoded]:
    return pairs_of


LANGUAGE_MODEL = Case(
    LanguageModelJob,
    ModelConfig(vocab=97, context=12, layers=2, width=32, heads=2),
    lambda count: Rows(torch.randint(97, (count, 13), generator=torch.Generator().manual_seed(11))),
)
TRANSLATION = Case(
    TranslationJob,
    ModelConfig(vocab=61, context=14, layers=2, width=32, heads=2),
    lambda count: Sentences(pairs_of(count)),
)


@pytest.fixture(params=[LANGUAGE_MODEL, TRANSLATION], ids=lambda case: case.job.task)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def translation() -> Case:
    return TRANSLATION
