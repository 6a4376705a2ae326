"""Samples of time on a GPU, with a stand-in whose clock is advanced by the work that is queued."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusednorm.tuning.timers import SLOW_ROUNDS, CudaTimer
from tests.helpers.tuning_records import CPU


class FakeCuda:
    """A device whose clock is advanced by the work queued; `torch.cuda` in so far as the timer uses it."""

    def __init__(self):
        self.device_clock, self.asleep, self.peak, self.capturing = 0.0, [], 0, False

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1 << 10, clock_rate=1_000_000)

    def Event(self, enable_timing):
        event = SimpleNamespace(elapsed_time=lambda end: (end.at - event.at) * 1e3)
        event.record = lambda: setattr(event, "at", self.device_clock)
        return event

    def _sleep(self, cycles):
        self.asleep.append(cycles)
        self.device_clock += cycles / 1e9

    synchronize = staticmethod(lambda device: None)
    memory_allocated = staticmethod(lambda device: 1000)

    def reset_peak_memory_stats(self, device):
        self.peak = 1000

    def max_memory_allocated(self, device):
        return self.peak

    def Stream(self, device):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        return nullcontext()

    def CUDAGraph(self):
        """What is queued while it captures takes no time, and is what a replay takes."""
        graph = SimpleNamespace(begin=0.0, seconds=0.0)

        def begin():
            graph.begin, self.capturing = self.device_clock, True

        def end():
            graph.seconds, self.device_clock, self.capturing = self.device_clock - graph.begin, graph.begin, False

        def replay():
            self.device_clock += graph.seconds

        graph.capture_begin, graph.capture_end, graph.replay = begin, end, replay
        return graph

    def kernel(self, seconds, memory):
        def call():
            self.device_clock += seconds
            self.peak = max(self.peak, 1000 + memory)

        return call


def test_cuda_timer_counts_device_time_alone():
    cuda = FakeCuda()
    timer = CudaTimer(CPU, cuda)
    calls = {"fused": cuda.kernel(1e-3, 64), "eager": cuda.kernel(2e-3, 256)}
    found = timer.measure(calls, 0.02)
    for name, seconds, peak in (("fused", 1e-3, 64), ("eager", 2e-3, 256)):
        samples = found[name]["samples"]
        assert samples == pytest.approx([seconds] * len(samples)) and found[name]["peak"] == peak
        assert len(found[name]["inclusive"]) == len(samples) >= SLOW_ROUNDS
    assert min(cuda.asleep) >= 5e-5 * 1e9  # the device sleeps while the host queues


def test_cuda_timer_flushes_by_reading():
    """What is written would be written back during the call."""
    timer, seen = CudaTimer(CPU, FakeCuda()), []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append((op, [id(arg) for arg in args]))
            return op(*args, **(kwargs or {}))

    with Noted():
        timer._device_sample(lambda: seen.append("call"), 0.0)
    assert seen == [(torch.ops.aten.sum.default, [id(timer.scratch)]), "call"]
    assert timer.scratch.nbytes == 4 << 10


@pytest.mark.parametrize("wanted", [False, True])
def test_cuda_timer_replays_a_graph_of_short_calls(wanted, monkeypatch):
    cuda = FakeCuda()
    timer, short, long = CudaTimer(CPU, cuda), cuda.kernel(2e-6, 64), cuda.kernel(1.0, 64)
    monkeypatch.setattr(timer, "_inclusive_sample", lambda call, repeats: 1.0 if call is long else 1e-5)

    def refused():
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    found = timer.measure({"short": short, "refused": refused, "long": long}, 0.02, replayed=wanted)
    assert {name for name, variant in found.items() if "replayed" in variant} == ({"short"} if wanted else set())
    if wanted:
        samples = found["short"]["replayed"]
        assert samples == pytest.approx([2e-6] * len(samples)) and len(samples) == len(found["short"]["inclusive"])
