"""The task `classify`: an encoder that tells which package a docstring comes from.

PYTHONPATH=. python3 examples/train.py --task classify --small    # a CPU: about a minute
PYTHONPATH=. python3 examples/train.py --task classify            # a GPU: 4 layers, width 256
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from examples.docstrings import data
from examples.docstrings.data import CLASSES, PACKAGES, SPECIAL, Labelled, Text
from examples.docstrings.model import TextClassifier
from examples.training.job import Report, Said, Size
from examples.training.loop import Curves
from examples.training.scores import (
    TRAINED,
    ScoredJob,
    accuracy,
    confusion,
    draw_confusion,
    majority,
    predictions,
)

MAJORITY = "majority class"
BAG = "bag of words, logistic regression"
LONGEST = 48  # tokens


class DocstringJob(ScoredJob):
    """What the tasks on docstrings share: texts, and baselines of telling their packages."""

    packages = {**PACKAGES, "tokenizers": "tokenizers"}
    special = SPECIAL
    betas = (0.9, 0.98)
    head_width = 32
    more_sizes = {"classes": len(CLASSES)}
    context = LONGEST
    source = "docstrings of installed packages"
    measure, floor = "accuracy", MAJORITY

    def load(self) -> Sequence[str]:
        self.split = data.load_split(self.arguments.texts)
        return [text.words for text in self.split.train]

    def labelled(self, tokenizer: Any, texts: Sequence[Text]) -> Labelled:
        return Labelled(data.encode(tokenizer, texts, LONGEST), [text.place for text in texts])

    def data_facts(self) -> Report:
        return {"train": len(self.split.train), "test": len(self.split.test), "classes": list(CLASSES)}

    def found(self, model: Any, side: Labelled) -> tuple[torch.Tensor, torch.Tensor]:
        return predictions(model, side, self.arguments.batch, self.device)

    @staticmethod
    def texts_said(report: Report) -> str:
        facts = report["data"]
        return (
            f"Texts: first paragraphs of docstrings in the source of {', '.join(facts['classes'][:-1])} and "
            f"{facts['classes'][-1]}, as installed here; {facts['train']:,} to train on, {facts['test']:,} from other "
            "files held out. Names of packages are blotted out."
        )


class ClassifyJob(DocstringJob):
    task, files = "classify", "classify"
    description = "Train a classifier of docstrings twice, with the layers of fusednorm and with torch's."
    title = "Text classification with fused and eager encoders"
    unit = "text"
    sizes = {
        "epochs": Size(10, 3),
        "layers": Size(4, 2),
        "width": Size(256, 96),
        "texts": Size(10000, 1400, "of each package at most; "),
        "vocab": Size(8000, 4000),
        "batch": Size(64, 64),
        "dropout": Size(0.1, 0.0),
        "rate": Size(1e-3, 1e-3),
        "decay": Size(0.1, 0.1),
        "threads": Size(None, 1),
    }
    # With --small on a CPU, native kernels against eager: float32 at most 4.6e-8, bfloat16 9.2e-5 (2 epochs).
    bounds = {"float32": 1e-4, "bfloat16": 2e-2}
    model = TextClassifier
    train: Labelled
    test: Labelled

    def encode(self, tokenizer: Any) -> str:
        self.train, self.test = (self.labelled(tokenizer, side) for side in (self.split.train, self.split.test))
        return f"{len(self.split.train):,} training texts, {len(self.split.test):,} held out"

    def after(self, twins: Mapping[str, Any], reloaded: Any, tokenizer: Any, curves: Curves) -> Report:
        found, right = self.found(reloaded, self.test)
        return {
            "scores": {
                **baselines(self.split.train, self.split.test),
                TRAINED["eager"]: accuracy(*self.found(twins["eager"], self.test)),
                TRAINED["fused"]: accuracy(found, right),
            },
            "confusion": confusion(found, right, len(CLASSES)),
        }

    @classmethod
    def say(cls, report: Report) -> Said:
        lines = [
            "The bag of words is scikit-learn's TfidfVectorizer before its LogisticRegression, both as they come. It "
            "counts words, whatever their order, and is hard to beat with so few texts.",
        ]
        return Said(cls.texts_said(report), lines, [], cls.score_table(report))

    @staticmethod
    def draw_details(axes: Any, report: Report) -> None:
        draw_confusion(axes, report["confusion"], CLASSES, "package")


def baselines(train: Sequence[Text], test: Sequence[Text]) -> dict[str, float]:
    """Accuracies of the class that occurs most, and of a bag of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    known, right = (torch.tensor([text.place for text in side]) for side in (train, test))
    counts = TfidfVectorizer()
    model = LogisticRegression(max_iter=1000)
    model.fit(counts.fit_transform([text.words for text in train]), known.numpy())
    found = torch.from_numpy(model.predict(counts.transform([text.words for text in test])))
    return {
        MAJORITY: accuracy(torch.full_like(right, majority(known)), right),
        BAG: accuracy(found, right),
    }
