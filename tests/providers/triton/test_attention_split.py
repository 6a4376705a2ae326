"""Attention's forward in Triton with the keys shared out among programs, interpreted, against float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from oracle_attention import AttentionCall, check
from torch import Tensor

from fusednorm import scaled_dot_product_attention, varlen_attention
from fusednorm.providers.triton import attention as triton_attention
from fusednorm.providers.triton import attention_config as table
from fusednorm.providers.triton import host
from fusednorm.providers.triton import launch as triton_launch
from tests.attention import test_masked as masked
from tests.providers.test_attention import leaves_of, small_tiles

__all__ = ["small_tiles"]  # which pytest finds by name
pytestmark = pytest.mark.usefixtures("triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARNED = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # by the interpreter, of maxima of NaN
KEYS = torch.arange(75)


@pytest.fixture
def parts_of_table(monkeypatch):
    """Three splits, and in every call from then on the number that it is called with."""

    def share(n_splits: int) -> None:
        monkeypatch.setattr(table, "key_splits", lambda *_: n_splits)
        triton_attention.forget_variants()

    share(3)
    yield share
    triton_attention.forget_variants()


@pytest.fixture
def parts(small_tiles, parts_of_table):
    """The same with small tiles."""
    return parts_of_table


def hold(options, leaves, generator, mask=None):
    """out and lse, within the budget. The backward does not know of splits."""
    check(AttentionCall(options, mask), leaves, generator, gradients=False)


CALLS = {
    "all": ((3, 70), {}),
    "whole_tiles": ((16, 96), {}),
    "one_query": ((1, 75), {}),
    "two_tiles_of_queries": ((20, 75), {}),
    "fewer_keys_than_splits": ((5, 2), {}),
    "fewer_tiles_than_splits": ((5, 25), {}),
    "causal": ((20, 50), {"is_causal": True}),
    "causal_lower_right": ((5, 75), {"is_causal": True, "causal_align": "lower_right"}),
    "causal_lower_right_one_query": ((1, 75), {"is_causal": True, "causal_align": "lower_right"}),
    "queries_that_see_nothing": ((40, 20), {"is_causal": True, "causal_align": "lower_right"}),
    "window_of_one_tile": ((3, 75), {"window": (4, 2), "causal_align": "lower_right"}),
    "window_of_several_tiles": ((20, 90), {"window": (40, 36)}),
    "window_left": ((4, 75), {"window": (50, None), "causal_align": "lower_right"}),
    "window_right": ((4, 75), {"window": (None, 20)}),
    "softcap": ((4, 75), {"softcap": 1.5}),
    "softcap_causal": ((17, 50), {"softcap": 1.5, "is_causal": True}),
    "negative_scale": ((4, 75), {"scale": -0.4}),
    "zero_scale": ((4, 75), {"scale": 0.0}),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if dtype == DTYPES[n % 3] else pytest.mark.slow)
        for n, name in enumerate(CALLS)
        for dtype in DTYPES
    ],
    ids=str,
)
def test_split_attention(name, dtype, parts, generator):
    (n_queries, n_keys), options = CALLS[name]
    hold(options, leaves_of(generator, dtype, n_queries, n_keys, heads=2, batch=2), generator)


@pytest.mark.parametrize("n_splits", [2, 5, 17, 40])
def test_split_attention_by_any_number_of_splits(n_splits, parts, generator):
    """Some have no tile, and more than 16 are merged in several steps."""
    parts(n_splits)
    hold({"window": (200, 60)}, leaves_of(generator, torch.float32, 2, 300), generator)


@pytest.mark.parametrize("dims", [(64, 64), (40, 8), (24, 33), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_attention_of_other_head_dims(dims, dtype, parts, generator):
    hold({}, leaves_of(generator, dtype, 5, 50, *dims, heads=2), generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_split_attention_with_the_tiles_of_the_table(dtype, parts_of_table, generator):
    hold({"is_causal": True}, leaves_of(generator, dtype, 4, 270, 80, heads=2), generator)


def test_gradients_after_split_attention(parts, generator):
    """Of what the merged out and lse say."""
    leaves = leaves_of(generator, torch.float32, 5, 40, heads=4, key_heads=2, batch=2)
    leaves["mask"] = torch.randn(5, 40, generator=generator)
    options = {"enable_gqa": True, "is_causal": True, "causal_align": "lower_right"}
    check(AttentionCall({"key_mask": (KEYS[:40] % 3 > 0).expand(2, 40), **options}), leaves, generator)


# --- masks ---

HIDDEN = {
    "end": KEYS < 20,  # all that is seen lies in two tiles
    "beginning": KEYS >= 40,
    "a_split": (KEYS < 10) | (KEYS > 60),  # the one in the middle
    "every_third": KEYS % 3 > 0,
    "everything": KEYS < 0,
    "all_but_one": KEYS == 33,
}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"is_causal": True, "causal_align": "lower_right"}, torch.float16),
        ({"window": (30, 0), "causal_align": "lower_right", "softcap": 2.0}, torch.float32),
    ],
    ids=str,
)
def test_split_attention_with_key_masks(options, dtype, parts, generator):
    key_mask = torch.stack([*HIDDEN.values()])
    leaves = leaves_of(generator, dtype, 3, 75, heads=2, batch=len(key_mask))
    hold({"key_mask": key_mask, **options}, leaves, generator)


MASKS = [(4, 75), (1, 75), (2, 1, 4, 75), (1, 2, 1, 75), (2, 2, 4, 75), (4, 1), (2, 1, 1, 80), (4, 80)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["additive", "bool"])
def test_split_attention_with_masks(kind, shape, parts, generator):
    """80 keys are whole vectors, 75 are not. A query sees nothing, and another none of a split."""
    n_keys = max(shape[-1], 75)
    leaves = leaves_of(generator, DTYPES[MASKS.index(shape) % 3], 4, n_keys, heads=2, batch=2)
    mask = torch.randn(shape, generator=generator)
    if shape[-2] > 1:
        mask[..., 0, :] = -torch.inf
        mask[..., 1, :40] = -torch.inf
    if kind == "bool":
        hold({}, leaves, generator, mask > -0.3)
    else:
        leaves["mask"] = mask.to(leaves["q"].dtype)
        hold({"window": (None, 60)}, leaves, generator)


# --- heads that share keys ---


@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "causal_align": "lower_right"},
        {"window": (20, 0), "causal_align": "lower_right"},
        {"window": (300, 5), "softcap": 2.0, "causal_align": "lower_right"},
        {"is_causal": True},
    ],
    ids=str,
)
def test_split_attention_of_grouped_queries(n_queries, options, parts, generator):
    leaves = leaves_of(generator, DTYPES[len(options) % 3], n_queries, 75, heads=6, key_heads=2, batch=2)
    key_mask = torch.stack((HIDDEN["a_split"], HIDDEN["everything"]))
    for more in ({}, {"key_mask": key_mask}):
        hold({"enable_gqa": True, **options, **more}, leaves, generator)


@pytest.mark.parametrize(
    "shape", [(1, 75), (2, 1, 1, 75), (1, 6, 1, 75), (6, 1, 80), (2, 6, 1, 1), (2, 6, 1, 80)], ids=str
)
def test_split_attention_of_grouped_queries_with_masks(shape, parts, generator):
    leaves = leaves_of(generator, torch.float16, 1, max(75, shape[-1]), heads=6, key_heads=2, batch=2)
    mask = torch.randn(shape, generator=generator)
    hold({"enable_gqa": True}, leaves, generator, mask > -0.5)
    hold({"enable_gqa": True}, leaves | {"mask": mask.half()}, generator)


def test_one_query_of_grouped_heads_is_a_tile_of_queries(parts, launches):
    """Unless keys are hidden by place, or there are several queries."""
    shapes = {"q": (2, 6, 1, 16), "k": (2, 2, 75, 16), "v": (2, 2, 75, 16)}
    q, k, v = (torch.zeros(shape) for shape in shapes.values())

    def heads(q=q, **options):
        launches.clear()
        scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        assert [launch.kernel for launch in launches] == ["_attention_fwd_kernel", "_attention_fwd_merge_kernel"]
        return launches[0].grid[0] // 2

    assert heads() == heads(is_causal=True, causal_align="lower_right") == heads(window=(74, 74)) == 2
    assert heads(window=(80, 0), causal_align="lower_right") == 2
    assert heads(is_causal=True) == heads(window=(73, 0), causal_align="lower_right") == heads(window=(0, 73)) == 6
    assert heads(torch.zeros(2, 6, 2, 16)) == 6


@pytest.mark.parametrize("lay", ["bshd", "unaligned", "step_2"])
def test_split_attention_at_other_layouts(lay, parts, generator):
    leaves = {}
    for name, t in leaves_of(generator, torch.float32, 1, 75, 40, heads=4, key_heads=2, batch=2).items():
        if lay == "bshd":
            leaves[name] = t.transpose(1, 2).contiguous().transpose(1, 2)
        elif lay == "unaligned":
            leaves[name] = t.new_zeros(1 + t.numel())[1:].view(t.shape).copy_(t)
        else:
            leaves[name] = t.repeat_interleave(2, -1)[..., ::2]
    hold({"enable_gqa": True}, leaves, generator)


def test_heads_too_far_apart_are_no_queries_of_a_tile(parts, launches):
    q = torch.zeros(1).expand(1, 2, 1, 16).as_strided((1, 2, 1, 16), (0, 0, 0, 0))
    far = torch.empty(2**23 + 16).as_strided((1, 2, 1, 16), (0, 2**23, 16, 1))
    k = torch.zeros(1, 1, 75, 16)
    for queries, heads in ((q, 1), (far, 2)):
        launches.clear()
        scaled_dot_product_attention(queries, k, k, enable_gqa=True)
        assert launches[0].grid[0] == heads


# --- what is not finite ---


@pytest.mark.parametrize("hiding", masked.HIDING)
@pytest.mark.parametrize(
    "bad", [torch.nan, *[pytest.param(bad, marks=pytest.mark.slow) for bad in (torch.inf, -torch.inf)]]
)
def test_split_attention_of_what_is_masked(hiding, bad, parts, generator):
    masked.test_what_is_masked_reaches_nothing(hiding, False, bad, contextlib.nullcontext(), "cpu", generator)


def test_split_attention_of_infinite_values(parts):
    masked.test_infinite_values_that_are_seen_are_passed_on(None, contextlib.nullcontext(), "cpu")


def both(parts, *arguments, **options) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) of three splits, and of one program."""
    found = []
    for n_splits in (3, 1):
        parts(n_splits)
        found.append(scaled_dot_product_attention(*arguments, **options, return_lse=True))
    return found


@WARNED
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "causal_align": "lower_right"}, {"key_mask": True}], ids=str
)
@pytest.mark.parametrize(("place", "value"), [("q", torch.nan), ("k", torch.nan), ("v", torch.nan), ("v", torch.inf)])
def test_split_attention_is_not_finite_where_it_is_not_without_splits(place, value, options, parts, generator):
    leaves = leaves_of(generator, torch.float32, 4, 75, heads=2)
    leaves[place][0, 1, 2, 3] = value
    if "key_mask" in options:
        options = {"key_mask": HIDDEN["a_split"][None]}
    split, whole = both(parts, *leaves.values(), **options)
    for ours, expected in zip(split, whole):
        torch.testing.assert_close(ours, expected, equal_nan=True)
    assert not whole[0].isfinite().all()


@WARNED
@pytest.mark.parametrize("keys", [slice(0, 25), slice(32, 64), slice(50, 75)], ids=str)
def test_a_split_whose_logits_are_all_minus_infinite_leaves_the_others(keys, parts, generator):
    leaves = leaves_of(generator, torch.float32, 2, 75)
    leaves["q"] = leaves["q"].abs()
    leaves["k"][:, :, keys] = -torch.inf
    out, lse = scaled_dot_product_attention(*leaves.values(), return_lse=True)
    rest = torch.ones(75, dtype=torch.bool)
    rest[keys] = False
    expected = scaled_dot_product_attention(
        leaves["q"], leaves["k"][:, :, rest], leaves["v"][:, :, rest], return_lse=True
    )
    torch.testing.assert_close((out, lse), expected)


@WARNED
def test_split_attention_of_minus_infinite_logits_alone_is_nan(parts, generator):
    leaves = leaves_of(generator, torch.float32, 2, 75)
    leaves["q"] = leaves["q"].abs()
    leaves["k"][:] = -torch.inf
    for results in both(parts, *leaves.values()):
        assert all(result.isnan().all() for result in results)


# --- bits, and which calls are split ---


def test_split_attention_repeats_bit_for_bit(parts, generator):
    leaves = leaves_of(generator, torch.float16, 3, 75, heads=2, batch=2)
    first, second = (scaled_dot_product_attention(*leaves.values(), return_lse=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("key_heads", [1, 4])
def test_split_attention_of_a_sample_does_not_depend_on_its_batch(key_heads, monkeypatch, generator):
    """With the choice of the provider, on a device of 40 processors."""
    noted, launch = [], triton_launch.Variant.launch
    monkeypatch.setattr(host, "processors", lambda index: 40)
    monkeypatch.setattr(triton_launch.Variant, "launch", lambda *of: (noted.append(of[1][1]), launch(*of)))
    triton_attention.forget_variants()
    leaves = leaves_of(generator, torch.float16, 1, 1100, 16, heads=4, key_heads=key_heads, batch=3)
    whole = scaled_dot_product_attention(*leaves.values(), enable_gqa=True)
    alone = scaled_dot_product_attention(*[t[1:2] for t in leaves.values()], enable_gqa=True)
    assert torch.equal(whole[1:2], alone)
    triton_attention.forget_variants()
    assert noted == [8, 1, 8, 1]  # 1100 keys are 8 splits of two tiles


def test_which_calls_are_split(monkeypatch, launches):
    """Few programs for the processors, many keys, no dropout, no packed sequences."""
    monkeypatch.setattr(host, "processors", lambda index: 132)
    triton_attention.forget_variants()

    def splits(batch=1, heads=8, n_queries=1, n_keys=4096, key_heads=None, **options):
        launches.clear()
        memory = torch.zeros(1, dtype=torch.bfloat16)  # no value is read
        q = memory.expand(batch, heads, n_queries, 64)
        k = memory.expand(batch, key_heads or heads, n_keys, 64)
        scaled_dot_product_attention(q, k, k, enable_gqa=True, **options)
        assert [launch.kernel for launch in launches[1:]] == ["_attention_fwd_merge_kernel"] * (len(launches) - 1)
        assert (len(launches) == 2) == (launches[0].grid[1] > 1)
        return launches[0].grid[1]

    assert splits() == splits(batch=64) == 32  # two tiles each
    assert splits(n_keys=8192) == 33  # two programs for each processor
    assert splits(heads=32) == 8 and splits(heads=32, key_heads=4) == 32
    assert splits(n_keys=1023) == 1 and splits(n_keys=1024) == 8
    assert splits(heads=132) == 1 and splits(heads=131) == 2
    assert splits(n_queries=16) == 16 and splits(n_queries=64) == splits(n_queries=128) == 4
    assert splits(n_queries=64 * 17) == 1  # 136 programs
    assert splits(dropout_p=0.1, seed=3) == 1
    assert splits(is_causal=True, key_mask=torch.ones(1, 4096, dtype=torch.bool)) == 32
    launches.clear()
    packed = torch.zeros(4097, 8, 64)
    bounds = torch.tensor([0, 4097], dtype=torch.int32)
    varlen_attention(packed[:1], packed, packed, bounds.clamp(max=1), bounds, 1, 4097)
    assert len(launches) == 1 and launches[0].grid[1] == 1
    triton_attention.forget_variants()
