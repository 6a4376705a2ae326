"""Images of handwritten digits, and scenes composed of several, from scikit-learn's `load_digits`.

They are 1,797 images of 8 x 8 pixels, the test set of the UCI repository's "Optical Recognition of Handwritten Digits"
(E. Alpaydin, C. Kaynak, 1998). They come with the package; nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from examples.training.model import Batch

PACKAGES = {"sklearn": "scikit-learn"}
DIGITS = 10
PAPER = DIGITS  # the class of a pixel without ink
SIDE = 8  # pixels of an image
INK = 0.25  # a pixel is ink from here on; 0 is paper, 1 the darkest ink
TEST_EVERY = 5


@dataclass(frozen=True)
class Split:
    """Images (n, 8, 8) in [0, 1] and their digits (n)."""

    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]


def shifted(images: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Images moved by so many pixels; paper comes in at the other edge."""
    height, width = images.shape[1:]
    framed = F.pad(images, (1, 1, 1, 1))
    return framed[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width]


def with_shifts(images: torch.Tensor, digits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The images as they are, and moved by one pixel up, down, left and right."""
    moves = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
    return torch.cat([shifted(images, *move) for move in moves]), digits.repeat(len(moves))


def load_split() -> Split:
    """Give every fifth image to the test side. The order of the file is that in which people wrote."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32)
    classes = torch.tensor(digits.target, dtype=torch.int64)
    held_out = torch.arange(len(classes)) % TEST_EVERY == TEST_EVERY - 1
    return Split((images[~held_out], classes[~held_out]), (images[held_out], classes[held_out]))


def patches(images: torch.Tensor, side: int) -> torch.Tensor:
    """Cut images (n, height, width) into squares: (n, squares, side * side), row by row."""
    count, height, width = images.shape
    cut = images.reshape(count, height // side, side, width // side, side).transpose(2, 3)
    return cut.reshape(count, -1, side * side)


def joined(cut: torch.Tensor, side: int, width: int) -> torch.Tensor:
    """Undo `patches`, for images of this width."""
    count, squares, _ = cut.shape
    across = width // side
    rows = cut.reshape(count, squares // across, across, side, side).transpose(2, 3)
    return rows.reshape(count, -1, width)


def compose(side: tuple[torch.Tensor, torch.Tensor], count: int, edge: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Draw scenes (count, edge, edge) of digits that do not overlap, and the class of each pixel.

    Each digit of the scene stands anywhere in a cell of its own; every fifth cell is empty.
    """
    images, digits = side
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    scenes = torch.zeros(count, edge, edge)
    classes = torch.full((count, edge, edge), PAPER)
    cells = edge // CELL
    for scene in range(count):
        for cell in range(cells * cells):
            which, empty = draw(len(digits)), draw(5) == 0
            top = cell // cells * CELL + draw(CELL - SIDE + 1)
            left = cell % cells * CELL + draw(CELL - SIDE + 1)
            if not empty:
                place = (scene, slice(top, top + SIDE), slice(left, left + SIDE))
                scenes[place] = images[which]
                classes[place] = torch.where(images[which] >= INK, digits[which], PAPER)
    return scenes, classes


CELL = 10  # pixels of the square in which a digit of a scene stands


@dataclass(frozen=True)
class Images:
    """What a model is given (n, squares, pixels) and what it should tell: (n) or (n, squares, pixels)."""

    given: torch.Tensor
    wanted: torch.Tensor

    def batches(self, size: int, seed: int | None = None) -> list[Batch]:
        order = torch.arange(len(self.given))
        if seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))
        return [Batch((self.given[chosen],), self.wanted[chosen]) for chosen in order.split(size)]
