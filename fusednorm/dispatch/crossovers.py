"""Which provider was fastest where something was measured.

`benchmarks/publish/crossovers.py` writes `measured/<device>.json` from raw results. It holds the shapes measured for
each operation, element size and direction, and the provider that was fastest there. The direction is `forward` for
calls without gradients and `both` for those with. A call goes by the nearest of these shapes. `torch` is torch's own
operators.

Where nothing was measured the order of the provider table decides. Small calls on a GPU are an exception, because they
wait for the host. There norms take the fast path to the CUDA library, if there is one. Other small calls go to torch's
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

from .._activations import ACTIVATIONS
from .._once import first_time
from .._options import (
    ActivationInputs,
    ActivationOptions,
    AttentionInputs,
    Inputs,
    NormInputs,
    NormOptions,
    Options,
)
from .._transforms import wants_gradients
from ..providers.cpu import norm as cpu
from . import fastpath as _shortcut
from .rules_gpu import HOST_BOUND, waits_for_host

OPERATIONS = {name: f"bias_{name}" for name in ACTIVATIONS}
FOLDER = Path(__file__).with_name("measured")
SMALL = 8 << 20  # bytes of x: at 3 TB/s a norm takes 11 us, Python's way to its launch 13 (benchmarks/NOTES.md)

UNMEASURED = "nothing was measured on this GPU"
LIMITS = {needs_grad: f"{n_bytes >> 20} MiB" for needs_grad, n_bytes in HOST_BOUND.items()}

_CPU = torch.device("cpu")


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
        if _shortcut.load()[0] is None:
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


def operation(inputs: Inputs, options: Options) -> str:
    """The benchmark's name for what a call of a norm or an activation does."""
    if isinstance(options, ActivationOptions):  # with a mask, it decides, and not which activation it is
        return "bias_gelu_dropout" if options.dropout_p else OPERATIONS[options.activation]
    assert isinstance(inputs, NormInputs) and isinstance(options, NormOptions)
    epilogue = inputs.x_bias is not None or inputs.layer_scale is not None or options.dropped
    kind = "bias_dropout_add_" if epilogue else "add_" if inputs.residual is not None else ""
    return kind + ("rms_norm" if options.rms else "layer_norm")


def preference(op: str, inputs: Inputs, options: Options) -> Preference | None:
    """What was measured to be fastest for a call of a forward op, or None if nothing was measured."""
    if isinstance(inputs, AttentionInputs):
        return None  # its cost is no function of rows and columns: the order of the table decides
    x, normalized_ndim = inputs.x, options.normalized_ndim if isinstance(options, NormOptions) else 1
    # who serves draws the mask: reentrant checkpointing makes a call without gradients, and again with them
    needs_grad = options.dropped or wants_gradients(inputs)
    columns = math.prod(x.shape[x.ndim - normalized_ndim :])
    rows = x.numel() // columns if columns else 0
    if not rows or not isinstance(rows, int):  # empty, or symbolic while a graph is traced
        return None
    if isinstance(inputs, ActivationInputs):
        in_fast_path = False
        if inputs.bias is None or inputs.bias.dtype is not x.dtype:
            return None
    else:
        assert isinstance(options, NormOptions)
        given = x if inputs.residual is None else inputs.residual
        if not x.dtype is options.normed_dtype is options.residual_dtype is given.dtype:
            return None  # mixtures of dtypes are not measured
        in_fast_path = inputs.layer_scale is None and not options.drop_path_p and not options.zero_centered_weight
    name = operation(inputs, options)
    if x.is_cuda and in_fast_path:
        found = _of_a_norm_on_a_gpu(x.dtype, name, rows * columns, columns, needs_grad, x.device.index or 0)
    else:
        found = _nearest(device_key(x.device), name, x.element_size(), needs_grad, rows, columns)
    # With a seed torch's operators compute the mask in Python.
    if found is None and x.is_cuda and inputs.seed is None and waits_for_host(x.numel() * x.element_size(), needs_grad):
        return Preference("torch", f"{UNMEASURED}, and a call of up to {LIMITS[needs_grad]} waits for the host")
    return found


@functools.lru_cache(4096)
def torch_on_gpu(operation: str, dtype: torch.dtype, elements: int, columns: int, needs_grad: bool, index: int) -> bool:
    """Whether torch's operators are what `preference` finds for a bare call on a GPU, in one look-up of a cache."""
    if not columns or not elements:
        return False
    if operation.endswith("_norm"):
        found = _of_a_norm_on_a_gpu(dtype, operation, elements, columns, needs_grad, index)
    else:
        found = _nearest(_architecture(index), operation, dtype.itemsize, needs_grad, elements // columns, columns)
    return waits_for_host(elements * dtype.itemsize, needs_grad) if found is None else found.provider == "torch"


def cuda_on_gpu(name: str, dtype: torch.dtype, elements: int, columns: int, needs_grad: bool, index: int) -> bool:
    """Whether `preference` names the CUDA library for a norm, of those that the shortcut takes, on a GPU."""
    found = _of_a_norm_on_a_gpu(dtype, name, elements, columns, needs_grad, index)
    return found is not None and found.provider == "cuda"


@functools.lru_cache(4096)
def _of_a_norm_on_a_gpu(
    dtype: torch.dtype, name: str, elements: int, columns: int, needs_grad: bool, index: int
) -> Preference | None:
    rows, key = elements // columns, _architecture(index)
    found = _nearest(key, name, dtype.itemsize, needs_grad, rows, columns)
    if found is None and elements * dtype.itemsize <= SMALL and _shortcut.load()[0] is not None:
        return Preference("cuda", "a norm of up to 8 MiB waits for the host, and the shortcut leads to cuda")
    return found


@functools.lru_cache(4096)
def torch_on_cpu(operation: str, dtype: torch.dtype, elements: int, columns: int, needs_grad: bool) -> bool:
    """Whether torch's own operators are what `preference` finds for a shape on the CPU, in one look-up of a cache."""
    if not columns or not elements:
        return False
    found = _nearest(device_key(_CPU), operation, dtype.itemsize, needs_grad, elements // columns, columns)
    return found is not None and found.provider == "torch"


@functools.lru_cache(4096)
def _nearest(key: str, operation: str, itemsize: int, needs_grad: bool, rows: int, columns: int) -> Preference | None:
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
    _nearest.cache_clear()
    torch_on_cpu.cache_clear()
    _of_a_norm_on_a_gpu.cache_clear()
    torch_on_gpu.cache_clear()
