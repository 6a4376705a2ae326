"""One class of calls: which providers compute it rightly, and how long each of them takes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..dispatch import registry, rules, tuned, use_provider
from ..dispatch.explain import decisions
from ..dispatch.tuned import Point
from ..dispatch.tuned_forms import name_of
from ..providers.torch.attention import BACKENDS
from .calls import Call, CallClass, build
from .forms import TriedForm, forms_to_try, kernel_of
from .load import available_memory
from .timers import Around, Calls, CpuTimer, CudaTimer, alone, median_interval

MOST_ROWS_CHECKED = 64  # which form of a kernel runs depends on the columns
DRAWS = 3
TENSORS = 12  # of the input's size, that the inputs, results and gradients of a call come to at most
PLACES, BETWEEN = 2, 4160  # in memory, and bytes to the next: one place may be 5 % faster than another
SPREAD = 1.03  # ratios nearer to 1, or with 1 in their interval, are no difference

Record = dict[str, Any]
Results = tuple[Tensor, ...]
Compared = tuple[Results, Results, Results]
CALL_FAULTS = (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError)


def too_large(of: CallClass, device: torch.device) -> str:
    """Why there is no room for the tensors of a call, or ""."""
    free, needed = available_memory(device), TENSORS * of.elements * of.torch_dtype.itemsize
    if free is None or needed <= 0.8 * free:
        return ""
    return f"takes about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"


def first_line(fault: BaseException) -> str:
    return f"{type(fault).__name__}: {fault}".splitlines()[0][:200]


def candidates(of: CallClass, device: torch.device) -> list[str]:
    """Providers that may serve a call, torch's own operators among them; best first.

    On a GPU, each kernel of torch's attention is one more: "torch/flash", "torch/cudnn" and "torch/efficient".
    """
    names = [name for name in registry.available_providers() if name != "reference"]
    names = [name for name in names if getattr(registry.get(name)[0], "for_tests", None) is None]
    if of.is_attention and device.type == "cuda":
        names += [f"torch/{backend}" for backend in BACKENDS if backend != "math"]
    return [name for name in names if name != "torch" or not of.draws_mask]


def smaller(of: CallClass) -> CallClass:
    """The class with few rows, on which results are compared with float64."""
    if of.is_attention:
        batch, heads, queries, keys, head_dim = of.shape
        return of._replace(shape=(min(batch, 2), min(heads, 2), min(queries, 256), min(keys, 256), head_dim))
    return of._replace(shape=(min(of.shape[0], MOST_ROWS_CHECKED), *of.shape[1:]))


def why_wrong(of: CallClass, provider: str, device: torch.device, threads: bool = False) -> str:
    """What is wrong with a provider's outputs or gradients, or "".

    An error against float64 may be twice that of torch's own operators, and one rounding. The largest errors of
    several draws are compared, since one draw may be lucky.

    Args:
        threads: other threads may call meanwhile. No provider is requested then, since a request would hold for them
            too: float64 is automatic choice's, and so is what takes the place of torch's operators beside dropout.
    """
    small, base = smaller(of), "reference" if of.draws_mask else "torch"

    def by(name: str) -> contextlib.AbstractContextManager[Any]:
        if not threads and "/" not in name:
            return use_provider(name)
        return contextlib.nullcontext() if name == "reference" else served_by(small, device, name)

    def results(draw: int) -> Compared:
        call = build(small, device, draw)
        return (
            results_of(call.to(torch.float64), by("reference")),
            results_of(call, by(base)),
            results_of(call, by(provider)),
        )

    return over_budget(results, of.torch_dtype)


def over_budget(results: Callable[[int], Compared], dtype: torch.dtype) -> str:
    """What is wrong with our results, or "". `results` of a draw: in float64, by torch's own operators, and ours."""
    largest: list[list[float]] = []
    for draw in range(DRAWS):
        rows = []
        for right, other, found in zip(*results(draw), strict=True):
            if found.shape != right.shape or found.dtype != dtype:
                return f"a result is {found.dtype} {tuple(found.shape)}"
            rounding = torch.finfo(dtype).eps / 2 * _largest(right)
            rows.append([_largest(found.double() - right), 2 * _largest(other.double() - right) + rounding])
        largest = rows if not largest else [[*map(max, a, b)] for a, b in zip(largest, rows, strict=True)]
        if all(error <= budget for error, budget in largest):
            return ""
    worst = max(largest, key=lambda pair: pair[0] / max(pair[1], 1e-300))
    return f"its error against float64 is {worst[0]:.3g}, allowed are {worst[1]:.3g}"


def results_of(call: Call, served: contextlib.AbstractContextManager[Any]) -> tuple[Tensor, ...]:
    with served:
        return tuple(t.detach() for t in call())


def _largest(t: Tensor) -> float:
    value = t.abs().max().item() if t.numel() else 0.0
    return value if math.isfinite(value) else math.inf


def prior(of: CallClass, device: torch.device) -> str:
    """Who serves such a call by automatic choice as it is."""
    found = decisions(build(of, device).__call__)
    return found[0].provider if found else "torch"


@contextlib.contextmanager
def served_by(of: CallClass, device: torch.device, provider: str) -> Iterator[None]:
    """Automatic choice takes a provider for this class alone: other threads' calls go on as they do."""
    key: Any = (str(device), of.line, *of.place)
    before = tuned.process.get(key)
    tuned.process[key] = Point(provider, 1.0, (), "while it is measured")
    rules.choose_anew()
    try:
        yield
    finally:
        if before is None:
            tuned.process.pop(key, None)
        else:
            tuned.process[key] = before
        rules.choose_anew()


def measured(
    of: CallClass, device: torch.device, timer: CpuTimer | CudaTimer, seconds: float, lost: dict[str, str]
) -> Iterator[tuple[str, Any]]:
    """Announces each provider before it runs, as ("trying", name), and ends with ("record", what was found).

    Args:
        lost: providers that took their process with them in this class, and how.
    """
    rejected, right = dict(lost), []
    for name in candidates(of, device):
        if name in rejected:
            continue
        yield "trying", name
        wrong = why_not(of, name, device)
        if wrong:
            rejected[name] = wrong
        else:
            right.append(name)
    yield "trying", ""
    record: Record = {"name": of.name, "rejected": rejected, "prior": prior(of, device), "providers": {}}
    if right:
        calls = functools.partial(_same_call, right, of, device)
        times, replayed = timed(calls, timer, seconds, functools.partial(served_by, of, device))
        record |= verdict(times, record["prior"])
        if replayed:
            record["device"] = {name: 1e6 * median(samples) for name, samples in replayed.items()}
    yield "record", record


def why_not(of: CallClass, provider: str, device: torch.device) -> str:
    """What is wrong with a provider, or what it raised, or ""."""
    try:
        return why_wrong(of, provider, device)
    except CALL_FAULTS as fault:
        return first_line(fault)


Times = dict[str, list[float]]


def timed(
    calls_of: Callable[[int], Calls], timer: CpuTimer | CudaTimer, seconds: float, around: Around = alone
) -> tuple[Times, Times]:
    """(samples with the host's time, samples of the device's own) by name; of the latter those that can be had.

    Args:
        calls_of: gives the calls on new tensors, of a place in memory.
    """
    times: Times = {}
    replayed: Times = {}
    for place in range(PLACES):
        between = [torch.empty(BETWEEN * (k + 1), dtype=torch.uint8) for k in range(place)]
        calls = calls_of(place)
        for name, found in timer.measure(calls, seconds / PLACES, around, replayed=True).items():
            times.setdefault(name, []).extend(found.get("inclusive") or found["samples"])
            if "replayed" in found:
                replayed.setdefault(name, []).extend(found["replayed"])
        del calls, between
    return times, replayed


def _same_call(names: Iterable[str], of: CallClass, device: torch.device, place: int) -> Calls:
    """One call for all names, which a context tells apart."""
    return dict.fromkeys(names, build(of, device, place).__call__)


def measured_forms(
    of: CallClass,
    device: torch.device,
    provider: str,
    timer: CpuTimer | CudaTimer,
    seconds: float,
    lost: dict[str, str],
) -> Iterator[tuple[str, Any]]:
    """As `measured`, of the forms of a provider's kernel, beside the table's own.

    The device's own time decides if a CUDA graph takes every form, else the time with the host.
    """
    kernel = kernel_of(of)
    assert kernel is not None
    table = TriedForm(provider)
    listed = {form.name: form for form in forms_to_try(kernel, device, provider)}
    rejected = {name: lost[name] for name in listed if name in lost}
    right = {table.name: table}
    for name, form in listed.items():
        if name in rejected:
            continue
        yield "trying", name
        wrong = ""
        try:
            with form.forced():
                wrong = why_not(of, provider, device)
        except (RuntimeError, ValueError) as fault:  # no such form
            wrong = first_line(fault)
        if wrong:
            rejected[name] = wrong
        else:
            right[name] = form

    @contextlib.contextmanager
    def around(name: str) -> Iterator[None]:
        with right[name].forced(), served_by(of, device, provider):
            yield

    found: Record = {"place": name_of(provider, kernel.place(provider)), "rejected": rejected, "tried": {}}
    if len(right) > 1:
        yield "trying", f"{provider} forms"
        times, replayed = timed(functools.partial(_same_call, right, of, device), timer, seconds, around)
        by_device = all(len(replayed.get(name, ())) == len(times[name]) for name in right)
        deciding = replayed if by_device else times
        found["decided by"] = "device" if by_device else "host and device"
        for name, form in right.items():
            found["tried"][name] = {"numbers": list(form.numbers), "median": 1e6 * median(times[name])}
            if name in replayed:
                found["tried"][name]["device"] = 1e6 * median(replayed[name])
            found["tried"][name]["ratio"] = paired(deciding[table.name], deciding[name])
    yield "record", found


def verdict(samples: dict[str, list[float]], before: str) -> Record:
    """The fastest provider beyond the spread, with times in microseconds and ratios of the same round.

    Where it is not faster beyond the spread than the one `before`, automatic choice's, that one stays.
    """
    providers = {}
    for name, times in samples.items():
        low, high = median_interval(times)
        providers[name] = {"median": 1e6 * median(times), "low": 1e6 * low, "high": 1e6 * high}
    best = min(samples, key=lambda name: median(samples[name]))
    ratios = {name: paired(samples[name], samples[best]) for name in samples if name != best}
    if before in ratios and not beyond(ratios[before]):
        best = before
        ratios = {name: paired(samples[name], samples[best]) for name in samples if name != best}
    return {"providers": providers, "best": best, "ratios": ratios}


def paired(other: list[float], own: list[float]) -> list[float]:
    """[median, low, high] of the other's time over the own, paired by round."""
    pairs = [a / b for a, b in zip(other, own, strict=True)]
    return [median(pairs), *median_interval(pairs)]


def beyond(ratio: list[float]) -> bool:
    """Whether a ratio above 1 is a difference: its whole interval is."""
    return ratio[0] >= SPREAD and ratio[1] > 1.0
