"""How a case is measured: checked against float64, then timed beside its baselines and a roofline."""

from benchmarks.measure.conditions import available_memory, best_device, steady_machine
from benchmarks.measure.correctness import (
    DRAWS,
    PEER_TOLERANCE,
    Problem,
    Verdict,
    check,
    forget_problem,
    problem,
    results,
)
from benchmarks.measure.roofline import Roofline, measure_roofline
from benchmarks.measure.timers import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    SLOW_ROUNDS,
    CpuTimer,
    CudaTimer,
    median_interval,
    timer_for,
)

__all__ = [
    "DRAWS",
    "MAX_ROUNDS",
    "MIN_ROUNDS",
    "PEER_TOLERANCE",
    "SLOW_ROUNDS",
    "CpuTimer",
    "CudaTimer",
    "Problem",
    "Roofline",
    "Verdict",
    "available_memory",
    "best_device",
    "check",
    "forget_problem",
    "measure_roofline",
    "median_interval",
    "problem",
    "results",
    "steady_machine",
    "timer_for",
]
