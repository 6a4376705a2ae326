"""Eager beside fused in pytest-benchmark's tables: every operation at two sizes, forward, and with backward.

    python3 -m pytest benchmarks/test_operations.py --benchmark-columns=min,median,iqr

For a quick look while a kernel is being changed; figures that are kept come from run.py, which interleaves the
variants and flushes the GPU's cache. Here too nothing is timed that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import measure
from benchmarks.cases import TINY, TINY_ADAPTIVE, TINY_ATTENTION, TINY_LAYER, Case, Sweep

DEVICE = measure.best_device()
MEDIUM = (4096, 4096) if DEVICE.type == "cuda" else (64, 1024)
ATTENTION = (4, 16, 2048, 64) if DEVICE.type == "cuda" else (1, 8, 256, 64)
ADAPTIVE = (8, 1024, 1536) if DEVICE.type == "cuda" else (2, 64, 384)
LAYER = (4, 2048, 1024) if DEVICE.type == "cuda" else (2, 64, 128)
CASES = Sweep(
    (TINY, MEDIUM),
    ("float32", "bfloat16"),
    ffn_shapes=(TINY, MEDIUM),
    attention_shapes=(TINY_ATTENTION, ATTENTION),
    layer_shapes=(TINY_LAYER, LAYER),
    adaptive_shapes=(TINY_ADAPTIVE, ADAPTIVE),
).cases()


@pytest.fixture(autouse=True)
def steady():
    with measure.steady_machine(None):
        yield


@pytest.fixture(scope="module", autouse=True)
def no_leftovers():
    yield
    measure.forget_problem()


def timed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, with the device's work waited for."""
    if DEVICE.type != "cuda":
        return call

    def synchronised() -> None:
        call()
        torch.cuda.synchronize(DEVICE)

    return synchronised


@pytest.mark.benchmark(max_time=0.05, min_rounds=5, warmup=False)
@pytest.mark.parametrize("who", ["eager", "fused"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_operation(benchmark, case: Case, who: str):
    if who == "fused":
        verdict = measure.check(case, DEVICE)
        assert verdict.ok, verdict.detail
    build = case.operation.eager if who == "eager" else case.operation.fused
    benchmark.group = case.name
    benchmark(timed(measure.problem(case, DEVICE).runner(case.direction, build)))
