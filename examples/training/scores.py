"""How good trained models are beside baselines: predictions, accuracy, intersection over union, edit distance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.report.table import table
from examples.training.job import Job, Report
from examples.training.loop import Side
from examples.training.model import IGNORED, Twin
from examples.training.pictures import draw_scores, new_figure, save
from examples.training.report import subtitles

TRAINED = {"eager": "eager, trained", "fused": "fused, trained"}


@torch.no_grad()
def predictions(model: Twin, side: Side, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest class of all that is asked for on a side, and the right one; both flat."""
    was_training = model.training
    model.eval()
    found, right = [], []
    for part in side.batches(batch):
        asked = part.wanted != IGNORED
        there = part.to(device)
        found.append(model(*there.inputs).argmax(-1).cpu()[asked])
        right.append(part.wanted[asked])
    model.train(was_training)
    return torch.cat(found), torch.cat(right)


def accuracy(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found == right).double().mean())


def majority(train: torch.Tensor) -> int:
    """The class that occurs most often."""
    return int(torch.bincount(train.flatten()).argmax())


def confusion(found: torch.Tensor, right: torch.Tensor, classes: int) -> list[list[int]]:
    """Counts: a row for each right class, a column for each found one."""
    counts: list[list[int]] = torch.bincount(right * classes + found, minlength=classes**2).view(classes, -1).tolist()
    return counts


def mean_iou(counts: Sequence[Sequence[int]]) -> float:
    """Intersection over union of each class, and its mean over the classes that occur."""
    matrix = torch.tensor(counts, dtype=torch.float64)
    both, either = matrix.diag(), matrix.sum(0) + matrix.sum(1) - matrix.diag()
    return float((both / either)[either > 0].mean())


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Fewest insertions, deletions and substitutions that turn one row into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


class ScoredJob(Job):
    """A job whose models have one score each, beside those of baselines.

    The report's entry `scores` has the models under the labels of TRAINED, and the baselines under their own. Both
    models must be better than the baseline `floor`.
    """

    measure: ClassVar[str]  # the score's name
    lower_is_better: ClassVar[bool] = False
    floor: ClassVar[str]

    @classmethod
    def not_learned(cls, report: Report) -> list[str]:
        scores = report["scores"]
        sign = -1 if cls.lower_is_better else 1
        return [
            f"{cls.measure} of {label} is {scores[label]:.3f}, no better than {scores[cls.floor]:.3f} of {cls.floor}"
            for label in TRAINED.values()
            if not sign * scores[label] > sign * scores[cls.floor]  # true of NaN too
        ]

    @classmethod
    def score_table(cls, report: Report) -> str:
        return table(("", cls.measure), [(label, f"{value:.3f}") for label, value in report["scores"].items()])

    @classmethod
    def draw(cls, report: Report, folder: Path) -> dict[Path, str]:
        """Draw the scores, and beside them what the job has to show."""
        figure = new_figure()
        left, right = figure.subplots(1, 2)
        better = "lower" if cls.lower_is_better else "higher"
        draw_scores(left, report["scores"])
        left.set(xlabel=f"{cls.measure} ({better} is better)", title="All that was held out")
        cls.draw_details(right, report)
        path = folder / f"{cls.files}_scores.png"
        save(figure, f"{cls.title}: {cls.measure}", subtitles(report)[:2], path)
        return {path: cls.measure}

    @staticmethod
    @abstractmethod
    def draw_details(axes: Any, report: Report) -> None:
        """What the right half of the picture shows."""


def draw_confusion(axes: Any, counts: Sequence[Sequence[int]], names: Sequence[str], of: str) -> None:
    """The counts of `confusion`, each row as shares of its sum, written as counts."""
    matrix = torch.tensor(counts, dtype=torch.float64)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.tolist(), cmap="Blues", vmin=0, vmax=1)
    for row, line in enumerate(counts):
        for column, count in enumerate(line):
            if count:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    places = range(len(names))
    tilted = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 2 else {}
    axes.set_xticks(places, names, **tilted)
    axes.set_yticks(places, names)
    axes.set(xlabel=f"{of} that the fused model found", ylabel=f"right {of}", title="Held out: who is taken for whom")
