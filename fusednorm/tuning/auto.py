"""``autotune``: measures a class of calls when it is first called, and keeps the fastest for this process."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator

import torch

from .._transforms import capturing, traced, transform_active
from ..dispatch import blocks, rules, settings, tuned
from ..dispatch.tuned import Point
from .calls import ATTENTIONS, OPERATION_NAMES, Call, CallClass, build
from .measure import candidates, prior, served_by, verdict, why_wrong
from .timers import WARM

SECONDS = 0.05  # for a class, its check against float64 included
LONGEST = 0.1 * SECONDS  # of one call: of longer ones too few samples would fit
MOST_BYTES = 64 << 20  # of a tensor: more would take memory that the user's step may need
ROUNDS = 9

_lock = threading.Lock()
_entered: list[autotune] = []


class autotune(blocks.Block):
    """Measure each class of calls when it is first called, and let the fastest provider serve it in this process.

    It is what ``torch.backends.cudnn.benchmark`` is for convolutions: a context manager or a decorator, off by default.
    ``FUSEDNORM_AUTOTUNE=1`` in the environment turns it on for the whole process. A class is an operation, an element
    size, whether gradients are wanted, and a shape. Calls are timed on random tensors of that class for at most 50 ms.
    The user's tensors are not touched, nor is torch's random state. Classes that ``fusednorm tune`` measured are not
    measured again. Tensors over 64 MiB, and calls that take over 5 ms, stay with automatic choice.

    It measures nothing under ``torch.compile``, while a CUDA graph is captured, inside ``batch_invariant``, and under
    ``torch.use_deterministic_algorithms``, where a choice by the clock would differ from run to run.

    Args:
        enabled: False turns it off inside an enclosing block.

    Example:
        >>> x = torch.randn(64, 256)
        >>> with fusednorm.autotune():
        ...     normed = fusednorm.layer_norm(x, 256)
        >>> normed.shape
        torch.Size([64, 256])
    """

    entered = _entered
    changed = staticmethod(lambda: _apply())

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._used = False

    def __repr__(self) -> str:
        return f"autotune({self.enabled})"


def _apply() -> None:
    wanted = bool(_entered) and _entered[-1].enabled
    tuned.measure = measure if wanted else None
    rules.choose_anew()


def measure(device: torch.device, line: str, rows: int, columns: int, lengths: tuple[int, int] | None) -> Point | None:
    """The fastest provider of a class, which is kept for the process; None where nothing may be measured."""
    of = _class(line, rows, columns, lengths)
    if of is None or not _allowed(device) or not _lock.acquire(blocking=False):
        return None
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(of.needs_grad):
            point = _measured(of, device)
        tuned.process[str(device), line, rows, columns] = point
        return point
    finally:
        _lock.release()


def _allowed(device: torch.device) -> bool:
    return not (
        torch.compiler.is_compiling()
        or traced()
        or transform_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_any_autocast_enabled()
        or torch.are_deterministic_algorithms_enabled()
        or settings.current.listeners
        or not settings.current.by_shape
        or (device.type == "cuda" and capturing(device.index or 0))
    )


def _class(line: str, rows: int, columns: int, lengths: tuple[int, int] | None) -> CallClass | None:
    operation, itemsize, direction = line.split("/")
    dtype = {"2": "bfloat16", "4": "float32", "8": "float64"}.get(itemsize)
    if dtype is None or operation not in OPERATION_NAMES:
        return None
    shape: tuple[int, ...] = (rows, columns)
    if operation in ATTENTIONS:
        if lengths is None:
            return None
        shape = (2, 8, *lengths, columns)
    return CallClass(operation, dtype, direction == "both", shape)


def _measured(of: CallClass, device: torch.device) -> Point:
    with _without_measuring():
        before = prior(of, device)  # loads what a first call loads
        end = time.perf_counter() + SECONDS
        kept = Point(before, 1.0, (), "as automatic choice has it, in this process")
        names = candidates(of, device)
        if of.elements * of.torch_dtype.itemsize > MOST_BYTES or len(names) < 2:
            return kept
        call = build(of, device)
        with served_by(of, device, before):
            call()
            if _seconds(call, device, 1) > LONGEST:
                return kept
        right = []
        for name in names:
            with contextlib.suppress(RuntimeError, ValueError, TypeError):  # it cannot take the class
                if not why_wrong(of, name, device, threads=True):
                    right.append(name)
        samples = _samples(of, device, call, right, end)
    if len(right) < 2 or min(map(len, samples.values())) < 3:
        return kept
    found = verdict(samples, before)
    ratio = min((value[0] for value in found["ratios"].values()), default=1.0)
    return Point(found["best"], max(ratio, 1.0), tuple(right), "in this process")


def _samples(of: CallClass, device: torch.device, call: Call, names: list[str], end: float) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in names}
    repeats = {}
    for name in names:
        with served_by(of, device, name):
            call()
            repeats[name] = max(1, min(100, math.ceil(1e-4 / max(_seconds(call, device, 1), 1e-9))))
    for _ in range(ROUNDS):
        if time.perf_counter() > end:
            break
        for name in names:
            with served_by(of, device, name):
                for _ in range(WARM):
                    call()
                samples[name].append(_seconds(call, device, repeats[name]))
    fewest = min(map(len, samples.values()), default=0)
    return {name: found[:fewest] for name, found in samples.items()}


def _seconds(call: Call, device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


@contextlib.contextmanager
def _without_measuring() -> Iterator[None]:
    before, tuned.measure = tuned.measure, None
    try:
        yield
    finally:
        tuned.measure = before
        rules.choose_anew()
