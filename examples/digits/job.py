"""The tasks `digits` and `segment`: a Vision Transformer that reads handwritten digits.

    PYTHONPATH=. python3 examples/train.py --task digits --small     # a CPU: under a minute
    PYTHONPATH=. python3 examples/train.py --task segment --small    # a CPU: about a minute

`digits` tells which digit an image shows. `segment` tells of each pixel of a scene which digit it belongs to, or that
it is paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from examples.digits import data
from examples.digits.data import DIGITS, PACKAGES, PAPER, Images, joined, patches
from examples.digits.model import Classifier, Segmenter
from examples.training.job import Report, Said, Size
from examples.training.loop import Curves
from examples.training.scores import (
    TRAINED,
    ScoredJob,
    accuracy,
    confusion,
    draw_confusion,
    majority,
    mean_iou,
    predictions,
)

ORIGIN = "scikit-learn's load_digits (1,797 images of 8 x 8 pixels, from the UCI repository)"
MAJORITY = "majority class"


class ImageJob(ScoredJob):
    """What both tasks share: images cut into squares."""

    packages = PACKAGES
    betas = (0.9, 0.98)
    head_width = 32
    source = "scikit-learn's digits"
    square: int  # pixels of an edge
    train: Images
    test: Images

    def load(self) -> Sequence[str]:
        self.split = data.load_split()
        return []

    def found(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return predictions(model, self.test, self.arguments.batch, self.device)


class DigitsJob(ImageJob):
    task, files = "digits", "digits"
    description = "Train a Vision Transformer on handwritten digits twice, of fusednorm and of torch.nn."
    title = "Digits with fused and eager Vision Transformers"
    unit, measure, floor = "image", "accuracy", MAJORITY
    square = 2
    context = (data.SIDE // square) ** 2
    more_sizes = {"features": square**2, "classes": DIGITS}
    sizes = {
        "epochs": Size(40, 10),
        "layers": Size(4, 2),
        "width": Size(128, 64),
        "batch": Size(64, 64),
        "dropout": Size(0.1, 0.0),
        "rate": Size(1e-3, 1e-3),
        "decay": Size(0.1, 0.1),
        "threads": Size(None, 1),
    }
    # With --small on a CPU, native kernels against eager: float32 at most 1.3e-7 (10 epochs), bfloat16 1.8e-3 (2
    # epochs). Norms whose eps is 1e-2, or a feed-forward without its first bias, move the float32 losses by more than
    # the bound by the first epoch. A test plants both in each task that has a score.
    bounds = {"float32": 1e-4, "bfloat16": 2e-2}
    model = Classifier

    def encode(self, tokenizer: Any) -> str:
        images, digits = data.with_shifts(*self.split.train)
        self.train = Images(patches(images, self.square), digits)
        self.test = Images(patches(self.split.test[0], self.square), self.split.test[1])
        return f"{len(digits):,} training images, {len(self.test.wanted):,} held out"

    def data_facts(self) -> Report:
        return {"drawn": len(self.split.train[1]), "train": len(self.train.wanted), "test": len(self.test.wanted)}

    def after(self, twins: Mapping[str, Any], reloaded: Any, tokenizer: Any, curves: Curves) -> Report:
        found, right = self.found(reloaded)
        given = self.train.given.flatten(1)
        nearest = self.train.wanted[torch.cdist(self.test.given.flatten(1), given).argmin(1)]
        return {
            "scores": {
                MAJORITY: accuracy(torch.full_like(right, majority(self.split.train[1])), right),
                "nearest training image": accuracy(nearest, right),
                TRAINED["eager"]: accuracy(*self.found(twins["eager"])),
                TRAINED["fused"]: accuracy(found, right),
            },
            "confusion": confusion(found, right, DIGITS),
        }

    @classmethod
    def say(cls, report: Report) -> Said:
        facts = report["data"]
        return Said(
            f"Images: {ORIGIN}. Training has {facts['drawn']:,}, each also moved by a pixel in four directions "
            f"({facts['train']:,}). Held out is every fifth, {facts['test']:,}.",
            [
                "The majority class is the digit that training has most often.",
                "The nearest training image is the one of least squared distance of pixels; on images this small and "
                "this well centred it is a strong baseline.",
            ],
            [],
            cls.score_table(report),
        )

    @staticmethod
    def draw_details(axes: Any, report: Report) -> None:
        draw_confusion(axes, report["confusion"], [str(digit) for digit in range(DIGITS)], "digit")


class SegmentJob(ImageJob):
    task, files = "segment", "segment"
    description = "Train a Vision Transformer to segment scenes of digits twice, of fusednorm and of torch.nn."
    title = "Segmentation with fused and eager Vision Transformers"
    unit, measure, floor = "pixel", "mean IoU", "ink found, all of it the most frequent digit"
    square, edge = 4, 2 * data.CELL
    context = (edge // square) ** 2
    more_sizes = {"features": square**2, "classes": DIGITS + 1}
    shown = 3  # scenes
    sizes = {
        "epochs": Size(30, 10),
        "layers": Size(4, 2),
        "width": Size(192, 96),
        "scenes": Size(20000, 3000, "scenes to train on; "),
        "batch": Size(64, 32),
        "dropout": Size(0.1, 0.0),
        "rate": Size(1e-3, 2e-3),
        "decay": Size(0.1, 0.05),
        "threads": Size(None, 1),
    }
    # As above: float32 at most 7.0e-8 (10 epochs), bfloat16 2.1e-4 (2 epochs).
    bounds = {"float32": 1e-4, "bfloat16": 2e-2}
    model = Segmenter

    def load(self) -> Sequence[str]:
        if self.arguments.scenes < 1:
            raise ValueError(f"scenes is {self.arguments.scenes}; it must be at least 1")
        return super().load()

    def encode(self, tokenizer: Any) -> str:
        def side(images: tuple[torch.Tensor, torch.Tensor], count: int, seed: int) -> Images:
            return Images(*(patches(part, self.square) for part in data.compose(images, count, self.edge, seed)))

        self.train = side(self.split.train, self.arguments.scenes, 2 * self.arguments.seed)
        self.test = side(self.split.test, max(1, self.arguments.scenes // 10), 2 * self.arguments.seed + 1)
        return f"{len(self.train.wanted):,} training scenes, {len(self.test.wanted):,} held out"

    def data_facts(self) -> Report:
        return {"train": len(self.train.wanted), "test": len(self.test.wanted), "edge": self.edge}

    def after(self, twins: Mapping[str, Any], reloaded: Any, tokenizer: Any, curves: Curves) -> Report:
        classes = DIGITS + 1
        found, right = self.found(reloaded)
        ink = self.train.wanted[self.train.wanted != PAPER]
        guess = torch.where(self.test.given.flatten() >= data.INK, majority(ink), PAPER)
        guesses = {"all paper": torch.full_like(right, PAPER), self.floor: guess}
        eager, _ = self.found(twins["eager"])
        counts = {name: confusion(pixels, right, classes) for name, pixels in guesses.items()}
        counts |= {
            TRAINED["eager"]: confusion(eager, right, classes),
            TRAINED["fused"]: confusion(found, right, classes),
        }
        pictures = (self.test.given, self.test.wanted, found.view_as(self.test.wanted))
        given, wanted, seen = (joined(part[: self.shown], self.square, self.edge).tolist() for part in pictures)
        return {
            "scores": {name: mean_iou(table) for name, table in counts.items()},
            "confusion": counts[TRAINED["fused"]],
            "scenes": {"given": given, "wanted": wanted, "found": seen},
        }

    @classmethod
    def say(cls, report: Report) -> Said:
        facts = report["data"]
        return Said(
            f"Scenes: {facts['train']:,} to train on, {facts['test']:,} held out, of {facts['edge']} x {facts['edge']} "
            f"pixels. Each has up to four images of {ORIGIN}, at random places that do not overlap. No image of a "
            "held-out scene stands in a training scene.",
            [
                f"A pixel's class is its digit where it is at least {data.INK:.0%} ink, else paper. Mean IoU is the "
                "intersection over union of the pixels of each of the 11 classes, averaged.",
            ],
            [],
            cls.score_table(report),
        )

    @staticmethod
    def draw_details(axes: Any, report: Report) -> None:
        """Draw a few scenes in columns: what was given, the right classes, those found."""
        from matplotlib import colormaps

        scenes = report["scenes"]
        colours = torch.tensor([*colormaps["tab10"].colors, (1.0, 1.0, 1.0)])
        given = 1 - torch.tensor(scenes["given"])[..., None].expand(-1, -1, -1, 3)
        rows = [given, *(colours[torch.tensor(scenes[name])] for name in ("wanted", "found"))]
        count, edge = given.shape[:2]
        framed = [torch.nn.functional.pad(row, (0, 0, 1, 1, 1, 1), value=0.6) for row in rows]
        axes.imshow(torch.cat([torch.cat(list(row), 1) for row in framed]).clamp(0, 1).tolist())
        places = [(edge + 2) * (place + 0.5) for place in range(3)]
        axes.set_yticks(places, ["scene", "right", "fused"])
        axes.set_xticks([])
        axes.grid(False)
        axes.set(title=f"Held-out scenes, the first {count}; a colour for each digit")
        for digit in range(DIGITS):
            axes.plot([], [], "s", color=colours[digit].tolist(), label=str(digit))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
