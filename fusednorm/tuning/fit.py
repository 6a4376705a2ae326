"""From speeds at measured shapes to the steps that automatic choice goes by.

A line is the shortest list of steps that loses at most 5 % at each measured shape, or else the one that exceeds 5 %
least. A step begins at the geometric mean of two measured sizes. At most two widths have steps: all rows, or narrow and
wide ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

from ..dispatch import PROVIDERS
from ..dispatch.crossovers import Step

Shapes = Mapping[tuple[int, int], Mapping[str, float]]  # eager's time over that of each provider, by rows and columns
TOLERATED = 0.05  # what a provider may lose for the sake of fewer steps
REFUSED = 100.0  # the loss where a provider was not measured
LOSS = 0.98  # torch's own operators are taken only where they are clearly faster


class Line(NamedTuple):
    cost: tuple[int, int, int]  # losses beyond TOLERATED, in 1/10000; the number of steps; all losses
    steps: list[Step]

    def then(self, other: Line) -> Line:
        (a, b, c), (d, e, f) = self.cost, other.cost
        return Line((a + d, b + e, c + f), [*self.steps, *other.steps])


def cost(line: Line) -> tuple[int, int, int]:
    return line.cost


def loss(speed: Mapping[str, float], provider: str) -> float:
    """0.06 where a provider takes 1.06 times as long as the fastest."""
    return max(speed.values()) / speed[provider] - 1 if provider in speed else REFUSED


def fit(shapes: Shapes) -> list[Step]:
    """The cheapest line: one for all rows, or one for narrow and wide rows apart."""
    lines = [fit_width(shapes, 1)]
    for below, width in pairwise(sorted({columns for _, columns in shapes})):
        narrow = {shape: speed for shape, speed in shapes.items() if shape[1] < width}
        wide = {shape: speed for shape, speed in shapes.items() if shape[1] >= width}
        lines.append(fit_width(narrow, 1).then(fit_width(wide, halfway(below, width))))
    return min(lines, key=cost).steps


def fit_width(shapes: Shapes, columns: int) -> Line:
    """The cheapest steps. From the smallest size on, it extends the cheapest that end in each provider."""
    sizes = sorted({rows * columns for rows, columns in shapes})
    known = dict.fromkeys(name for speed in shapes.values() for name in speed)
    names = sorted(known, key=lambda name: (*PROVIDERS,).index(name.partition("/")[0]))
    ends = {"": Line((0, 0, 0), [])}
    for below, size in zip([0, *sizes], sizes):
        before, ends = ends, {}
        for name in names:
            losses = [loss(speed, name) for (r, c), speed in shapes.items() if r * c == size]
            beyond = sum(round(1e4 * max(0.0, value - TOLERATED)) for value in losses)
            # torch's own operators only where they clearly are faster
            every = sum(round(1e4 * (value + (1 / LOSS - 1 if name == "torch" else 0.0))) for value in losses)
            same = Line((beyond, 0, every), [])
            step = Line((beyond, 1, every), [Step(columns, halfway(below, size), name)])
            ends[name] = min((line.then(same if name == last else step) for last, line in before.items()), key=cost)
    return min(ends.values(), key=cost)


def halfway(below: int, size: int) -> int:
    """The geometric mean of two measured sizes; 1 below the smallest."""
    return max(1, round(math.sqrt(below * size)))
