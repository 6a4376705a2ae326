"""Values on the command line: names, shapes, dtypes."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence

import torch

from . import _checks

_SHORT = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
_SHORT |= {"fp64": "float64", "double": "float64"}


def one_of(names: Sequence[str], short: Mapping[str, str]) -> Callable[[str], str]:
    """Takes one of the names, or what is `short` for one."""

    def name(text: str) -> str:
        found = short.get(text, text)
        if found not in names:
            near = difflib.get_close_matches(text, (*names, *short), 1)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}{guess}")
        return found

    return name


def sizes(text: str) -> list[int]:
    found = text.lower().split("x")
    if not all(size.isdecimal() for size in found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes joined by x, as in 4096x1024")
    return [int(size) for size in found]


def dtype(text: str) -> torch.dtype:
    names = {str(dtype).removeprefix("torch."): dtype for dtype in _checks.FLOAT_DTYPES}
    name = text.removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}, fp32, bf16, fp16, fp64")
    return names[name]


def seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0.0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0, as in 60")
    return found
