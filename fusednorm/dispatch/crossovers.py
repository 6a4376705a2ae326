"""Which provider was fastest where something was measured.

`benchmarks/publish/crossovers.py` writes `measured/<device>.json` from raw results. It has a line for each operation,
element size and direction. The direction is `forward` for calls without gradients and `both` for those with. A line
is a list of steps `[columns, elements, provider]`. The last step with at most the columns and the elements of a call
decides. `torch` is torch's own operators.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from .._once import first_time
from ..providers.cpu import library as cpu
from . import fastpath

FOLDER = Path(__file__).with_name("measured")


class Step(NamedTuple):
    """The provider from so many columns and so many elements on."""

    columns: int
    elements: int
    provider: str


class Table(NamedTuple):
    device: str
    source: str  # the raw results it was made from, files below benchmarks/results
    worst_loss: float  # at a measured shape: 0.06 where a choice takes 1.06 times as long as the fastest
    steps: dict[str, list[Step]]  # by operation, element size and direction, "add_layer_norm/2/both"


class Preference(NamedTuple):
    provider: str
    why: str  # for explain()
    own: bool = False  # measured on this very machine


def device_key(device: torch.device) -> str:
    """The architecture of a GPU, `sm_90`, or `gfx_90` for AMD's; `cpu_amd` or, of all other makers, `cpu`;
    `cpu_without_fastpath` where small calls go another way."""
    if device.type == "cpu":
        if fastpath.load()[0] is None:
            return "cpu_without_fastpath"
        return "cpu_amd" if cpu.vendor() == "amd" else "cpu"
    if device.type != "cuda":
        return device.type
    return _architecture(device.index or 0)


@functools.lru_cache(None)
def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{'sm' if torch.version.hip is None else 'gfx'}_{major}{minor}"


@functools.lru_cache(None)
def table(key: str) -> Table | None:
    """What was measured on a kind of device, or None; None with a warning where the file is damaged."""
    path = FOLDER / f"{key}.json"
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        device, source, loss = read["device"], read["source"], read["worst_loss"]
        if not (type(device) is type(source) is str and type(loss) is float and 0 <= loss < math.inf):
            raise ValueError(f"expected two texts and a number; got {device}, {source}, {loss}")
        return Table(device, source, loss, {name: steps(entries) for name, entries in read["steps"].items()})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as fault:
        if first_time(path):
            warnings.warn(
                f"{path} cannot be read ({type(fault).__name__}: {fault}); providers are chosen by their order instead "
                "of by what was measured. Install fusednorm again to have the file back.",
                RuntimeWarning,
                stacklevel=2,
            )
        return None


def steps(entries: Any) -> list[Step]:
    """The steps of a line as a file has them.

    Raises:
        ValueError: they are not in order, or not from one element on.
    """
    found = [Step(*entry) for entry in entries]
    typed = all(
        type(s.columns) is type(s.elements) is int and s.elements > 0 and type(s.provider) is str for s in found
    )
    places = [(s.columns, s.elements) for s in found]
    starts = {(columns, 1) for columns, _ in places}
    if not typed or not places or places[0] != (1, 1) or places != sorted(set(places) | starts):
        raise ValueError(f"expected [columns, elements, provider], ascending, each width from 1 element; got {entries}")
    return found


@functools.lru_cache(4096)
def fastest(key: str, operation: str, itemsize: int, needs_grad: bool, rows: int, columns: int) -> Preference | None:
    found, name = table(key), f"{operation}/{itemsize}/{'both' if needs_grad else 'forward'}"
    if found is None or name not in found.steps:
        return None
    step, later = decisive(found.steps[name], rows, columns)
    fewer = next((s.elements for s in later if s.columns == step.columns), None)
    narrower = next((s.columns for s in later if s.columns > step.columns), None)
    limits = filter(None, (_limits(step.elements, fewer, "elements"), _limits(step.columns, narrower, "columns")))
    why = (
        f"{step.provider} was measured fastest, to within {100 * found.worst_loss:.3g} %, for "
        f"{_in_words(operation)} of {itemsize}-byte elements, "
        f"{'forward and backward' if needs_grad else 'forward alone'}, {' and '.join(limits) or 'at every size'}, "
        f"on {found.device} ({', '.join(PurePosixPath(path).name for path in found.source.split(', '))})"
    )
    return Preference(step.provider, why)


def decisive(steps: list[Step], rows: int, columns: int) -> tuple[Step, list[Step]]:
    """The step that decides a shape, and those after it."""
    place = max(i for i, step in enumerate(steps) if step.columns <= columns and step.elements <= rows * columns)
    return steps[place], steps[place + 1 :]


def _limits(low: int, end: int | None, unit: str) -> str:
    if end is None:
        return f"from {low} {unit} on" if low > 1 else ""
    return f"from {low} to {end - 1} {unit}" if low > 1 else f"below {end} {unit}"


def _in_words(operation: str) -> str:
    """The public function of an operation's name in the benchmarks, and with what."""
    if operation.startswith("bias_dropout_add_"):
        return f"{operation.removeprefix('bias_dropout_')} with a bias, a scale or dropout"
    if operation == "bias_gelu_dropout":
        return "bias_act_dropout with dropout"
    return f"bias_act_dropout with {operation[5:]}" if operation.startswith("bias_") else operation


def forget() -> None:
    """After a table was changed."""
    table.cache_clear()
    fastest.cache_clear()
