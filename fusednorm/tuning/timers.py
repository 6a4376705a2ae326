"""Samples of a call's time on a CPU and on a GPU, and the interval of their median."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

Calls = Mapping[str, Callable[[], Any]]  # by the variant's name
Around = Callable[[str], contextlib.AbstractContextManager[Any]]
MIN_ROUNDS, SLOW_ROUNDS, MAX_ROUNDS = 9, 5, 61
WARM = 2  # calls after a change of provider: the first makes a plan, the second has memory where it will be
SAMPLE_SECONDS = 2e-4  # calls are repeated within a sample until it takes as long
GRAPHED = 10  # calls in a CUDA graph, whose own launch is a part of a sample
SHORT = 1e-3  # seconds; the device's time of a call that takes longer hides the host's


def alone(name: str) -> contextlib.AbstractContextManager[None]:
    """No context."""
    return contextlib.nullcontext()


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


class CpuTimer:
    """Wall-clock samples, variants interleaved, with the page faults of a call counted."""

    kind = "wall clock"

    def measure(
        self, calls: Calls, seconds: float, around: Around = alone, replayed: bool = False
    ) -> dict[str, dict[str, Any]]:
        """`around` gives the context of a variant's samples. Its first calls are not timed; nothing is `replayed`."""
        repeats, estimate = {}, 0.0
        for name, call in calls.items():
            with around(name):
                call()
                repeats[name] = _repeats(_wall(call, 1))
                once = _wall(call, repeats[name])
            repeats[name] = _repeats(once)
            estimate += once * (repeats[name] + WARM * (around is not alone))
        found: dict[str, dict[str, Any]]
        found = {name: {"samples": [], "repeats": repeats[name], "faults": 0} for name in calls}
        with _no_garbage_collection():
            for name in _interleaved(calls, _rounds(seconds, estimate)):
                with around(name):
                    for _ in range(WARM * (around is not alone)):
                        calls[name]()
                    faults = _page_faults()
                    found[name]["samples"].append(_wall(calls[name], repeats[name]))
                    found[name]["faults"] += _page_faults() - faults
        for variant in found.values():
            variant["faults"] /= len(variant["samples"]) * variant["repeats"]
        return found


class CudaTimer:
    """Device time between two events, after the L2 cache was flushed; apart from it time with the host, and memory.

    A short call's device time is also taken as a CUDA graph replays it ("replayed"), where it can be captured.

    A sleep in front keeps the device busy until the host has queued everything, so that no host time comes between
    the two events. `cuda` is a parameter so that the logic can be tested without a device.
    """

    kind = "CUDA events, L2 flushed"

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        properties = cuda.get_device_properties(device)
        l2 = getattr(properties, "L2_cache_size", 0) or 64 << 20
        self.scratch = torch.zeros(l2, dtype=torch.float32, device=device)  # four times the cache
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
        self.scratch.sum()  # reads alone: lines that were written would go back to memory while the call is timed
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

    def _captured(self, call: Callable[[], Any]) -> Any:
        """`GRAPHED` calls in a CUDA graph; None where they cannot be captured.

        Without `torch.cuda.graph`, which empties the allocator's cache each time.
        """
        try:
            graph, stream = self.cuda.CUDAGraph(), self.cuda.Stream(self.device)
            stream.wait_stream(self.cuda.current_stream(self.device))
            with self.cuda.stream(stream):
                call()  # what this stream has to have before
                graph.capture_begin()
                try:
                    for _ in range(GRAPHED):
                        call()
                finally:
                    graph.capture_end()
        except RuntimeError:
            return None
        return graph

    def _replayed_sample(self, graph: Any) -> float:
        """Seconds a call on the device, calls back to back."""
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        self.cuda.synchronize(self.device)
        return start.elapsed_time(end) * 1e-3 / GRAPHED

    def measure(
        self, calls: Calls, seconds: float, around: Around = alone, replayed: bool = False
    ) -> dict[str, dict[str, Any]]:
        """`around` gives the context of a variant's samples. Its first calls are not timed."""
        found: dict[str, dict[str, Any]] = {}
        hosts, estimate, graphs = {}, 0.0, {}
        for name, call in calls.items():
            with around(name):
                for _ in range(3):  # compilation and autotuning fall into these
                    call()
                hosts[name] = self._host_seconds(call)
                once = self._inclusive_sample(call, 3)
                repeats = _repeats(once)
                peak = self._peak_memory(call)
                graphs[name] = self._captured(call) if replayed and once < SHORT else None
            found[name] = {"samples": [], "inclusive": [], "repeats": repeats, "host": hosts[name], "peak": peak}
            estimate += 3 * max(once, hosts[name]) + repeats * once + 1e-4
            if graphs[name] is not None:
                found[name]["replayed"] = []
                estimate += GRAPHED * self._replayed_sample(graphs[name]) + 5e-5
        with _no_garbage_collection():
            for name in _interleaved(calls, _rounds(seconds, estimate)):
                with around(name):
                    for _ in range(WARM * (around is not alone)):
                        calls[name]()
                    found[name]["samples"].append(self._device_sample(calls[name], hosts[name]))
                    found[name]["inclusive"].append(self._inclusive_sample(calls[name], found[name]["repeats"]))
                    if graphs[name] is not None:
                        found[name]["replayed"].append(self._replayed_sample(graphs[name]))
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
