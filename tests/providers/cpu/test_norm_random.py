"""Drawn calls of the norm functions on the native CPU kernels, on one to three threads."""

from __future__ import annotations

import pytest
import torch

from fusednorm import dispatch

pytest.importorskip("hypothesis")
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from strategies import CHECKS, LEAD, NARROW, WIDE, Drawn, Memory, calls, hold_to_budget

REASON = dispatch.unavailable_reason("cpu")
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=f"provider cpu: {REASON}"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),  # eager torch's own
]
THREADS = st.integers(1, 3)
# rows beyond a chunk of the partial sums and beyond what one thread is given; columns past 64 KB a row
ROWS = LEAD | LEAD | st.sampled_from([67, 130, 515])
COLUMNS = st.one_of(NARROW, NARROW, NARROW, WIDE)

# A gradient of zero, since all of a row's cotangents are equal. Eager hits it exactly where these have 16 bits.
CANCELLING = Drawn(
    function="layer_norm",
    shape=(2, 1024),
    normalized_ndim=1,
    memory={"x": Memory((0,), lead_step=1, column_step=1, margin=0, expand=-1, overlap=3, negated=False)},
    shifts={"bias": 0},
    dtypes={"x": torch.bfloat16, "bias": torch.float32},
    options={"eps": 1e-05},
    seed_in_a_tensor=False,
    used=(True, True),
    cotangent="one for a row",
    generator_seed=213,
)


def hold_on_threads(drawn, threads: int) -> None:
    note(f"{threads} threads")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hold_to_budget(drawn, "cpu")
    finally:
        torch.set_num_threads(before)


@settings(max_examples=150, derandomize=True, **CHECKS)
@example(CANCELLING, 1)
@given(calls(NARROW, ROWS, most=40_000, dropout_over_several=True), THREADS)
def test_a_hundred_and_fifty_drawn_calls_on_the_cpu(drawn, threads):
    hold_on_threads(drawn, threads)


@pytest.mark.slow
@settings(max_examples=2000, **CHECKS)
@given(calls(COLUMNS, ROWS, most=150_000, dropout_over_several=True), THREADS)
def test_two_thousand_fresh_calls_on_the_cpu(drawn, threads):
    hold_on_threads(drawn, threads)
