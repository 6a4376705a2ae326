"""A training step of the encoder layer on the CPU, beside torch's: its time, and the bytes that it keeps."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from drop_in import twins

from fusednorm import activation_bytes, dispatch
from tests.modules.test_transformer_recompute import kept

NATIVE = pytest.mark.skipif(
    dispatch.unavailable_reason("cpu") is not None, reason="the native library for the CPU is not built"
)
D, S, B, P = 512, 256, 8, 0.1
NORM_FIRST = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])


def pair(norm_first: bool):
    return twins("TransformerEncoderLayer", D, 8, 4 * D, P, batch_first=True, norm_first=norm_first)


@NATIVE
@NORM_FIRST
def test_at_most_seven_tenths_of_torchs_activation_bytes(norm_first):
    theirs, ours = pair(norm_first)
    x = torch.randn(B, S, D, requires_grad=True)
    own = kept(ours, (x,))
    assert own == sum(activation_bytes(ours, B, S).values())
    assert own <= 0.7 * kept(theirs, (x,))


@NATIVE
@NORM_FIRST
@pytest.mark.slow
@pytest.mark.alone
def test_a_training_step_is_at_least_as_fast_as_torchs(norm_first):
    """Medians of steps taken in turn."""
    modules = pair(norm_first)
    x, dout = torch.randn(B, S, D, requires_grad=True), torch.randn(B, S, D)
    times: list[list[float]] = [[], []]
    for _ in range(11):
        for module, taken in zip(modules, times, strict=True):
            module.zero_grad()
            start = time.perf_counter()
            module(x).backward(dout)
            taken.append(time.perf_counter() - start)
    theirs, ours = (statistics.median(taken[1:]) for taken in times)
    assert ours <= theirs, f"ours {1e3 * ours:.0f} ms, torch's {1e3 * theirs:.0f} ms"
