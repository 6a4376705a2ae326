"""``bench``: automatic choice beside eager PyTorch, for the operators, shapes and dtypes that a user names."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch

from ..dispatch import tuned, use_provider
from .calls import ATTENTIONS, EPILOGUES, FAMILIES, CallClass, P, build
from .conditions import steady_machine
from .eager import eager
from .load import BackgroundLoad, share_text, warning
from .measure import (
    CALL_FAULTS,
    Compared,
    first_line,
    over_budget,
    paired,
    prior,
    results_of,
    smaller,
    timed,
    too_large,
)
from .run import chosen_device, with_progress
from .table import aligned
from .timers import Calls, CpuTimer, CudaTimer, timer_for

SECONDS = 60.0  # for all cases together; short calls need less
MOST_CHECKED = 1 << 23  # elements, or pairs of queries and keys: larger cases are checked on fewer rows

# One sequence and eight: of BERT-base's sizes on a CPU, of a model of width 4096 on a GPU.
TYPICAL: Mapping[str, Mapping[str, tuple[tuple[int, ...], ...]]] = {
    "cpu": {
        "norms": ((128, 768), (1024, 768)),
        "activation": ((128, 3072), (1024, 3072)),
        "attention": ((1, 12, 128, 128, 64), (8, 12, 128, 128, 64)),
    },
    "cuda": {
        "norms": ((2048, 4096), (16384, 4096)),
        "activation": ((2048, 16384), (16384, 16384)),
        "attention": ((1, 32, 2048, 2048, 128), (8, 32, 2048, 2048, 128)),
    },
}
TYPICAL_DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
TYPICAL_OPERATIONS = (
    *("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "bias_dropout_add_layer_norm"),
    *("bias_gelu_dropout", "attention", "attention_causal"),
)


@dataclass(frozen=True)
class Case:
    """One row: medians in microseconds, and eager's time over ours with its 95 % interval."""

    of: CallClass
    provider: str = ""
    checked: tuple[int, ...] = ()  # the shape at which results were compared with float64
    eager_us: float = 0.0
    ours_us: float = 0.0
    ratio: tuple[float, ...] = ()
    fault: str = ""  # why it was not timed

    def record(self) -> dict[str, Any]:
        operation, dtype, needs_grad, shape = self.of
        found: dict[str, Any] = {"operation": operation, "shape": shape, "dtype": dtype}
        found["direction"] = direction(needs_grad)
        if self.fault:
            return found | {"fault": self.fault}
        found |= {"eager_us": self.eager_us, "ours_us": self.ours_us, "ratio": self.ratio[0]}
        return found | {"interval": self.ratio[1:], "provider": self.provider, "checked_shape": self.checked}


class Bench(NamedTuple):
    """What a run measured."""

    machine: Mapping[str, Any]
    cases: list[Case]
    load: float | None  # the share of the cores' time that other processes took
    stopped: bool

    @property
    def faults(self) -> list[Case]:
        return [case for case in self.cases if case.fault]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "machine": dict(self.machine),
            "load_of_others": self.load,
            "stopped": self.stopped,
            "cases": [case.record() for case in self.cases],
        }

    def __str__(self) -> str:
        facts = self.machine
        threads = f", {facts['threads']} threads" if "threads" in facts else ""
        title = f"fusednorm {facts['fusednorm']} beside eager PyTorch {facts['torch']} on {facts['device']}{threads}"
        cells = [["operator", "shape", "dtype", "direction"]]
        cells[0] += ["eager, us", "ours, us", "times as fast", "95 % interval", "served by"]
        for case in self.cases:
            if not case.fault:
                ratio, low, high = case.ratio
                times = f"{case.eager_us:.1f}", f"{case.ours_us:.1f}", f"{ratio:.2f}", f"{low:.2f} to {high:.2f}"
                cells.append([*_named(case.of), *times, case.provider])
        lines = [title, "", *(aligned(cells, right=(4, 5, 6, 7)) if len(cells) > 1 else [])]
        if self.faults:
            lines += ["", "Not timed:"]
            lines += [f"  {' '.join(_named(case.of))}: {case.fault}" for case in self.faults]
        said = [formula(name) for name in dict.fromkeys(case.of.operation for case in self.cases)]
        lines += ["", *filter(None, said)]
        timed_cases = [case for case in self.cases if not case.fault]
        if timed_cases:
            lines.append("Results were compared with float64 before they were timed.")
        if any(case.checked != case.of.shape for case in timed_cases):
            lines.append(f"Those of over {MOST_CHECKED:,} elements were compared on fewer rows, by the same provider.")
        lines.append("Times are medians, with the host's work. A ratio is the median of pairs measured in turn.")
        lines.append(warning(self.load) or f"Time that other processes took meanwhile: {share_text(self.load)}.")
        return "\n".join([*lines, *(["The run was interrupted."] if self.stopped else [])])


def direction(needs_grad: bool) -> str:
    return "forward + backward" if needs_grad else "forward"


def _named(of: CallClass) -> list[str]:
    return [of.operation, "x".join(map(str, of.shape)), of.dtype, direction(of.needs_grad)]


def formula(operation: str) -> str:
    """What an operator of a name of its own computes, or ""."""
    if operation in EPILOGUES:
        return f"{operation}: add_{operation.rpartition('add_')[2]} of dropout(x + bias) and a residual, p = {P}."
    if operation in FAMILIES["activation"]:
        name = operation.removeprefix("bias_").removesuffix("_dropout")
        drops = operation.endswith("_dropout")
        return f"{operation}: {f'dropout({name}(x + bias)), p = {P}' if drops else f'{name}(x + bias)'}."
    return ""


def bench(
    operations: Sequence[str] = (),
    shapes: Sequence[Sequence[int]] = (),
    dtypes: Sequence[torch.dtype] = (),
    *,
    device: torch.device | str | None = None,
    seconds: float = SECONDS,
    progress: bool | None = None,
) -> Bench:
    """Time automatic choice beside eager PyTorch, forward and forward + backward, in turns.

    Args:
        operations: names out of `OPERATION_NAMES` and `FAMILIES`; a few typical ones if not given.
        shapes: (rows, columns) of norms and activations, (batch, heads, length, head_dim) of attention, or
            (batch, heads, queries, keys, head_dim). Two typical ones of the device if not given.
        dtypes: float32 on a CPU and bfloat16 on a GPU if not given.
        seconds: about how long all cases take together.

    Raises:
        ValueError: a shape fits no operator, an operator has no shape, or the device is not here.
    """
    chosen = chosen_device(device)
    classes = chosen_classes(chosen, operations, shapes, dtypes)
    cases: list[Case] = []
    stopped = False
    with steady_machine(None), torch.random.fork_rng([chosen] if chosen.type == "cuda" else []):
        timer, load = timer_for(chosen), BackgroundLoad()
        try:
            for of in with_progress(classes, len(classes), progress, "bench"):
                cases.append(measured(of, chosen, timer, seconds / len(classes)))
        except KeyboardInterrupt:  # what was measured is shown
            stopped = True
        return Bench(tuned.machine(chosen), cases, load.share(), stopped)


def chosen_classes(
    device: torch.device,
    operations: Sequence[str],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
) -> list[CallClass]:
    """Every operation at every shape that it takes, in every dtype and both directions."""
    families = {name: family for family, names in FAMILIES.items() for name in names}
    wanted = list(dict.fromkeys(name for given in operations for name in FAMILIES.get(given, (given,))))
    known = wanted or TYPICAL_OPERATIONS
    for size in shapes:
        if not any(fitting(name, size) for name in known):
            those = ", ".join(wanted) or "any operator"
            raise ValueError(f"--shape: {'x'.join(map(str, size))} is no shape of {those}; {_forms(known)}")
    found = []
    for name in known:
        sizes = [fit for size in shapes if (fit := fitting(name, size))]
        if wanted and shapes and not sizes:
            raise ValueError(f"--shape: none is given for {name}; {_forms([name])}")
        for shape in sizes if shapes else TYPICAL[device.type][families[name]]:
            for dtype in dtypes or (TYPICAL_DTYPE[device.type],):
                text = str(dtype).removeprefix("torch.")
                found += [CallClass(name, text, needs_grad, shape) for needs_grad in (False, True)]
    return list(dict.fromkeys(found))


def fitting(operation: str, size: Sequence[int]) -> tuple[int, ...]:
    """The shape as the operation's class has it, or () where it takes no such shape."""
    if not all(size):
        return ()
    if operation not in ATTENTIONS:
        return (math.prod(size[:-1]), size[-1]) if len(size) in (2, 3) else ()
    if len(size) == 4:
        batch, heads, length, head_dim = size
        return batch, heads, length, length, head_dim
    return tuple(size) if len(size) == 5 else ()


def _forms(operations: Sequence[str]) -> str:
    """What shapes the operations take."""
    said = []
    if any(name not in ATTENTIONS for name in operations):
        said.append("norms and activations take rows x columns, as 4096x1024")
    if any(name in ATTENTIONS for name in operations):
        said.append("attention takes batch x heads x length x head_dim, as 2x8x512x64")
    return "; ".join(said)


def measured(of: CallClass, device: torch.device, timer: CpuTimer | CudaTimer, seconds: float) -> Case:
    """Check a class against float64, then time it."""
    try:
        fault = too_large(of, device)
        if fault:
            return Case(of, fault=fault)
        provider = prior(of, device)
        checked = of if _work(of) <= MOST_CHECKED else smaller(of)
        # of few rows another provider may be chosen than is timed
        requested = None if checked is of or prior(checked, device) == provider else provider
        fault = over_budget(functools.partial(_compared, checked, device, requested), of.torch_dtype)
        if fault:
            return Case(of, fault=fault)
        times, _ = timed(functools.partial(_both, of, device), timer, seconds)
    except CALL_FAULTS as fault_raised:
        return Case(of, fault=first_line(fault_raised))
    theirs, ours = times["eager"], times["ours"]
    ratio = tuple(paired(theirs, ours))
    return Case(of, provider, checked.shape, 1e6 * median(theirs), 1e6 * median(ours), ratio)


def _work(of: CallClass) -> int:
    """Elements, or pairs of queries and keys where they are more."""
    pairs = math.prod(of.shape[:4]) if of.is_attention else 0
    return max(of.elements, pairs)


def _compared(of: CallClass, device: torch.device, requested: str | None, draw: int) -> Compared:
    """Results in float64, of eager PyTorch, and ours. With dropout, the reference with our mask stands for eager."""
    call = build(of, device, draw)
    request = contextlib.nullcontext() if requested is None else use_provider(requested)
    if of.draws_mask:
        exact, theirs = (results_of(c, use_provider("reference")) for c in (call.to(torch.float64), call))
    else:
        plain = eager(of, call, device)
        exact, theirs = (results_of(c, contextlib.nullcontext()) for c in (plain.to(torch.float64), plain))
    return exact, theirs, results_of(call, request)


def _both(of: CallClass, device: torch.device, place: int) -> Calls:
    call = build(of, device, place)
    return {"eager": eager(of, call, device).__call__, "ours": call.__call__}
