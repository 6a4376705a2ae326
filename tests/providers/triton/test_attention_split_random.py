"""Drawn calls of attention in Triton with the keys shared out among programs, against float64."""

from __future__ import annotations

import pytest
import torch
from backends import INTERPRETED
from oracle_attention import AttentionCall, check

import fusednorm
from fusednorm.providers.triton import attention as triton_attention
from fusednorm.providers.triton import attention_config as table

pytest.importorskip("hypothesis")
from hypothesis import given, note, settings
from hypothesis import strategies as st
from strategies import CHECKS

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernels itself, with the splits that it takes")

WINDOWS = st.none() | st.tuples(st.none() | st.integers(0, 90), st.none() | st.integers(0, 90))
MASKS = st.sampled_from(["none"] * 3 + ["bool", "additive"])


@st.composite
def calls(draw):
    """(splits, call, leaves)"""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    batch, key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n_queries, n_keys = draw(st.just(1) | st.integers(1, 20)), draw(st.integers(1, 120))
    dim, dim_v = draw(st.sampled_from([8, 16, 24])), draw(st.sampled_from([8, 16, 20]))
    shapes = {
        "q": (batch, key_heads * group, n_queries, dim),
        "k": (batch, key_heads, n_keys, dim),
        "v": (batch, key_heads, n_keys, dim_v),
    }
    options = {
        "is_causal": draw(st.booleans()),
        "causal_align": draw(st.sampled_from(["upper_left", "lower_right"])),
        "window": draw(WINDOWS),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0])),
        "enable_gqa": group > 1,
    }
    if draw(st.booleans()):
        options["key_mask"] = torch.rand(batch, n_keys, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.7]))
    leaves = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    kind, sizes = draw(MASKS), [draw(st.sampled_from([1, size])) for size in (*shapes["q"][:3], n_keys)]
    mask = torch.randn(sizes, generator=generator) if kind != "none" else None
    if mask is not None and kind == "additive":
        leaves["mask"] = mask.masked_fill(torch.rand(sizes, generator=generator) < 0.2, -torch.inf).to(dtype)
    call = AttentionCall(options, None if mask is None or kind == "additive" else mask > -0.7)
    n_splits = draw(st.integers(2, 9))
    note(f"{n_splits} splits, {dtype}, {shapes}, {options}, {kind} mask {sizes}")
    return n_splits, call, leaves, generator


def hold(drawn):
    n_splits, call, leaves, generator = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "key_splits", lambda *_: n_splits)
        patch.setattr(table, "forward", lambda need: table.Tile(16, 16, 4, 1))
        triton_attention.forget_variants()
        with fusednorm.use_provider("triton"):
            check(call, leaves, generator, gradients=False)
    triton_attention.forget_variants()


@settings(max_examples=25, derandomize=True, **CHECKS)
@given(calls())
def test_25_drawn_calls_of_split_attention(drawn):
    hold(drawn)


@pytest.mark.slow
@settings(max_examples=300, **CHECKS)
@given(calls())
def test_300_fresh_calls_of_split_attention(drawn):
    hold(drawn)
