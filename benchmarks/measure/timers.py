"""How it is measured: the machine's state, correctness before timing, timers, and the roofline."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import os
import random
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OPS, Call, Case, Leaves

DRAWS = 8
PEER_TOLERANCE = 16  # a baseline further than this many budgets from float64 computes something else
MIN_ROUNDS, SLOW_ROUNDS, MAX_ROUNDS = 9, 5, 61
SAMPLE_SECONDS = 2e-4  # calls are repeated within a sample until it takes as long


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Order statistics that enclose the median with `confidence`, whatever the distribution; all of few samples."""
    ordered, n = sorted(values), len(values)
    tail, skip = 0.0, 0
    while skip < n // 2:
        tail += math.comb(n, skip) / 2**n
        if 2 * tail > 1 - confidence:
            break
        skip += 1
    skip = max(skip - 1, 0)
    return ordered[skip], ordered[n - 1 - skip]


def best_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def steady_machine(threads: int | None) -> Iterator[dict[str, Any]]:
    """Fix the threads and keep freed memory in the process; both are undone afterwards.

    glibc maps every large tensor anew and gives it back when freed, so each call pays a page fault for every 4 KB
    it writes: a fresh output then measures the kernel's page allocator and not the operator.
    """
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or min(before, cores))
    kept = _mallopt({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20})
    try:
        yield {
            "threads": torch.get_num_threads(),
            "cores": cores,
            "allocator": "glibc mallopt M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1: freed memory is kept, no new pages a call"
            if kept
            else "the C library's own (no glibc mallopt): large fresh results may measure page faults",
        }
    finally:
        if kept:
            _mallopt({_M_MMAP_MAX: 65536, _M_TRIM_THRESHOLD: 128 << 10, _M_TOP_PAD: 128 << 10})
        torch.set_num_threads(before)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def _mallopt(settings: Mapping[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return [mallopt(name, value) for name, value in settings.items()] == [1] * len(settings)


def available_memory(device: torch.device) -> int | None:
    """Free bytes on the device, or None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


# --- correctness ---


@dataclass(frozen=True)
class Problem:
    """Inputs of a case, and what float64 and eager make of them."""

    leaves: Leaves
    cotangents: tuple[Tensor, ...]
    mask_seed: int
    exact: Mapping[str, Tensor]
    eager_error: Mapping[str, float]


@functools.lru_cache(maxsize=1)
def _problem(op_name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, draw: int) -> Problem:
    op, generator = OPS[op_name], torch.Generator(device).manual_seed(1000 + draw)
    leaves = {}
    for name, size in op.inputs(shape).items():
        values = torch.randn(size, generator=generator, device=device)
        leaves[name] = op.values(name, values).to(dtype)
    cotangents = tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for _ in op.outputs())
    mask = op.mask_of(shape, seed=draw, device=device)
    wide = {name: leaf.double() for name, leaf in leaves.items()}
    exact = results(lambda t: lambda: op.twin(t, mask), op.outputs(), wide, tuple(c.double() for c in cotangents))
    eager = results(lambda t: lambda: op.twin(t, mask), op.outputs(), leaves, cotangents)
    errors = {name: _largest(eager[name].double() - exact[name]) for name in exact}
    return Problem(leaves, cotangents, draw, exact, errors)


def problem(case: Case, device: torch.device, draw: int = 0) -> Problem:
    return _problem(case.op, case.shape, case.torch_dtype, device, draw)


def forget_problem() -> None:
    """Free the inputs and float64 results of the last case."""
    _problem.cache_clear()


def results(
    build: Callable[[Leaves], Call], names: Sequence[str], leaves: Leaves, cotangents: tuple[Tensor, ...] | None
) -> dict[str, Tensor]:
    """Outputs by name and, with cotangents, every input's gradient."""
    leaves = {name: leaf.detach().clone().requires_grad_(cotangents is not None) for name, leaf in leaves.items()}
    outputs = build(leaves)()
    found = {name: output.detach() for name, output in zip(names, outputs, strict=True)}
    if cotangents is not None:
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        found |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return found


def _largest(difference: Tensor) -> float:
    value = difference.abs().max().item() if difference.numel() else 0.0
    return value if math.isfinite(value) else math.inf


@dataclass(frozen=True)
class Verdict:
    """`worst` is the largest error in budgets: at most 1 is right."""

    worst: float
    detail: str

    @property
    def ok(self) -> bool:
        return self.worst <= 1.0


def check(case: Case, device: torch.device, build: Callable[[Leaves, int], Call] | None = None) -> Verdict:
    """The error budget at the very shape measured: max|ours - fp64| <= 2 max|eager - fp64| + one rounding.

    Two largest errors of one draw say little on a small tensor (eager may be lucky), so a case a little over the
    budget is judged by the largest errors over several draws.
    """
    op, cotangents = case.operation, None
    build = build or op.fused
    errors: dict[str, float] = {}
    allowed: dict[str, float] = {}
    for draw in range(DRAWS):
        inputs = problem(case, device, draw)
        if case.direction != "forward":
            cotangents = inputs.cotangents
        ours = results(lambda t, seed=inputs.mask_seed: build(t, seed), op.outputs(), inputs.leaves, cotangents)
        for name, result in ours.items():
            exact = inputs.exact[name]
            if result.shape != exact.shape or result.dtype != case.torch_dtype:
                return Verdict(math.inf, f"{name} is {result.dtype} {tuple(result.shape)}")
            errors[name] = max(errors.get(name, 0.0), _largest(result.double() - exact))
            rounding = torch.finfo(case.torch_dtype).eps / 2 * exact.abs().max().item()
            budget = 2 * inputs.eager_error[name] + max(rounding, torch.finfo(case.torch_dtype).tiny)
            allowed[name] = max(allowed.get(name, 0.0), budget)
        name = max(errors, key=lambda name: errors[name] / allowed[name])
        worst = errors[name] / allowed[name]
        detail = f"max|{name} - fp64| is {errors[name]:.3g}, {worst:.3g} x the budget {allowed[name]:.3g}"
        if not 1 < worst <= 4:
            break
    return Verdict(worst, detail)


# --- timers ---


class CpuTimer:
    """Wall-clock samples, variants interleaved, with the page faults of a call counted."""

    kind = "wall clock"

    def measure(self, calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, Any]]:
        repeats, estimate = {}, 0.0
        for name, call in calls.items():
            call()
            repeats[name] = _repeats(_wall(call, 1))
            once = _wall(call, repeats[name])
            repeats[name] = _repeats(once)
            estimate += once * repeats[name]
        found = {name: {"samples": [], "repeats": repeats[name], "faults": 0} for name in calls}
        with _no_garbage_collection():
            for name in _interleaved(calls, _rounds(seconds, estimate)):
                faults = _page_faults()
                found[name]["samples"].append(_wall(calls[name], repeats[name]))
                found[name]["faults"] += _page_faults() - faults
        for variant in found.values():
            variant["faults"] /= len(variant["samples"]) * variant["repeats"]
        return found


class CudaTimer:
    """Device time between two events, after the L2 cache was flushed; apart from it time with the host, and memory.

    A sleep in front keeps the device busy until the host has queued everything, so that no host time comes between
    the two events. `cuda` is a parameter so that the logic can be tested without a device.
    """

    kind = "CUDA events, L2 flushed"

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        properties = cuda.get_device_properties(device)
        l2 = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self.scratch = torch.empty(4 * l2, dtype=torch.int8, device=device)
        self.sleep = getattr(cuda, "_sleep", None)  # cycles; private, but there since torch 1.0
        self.clock = getattr(properties, "clock_rate", 2_000_000) * 1e3

    def _host_seconds(self, call: Callable[[], Any]) -> float:
        def queue() -> float:
            self.cuda.synchronize(self.device)
            return _wall(call, 1)

        return median([queue() for _ in range(5)])

    def _device_sample(self, call: Callable[[], Any], host: float) -> float:
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        if self.sleep is not None:
            self.sleep(int(min(2 * host + 5e-5, 0.05) * self.clock))
        self.scratch.zero_()
        start.record()
        call()
        end.record()
        self.cuda.synchronize(self.device)
        return start.elapsed_time(end) * 1e-3

    def _inclusive_sample(self, call: Callable[[], Any], repeats: int) -> float:
        """Seconds a call, host and device together, calls back to back."""
        self.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / repeats

    def _peak_memory(self, call: Callable[[], Any]) -> int:
        """Bytes allocated on top of the inputs while the call runs, its results included."""
        self.cuda.synchronize(self.device)
        before = self.cuda.memory_allocated(self.device)
        self.cuda.reset_peak_memory_stats(self.device)
        call()
        self.cuda.synchronize(self.device)
        return self.cuda.max_memory_allocated(self.device) - before

    def measure(self, calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        hosts, estimate = {}, 0.0
        for name, call in calls.items():
            for _ in range(3):  # compilation and autotuning fall into these
                call()
            hosts[name] = self._host_seconds(call)
            once = self._inclusive_sample(call, 3)
            repeats = _repeats(once)
            peak = self._peak_memory(call)
            found[name] = {"samples": [], "inclusive": [], "repeats": repeats, "host": hosts[name], "peak": peak}
            estimate += 3 * max(once, hosts[name]) + repeats * once + 1e-4
        with _no_garbage_collection():
            for name in _interleaved(calls, _rounds(seconds, estimate)):
                found[name]["samples"].append(self._device_sample(calls[name], hosts[name]))
                found[name]["inclusive"].append(self._inclusive_sample(calls[name], found[name]["repeats"]))
        return found


def timer_for(device: torch.device) -> CpuTimer | CudaTimer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def _wall(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _repeats(once: float) -> int:
    return max(1, min(1000, math.ceil(SAMPLE_SECONDS / max(once, 1e-9))))


def _rounds(seconds: float, estimate: float) -> int:
    few = MIN_ROUNDS if MIN_ROUNDS * estimate <= 2 * seconds else SLOW_ROUNDS
    return max(few, min(MAX_ROUNDS, int(seconds / max(estimate, 1e-9))))


def _interleaved(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Every name once a round, each round in another random order: no variant always follows the same other one."""
    order, generator = list(names), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        yield from order


def _page_faults() -> int:
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- the roofline ---


@dataclass(frozen=True)
class Roofline:
    """Seconds of a device copy by the bytes it moves (read and written), and matmul rates, of this run."""

    copies: tuple[tuple[int, float], ...]
    matmul: Mapping[str, float]

    @property
    def bandwidth(self) -> float:
        """Of the largest copy, in bytes a second."""
        return self.copies[-1][0] / self.copies[-1][1]

    def copy_seconds(self, moved: int) -> float:
        """Time of a copy of the same size, interpolated: small ones are bound by launch, or run in a cache."""
        sizes = [size for size, _ in self.copies]
        at = bisect_left(sizes, moved)
        if at == 0:
            return self.copies[0][1]
        if at == len(sizes):
            return moved / self.bandwidth
        (low, fast), (high, slow) = self.copies[at - 1], self.copies[at]
        return fast * (slow / fast) ** (math.log(moved / low) / math.log(high / low))

    def seconds(self, moved: int, flops: int, dtype: torch.dtype) -> float:
        """The shortest time that copy and matmul rates allow."""
        rate = self.matmul.get(str(dtype).removeprefix("torch."))
        return max(self.copy_seconds(moved), flops / rate if rate else 0.0)


def measure_roofline(
    device: torch.device, timer: Any, moved_at_most: int, dtypes: Sequence[torch.dtype], seconds: float
) -> Roofline:
    """Copies up to the first size that moves more than any case, and a square matmul of each dtype."""
    largest, size = min(max(4 * moved_at_most, 1 << 20), 1 << 33), 4096 if device.type == "cuda" else 1024
    largest = min(largest, (available_memory(device) or 4 * largest) // 4)
    copies: list[tuple[int, float]] = []
    moved = 1 << 12
    while moved <= largest:
        source, target = (torch.zeros(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
        samples = timer.measure({"copy": lambda s=source, t=target: t.copy_(s)}, seconds)["copy"]["samples"]
        best = min(samples)  # a bound is what was reached at best, and to move less takes no longer
        copies = [(smaller, min(took, best)) for smaller, took in copies] + [(moved, best)]
        moved *= 4
        del source, target
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        samples = timer.measure({"matmul": lambda a=a, b=b: a @ b}, seconds)["matmul"]["samples"]
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / min(samples)
    return Roofline(tuple(copies), rates)
