"""What is measured: operations, and the shapes, dtypes and directions they are measured at."""

# ruff: noqa: F401 - what callers take from here

from benchmarks.cases.base import Call, Leaves, Operation
from benchmarks.cases.norm import DROPOUT_P, EPS, Norm
from benchmarks.cases.operations import (
    DIRECTION_TITLES,
    DIRECTIONS,
    FULL,
    OPS,
    SWEEPS,
    TINY,
    TINY_ADAPTIVE,
    TINY_ATTENTION,
    TINY_LAYER,
    Case,
    Sweep,
    require_provider,
    runner,
    served_by,
    sweep,
    sweep_of,
)
