"""Drawn calls of the norm functions on the Triton kernels.

Sizes stay small because the interpreter runs the kernels where there is no GPU; they straddle every tile's edge.
"""

from __future__ import annotations

import pytest
import torch

from fusednorm import dispatch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import CHECKS, NARROW, WIDE, calls, hold_to_budget

pytestmark = [
    pytest.mark.skipif(
        dispatch.unavailable_reason("triton") is not None, reason=f"triton: {dispatch.unavailable_reason('triton')}"
    ),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),  # eager torch's own
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=30, derandomize=True, **CHECKS)
@given(calls(NARROW))
def test_thirty_drawn_calls_on_triton(drawn):
    hold_to_budget(drawn, "triton", DEVICE)


@pytest.mark.slow
@settings(max_examples=300, **CHECKS)
@given(calls(st.one_of(NARROW, NARROW, NARROW, WIDE)))
def test_three_hundred_fresh_calls_on_triton(drawn):
    hold_to_budget(drawn, "triton", DEVICE)
