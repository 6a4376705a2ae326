"""The cases that a GPU's targets are about (`targets.py`), in the order in which they are worth its minutes.

Large tensors stand first, then every shape of the plain norms. By estimate a case takes a quarter of a second, each
library beside eager half as much more, and one that torch compiles half a minute: four to five minutes for the 520 of
them. A CPU's targets are about its default sweep.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.cases import FULL, TINY, Case
from benchmarks.publish.targets import NORMS, PEERS

LARGE = 1 << 25  # elements: 64 MiB in bfloat16
WIDTHS = tuple(1 << n for n in range(10, 16))
WIDER = (1 << 16, 1 << 17, 1 << 18)
ATTENTION = ((4, 16, 2048, 64), (4, 16, 2048, 128), (8, 16, 512, 64))
STEP = (4, 2048, 1024)
MOST = 1 << 28  # elements of a plain norm
_BOTH = ("forward", "both")

_COMPILED = ("compile", "compile-max-autotune")
# what a target compares the operation with besides eager; to compile costs tens of seconds a case
COMPARED = {
    "bias_dropout_add_layer_norm": _COMPILED,
    "encoder_layer": _COMPILED,
    **dict.fromkeys(("attention", "attention_causal"), ("sdpa-flash", "sdpa-cudnn")),
    **dict.fromkeys(NORMS, PEERS),
}


def compares(case: Case, baseline: str) -> bool:
    return baseline == "eager" or baseline in COMPARED.get(case.op, ())


def _cases(op: str, shapes: Iterable[tuple[int, ...]], *directions: str, dtype: str = "bfloat16") -> list[Case]:
    """Directions innermost: they share inputs and float64 results."""
    return [Case(op, shape, dtype, direction) for shape in shapes for direction in directions]


def _rows_of(elements: int, widths: Iterable[int]) -> list[tuple[int, int]]:
    return [(elements // width, width) for width in widths]


def _plain_shapes() -> list[tuple[int, int]]:
    """The tiny one, then diagonals of the table of rows by widths: so the first of them have all rows and widths."""
    shapes = [(rows, width) for rows, width in FULL if rows * width <= MOST]
    rows, widths = (sorted(set(sizes)) for sizes in zip(*shapes))
    return [TINY, *sorted(shapes, key=lambda s: (widths.index(s[1]) - rows.index(s[0]) - 1) % len(rows))]


GROUPS = {
    "add": [
        *_cases("add_layer_norm", _rows_of(LARGE, WIDTHS), "forward", "backward"),
        *_cases("add_layer_norm", _rows_of(LARGE, WIDER), "forward"),
        *_cases("add_layer_norm", _rows_of(4 * LARGE, (1024, 4096, 16384)), "forward", "backward"),
    ],
    "epilogue": _cases("bias_dropout_add_layer_norm", _rows_of(LARGE, WIDTHS), "both"),
    "attention": [
        case for shape in ATTENTION for op in ("attention", "attention_causal") for case in _cases(op, [shape], *_BOTH)
    ],
    "layer": _cases("encoder_layer", [STEP], "both"),
    "plain": [
        case
        for dtype in ("bfloat16", "float16", "float32")
        for shape in _plain_shapes()
        for op in NORMS
        for case in _cases(op, [shape], *_BOTH, dtype=dtype)
    ],
}


def every() -> list[Case]:
    return [case for group in GROUPS.values() for case in group]
