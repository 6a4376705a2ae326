"""The tasks digits and segment: images, scenes, squares."""

from __future__ import annotations

import pytest
import torch

from examples.digits import data
from examples.digits.data import CELL, INK, PAPER, SIDE


@pytest.fixture(scope="module")
def split() -> data.Split:
    pytest.importorskip("sklearn", reason="scikit-learn is missing; the extra examples brings it: '.[examples]'")
    return data.load_split()


def test_every_image_is_on_one_side(split):
    counts = [len(classes) for _, classes in (split.train, split.test)]
    assert sum(counts) == 1797 and counts[1] == 1797 // 5
    images = [{tuple(image.flatten().tolist()) for image in part} for part, _ in (split.train, split.test)]
    assert not images[0] & images[1]
    for part, classes in (split.train, split.test):
        assert part.shape[1:] == (SIDE, SIDE) and part.min() == 0 and part.max() == 1
        assert set(classes.tolist()) == set(range(10))


def test_squares_are_cut_row_by_row_and_joined_again():
    images = torch.arange(2 * 4 * 6).view(2, 4, 6)
    cut = data.patches(images, 2)
    assert cut.shape == (2, 6, 4) and cut[0, 1].tolist() == [2, 3, 8, 9]
    assert torch.equal(data.joined(cut, 2, 6), images)


def test_shifts_move_by_a_pixel_and_bring_in_paper():
    image = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert data.shifted(image, 1, 0)[0].tolist() == [[0, 0], [1, 2]]
    assert data.shifted(image, 0, -1)[0].tolist() == [[2, 0], [4, 0]]
    shifted, digits = data.with_shifts(image, torch.tensor([7]))
    assert len(shifted) == 5 and torch.equal(shifted[0], image[0]) and digits.tolist() == [7] * 5


def test_scene_has_digits_that_do_not_overlap_and_the_class_of_each_pixel():
    images, digits = torch.rand(4, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 1, 4, 5])
    scenes, classes = data.compose((images, digits), 40, 2 * CELL, 5)
    assert torch.equal(classes != PAPER, scenes >= INK)
    assert set(classes.flatten().tolist()) == {1, 3, 4, 5, PAPER}
    filled = 0
    for scene, tells in zip(scenes, classes):
        for top in (0, CELL):
            for left in (0, CELL):
                cell = scene[top : top + CELL, left : left + CELL]
                found = set(tells[top : top + CELL, left : left + CELL].flatten().tolist()) - {PAPER}
                assert len(found) <= 1 and bool(found) is bool(cell.any())
                if found:  # the whole image stands in the cell, pixel for pixel
                    image = images[digits.tolist().index(found.pop())]
                    assert any(
                        torch.equal(cell[y : y + SIDE, x : x + SIDE], image)
                        for y in range(CELL - SIDE + 1)
                        for x in range(CELL - SIDE + 1)
                    )
                    filled += 1
    assert 0.6 < filled / 160 < 0.95  # a fifth of the cells is empty
    assert torch.equal(scenes, data.compose((images, digits), 40, 2 * CELL, 5)[0])
    assert not torch.equal(scenes, data.compose((images, digits), 40, 2 * CELL, 6)[0])
