"""How a case is measured: checked against float64, then timed beside its baselines and a roofline."""

# ruff: noqa: F401 - what callers take from here

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
from fusednorm.tuning.conditions import best_device, steady_machine
from fusednorm.tuning.load import available_memory
from fusednorm.tuning.timers import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    SLOW_ROUNDS,
    CpuTimer,
    CudaTimer,
    median_interval,
    timer_for,
)
