"""The training jobs with models and data small enough to train in a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from examples.digits.data import Images
from examples.digits.job import DigitsJob, SegmentJob
from examples.docstrings.data import Labelled, Masked
from examples.docstrings.job import ClassifyJob
from examples.docstrings.pretraining import MaskedJob
from examples.language_model.data import Rows
from examples.language_model.job import LanguageModelJob
from examples.speech.data import Speech, Utterance
from examples.speech.job import SpeechJob
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
    """A job and a side of random examples."""

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


def texts_of(count: int) -> list[list[int]]:
    return [source for source, _ in pairs_of(count)]


def numbers(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(11))


def classes(limit: int, *shape: int) -> torch.Tensor:
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(12))


def spoken(count: int) -> Speech:
    """Noise of 10 to 13 positions, in which 1 to 3 digits are said."""
    rows = [(numbers(10 + i % 4, 5) + i / count, classes(4, 1 + i % 3) + i % 3) for i in range(count)]
    return Speech([Utterance(features, digits.tolist(), f"s{i % 2}") for i, (features, digits) in enumerate(rows)])


SMALL = {"layers": 2, "width": 32, "heads": 2}
CLASSIFY = Case(
    ClassifyJob,
    ModelConfig(vocab=61, context=14, classes=5, **SMALL),
    lambda count: Labelled(texts_of(count), classes(5, count).tolist()),
)
MASKED = Case(MaskedJob, ModelConfig(vocab=61, context=14, **SMALL), lambda count: Masked(texts_of(count), 61))
DIGITS = Case(
    DigitsJob,
    ModelConfig(context=9, features=4, classes=10, **SMALL),
    lambda count: Images(numbers(count, 9, 4), classes(10, count)),
)
SEGMENT = Case(
    SegmentJob,
    ModelConfig(context=9, features=4, classes=11, **SMALL),
    lambda count: Images(numbers(count, 9, 4), classes(11, count, 9, 4)),
)
SPEECH = Case(SpeechJob, ModelConfig(context=13, features=5, classes=6, **SMALL), spoken)
GENERATORS = [LANGUAGE_MODEL, TRANSLATION]
CASES = [*GENERATORS, CLASSIFY, MASKED, DIGITS, SEGMENT, SPEECH]


@pytest.fixture(params=CASES, ids=lambda case: case.job.task)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=GENERATORS, ids=lambda case: case.job.task)
def generator(request: pytest.FixtureRequest) -> Case:
    """Jobs whose model gives each position's next token."""
    return request.param


@pytest.fixture(params=[case for case in CASES if case is not MASKED], ids=lambda case: case.job.task)
def told(request: pytest.FixtureRequest) -> Case:
    """Jobs whose every epoch asks for the same."""
    return request.param


@pytest.fixture
def translation() -> Case:
    return TRANSLATION
