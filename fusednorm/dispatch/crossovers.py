"""Which provider was fastest where something was measured.

`benchmarks/publish/crossovers.py` writes `measured/<device>.json` from raw results. It holds the shapes measured for
each operation, element size and direction, and the provider that was fastest there. The direction is `forward` for
calls without gradients and `both` for those with. A call goes by the nearest of these shapes. `torch` is torch's own
operators.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._once import first_time
from ..providers.cpu import norm as cpu
from . import fastpath

FOLDER = Path(__file__).with_name("measured")


class Measured(NamedTuple):
    """The fastest provider of one shape, and how it compares with the next."""

    rows: int
    columns: int
    provider: str
    ratio: float  # time of the next over its own


class Table(NamedTuple):
    device: str
    source: str  # the raw result it was made from
    shapes: dict[str, list[Measured]]  # by operation, element size and direction, "add_layer_norm/2/both"


class Preference(NamedTuple):
    provider: str
    why: str  # for explain()


def device_key(device: torch.device) -> str:
    """The architecture of a GPU, `sm_90`; `cpu_amd` or, of all other makers, `cpu`; `cpu_without_shortcut` where small
    calls go another way."""
    if device.type == "cpu":
        if fastpath.load()[0] is None:
            return "cpu_without_shortcut"
        return "cpu_amd" if cpu.vendor() == "amd" else "cpu"
    if device.type != "cuda":
        return device.type
    return _architecture(device.index or 0)


@functools.lru_cache(None)
def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@functools.lru_cache(None)
def table(key: str) -> Table | None:
    """What was measured on a kind of device, or None; None with a warning where the file is damaged."""
    path = FOLDER / f"{key}.json"
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        shapes = {name: [_measured(*entry) for entry in entries] for name, entries in read["shapes"].items()}
        if not all(shapes.values()):
            raise ValueError("an operation has no shapes")
        return Table(str(read["device"]), str(read["source"]), shapes)
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


def _measured(rows: Any, columns: Any, provider: Any, ratio: Any) -> Measured:
    if not (type(rows) is type(columns) is int and rows > 0 < columns and type(provider) is str and ratio > 0):
        raise ValueError(f"expected rows, columns, provider, ratio; got {[rows, columns, provider, ratio]}")
    return Measured(rows, columns, provider, float(ratio))


@functools.lru_cache(4096)
def fastest(key: str, operation: str, itemsize: int, needs_grad: bool, rows: int, columns: int) -> Preference | None:
    found, name = table(key), f"{operation}/{itemsize}/{'both' if needs_grad else 'forward'}"
    if found is None or name not in found.shapes:
        return None

    def distance(m: Measured) -> float:
        return abs(math.log2(m.rows * m.columns / (rows * columns))) + abs(math.log2(m.columns / columns))

    best = min(found.shapes[name], key=distance)
    why = (
        f"{best.provider} was measured to be {best.ratio:.2f} times as fast at {best.rows} x {best.columns}, the "
        f"nearest shape measured for {_in_words(operation)} of {itemsize}-byte elements, "
        f"{'forward and backward' if needs_grad else 'forward alone'}, on {found.device} ({found.source})"
    )
    return Preference(best.provider, why)


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
