"""Tiny runs of the training jobs: their options, and a little of their real data."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import train
from examples.digits import data as digits
from examples.docstrings import data as docstrings
from examples.language_model.data import load_documents, split_documents
from examples.training.scores import ScoredJob
from examples.translation import job as translation
from examples.translation.data import load_pairs

COMMON = {"epochs": 1, "layers": 1, "width": 32, "batch": 16, "dropout": 0.0}
SIZES = {
    "lm": COMMON | {"vocab": 300, "context": 64},
    "translate": COMMON | {"vocab": 400, "length": 40},
    "classify": COMMON | {"vocab": 400, "texts": 150, "rate": 0.01},
    "mlm": COMMON | {"vocab": 400, "texts": 40, "labels": 40, "tuning": 1},
    "digits": COMMON,
    "segment": COMMON | {"scenes": 64},
    "speech": COMMON | {"utterances": 64},
}
WITH_TEXT = [task for task, sizes in SIZES.items() if "vocab" in sizes]
SCORED = [task for task, job in train.TASKS.items() if issubclass(job, ScoredJob)]


def tiny(task: str) -> list[str]:
    sizes = (word for name, size in SIZES[task].items() for word in (f"--{name}", str(size)))
    return ["--task", task, "--small", "--device", "cpu", *sizes]


pairs = functools.cache(load_pairs)
texts = functools.cache(docstrings.load_split)


@contextlib.contextmanager
def little_data(task: str, folder: Path, share: int = 16) -> Iterator[list[str]]:
    """The arguments of a tiny run; a little of the real data, of the pairs one in `share`."""
    for module in train.TASKS[task].packages:
        pytest.importorskip(module, reason=f"{module} is missing; the extra dev brings it: '.[dev]'")
    (folder / "a text.txt").write_text("".join(split_documents(*load_documents()).train[:3]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translation, "load_pairs", lambda: pairs()[::share])
        patch.setattr(docstrings, "load_split", texts)
        patch.setattr(digits, "with_shifts", lambda images, classes: (images[::4], classes[::4]))
        yield [*tiny(task), *(["--text", str(folder / "a text.txt")] if task == "lm" else [])]
