"""The Triton kernels of attention in the interpreter: every path, against float64.

The interpreter runs a program at a time in Python, so each shape here is the smallest that reaches its code path, and
most tests take tiles of 16 x 16, for a short sequence to have tiles seen in full, in part, and not at all.
"""

from __future__ import annotations

import contextlib

import attention_paths as paths
import pytest
import torch
from attention_paths import DTYPES, MASKS, SEEN, leaves_of, quick
from backends import INTERPRETED
from oracle_attention import AttentionCall, check

import fusednorm
from fusednorm import scaled_dot_product_attention
from fusednorm._options import AttentionInputs, AttentionOptions
from fusednorm.dispatch import rules
from fusednorm.providers.triton import attention as triton_attention
from fusednorm.providers.triton import attention_config as table
from tests.attention import test_attention as general
from tests.attention import test_masked as masked

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU runs the kernels itself, in every other test")

DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)


CHOICES = ("forward", "backward_keys", "backward_queries", "backward_mask")
using = contextlib.nullcontext  # what the general tests enter; the provider is chosen already


@pytest.fixture(autouse=True)
def triton():
    with fusednorm.use_provider("triton"):
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    for name in CHOICES:
        monkeypatch.setattr(table, name, lambda need: table.Tile(16, 16, 4, 1))
    triton_attention.forget_variants()
    yield
    triton_attention.forget_variants()


# --- tiles seen in full, in part and not at all ---


@DTYPE
@pytest.mark.parametrize(
    "name",
    quick(SEEN, *(name for name in SEEN if name not in ("window_left", "causal_window", "window_of_several_tiles"))),
)
def test_triton_attention_of_tiles_seen_in_full_in_part_and_not_at_all(name, dtype, small_tiles, generator):
    paths.tiles(name, dtype, generator)


@DTYPE
@pytest.mark.parametrize("key_heads", quick([1, 2], 2))
def test_triton_attention_of_grouped_queries(key_heads, dtype, small_tiles, generator):
    paths.grouped_queries(key_heads, dtype, generator)


@pytest.mark.parametrize("dim", [1, 8, 40, 64, 80, 96, 128, 256])
def test_triton_attention_of_every_head_dim(dim, generator):
    """With the tiles of the table; dtypes in turn."""
    paths.head_dim(dim, generator)


@DTYPE
@pytest.mark.parametrize("dims", [(16, 40), (40, 8), (24, 33)], ids=str)
def test_triton_attention_of_values_of_another_size(dims, dtype, small_tiles, generator):
    paths.values_of_another_size(dims, dtype, generator)


@pytest.mark.parametrize("dtype", quick(DTYPES, torch.bfloat16), ids=str)
def test_triton_attention_at_257(dtype, generator):
    """With the tiles of the table; several of each kind."""
    leaves = leaves_of(generator, dtype, 257, 257, 64)
    check(AttentionCall({"is_causal": True}), leaves, generator)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "dropout_p": 0.1, "seed": 1}, {"window": (64, 64)}], ids=str
)
@pytest.mark.parametrize("dim", [8, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_attention_of_every_head_dim_at_257(dtype, dim, options, generator):
    check(AttentionCall(options), leaves_of(generator, dtype, 257, 200, dim), generator)


def test_triton_attention_at_1025(generator):
    leaves = leaves_of(generator, torch.bfloat16, 1025, 1025, 16)
    out = scaled_dot_product_attention(*leaves.values(), is_causal=True)
    q, k, v = (t.double() for t in leaves.values())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


# --- masks ---


@pytest.mark.parametrize("shape", quick(MASKS, (20, 35), (1, 35), (2, 20, 35), (2, 1, 20, 35), (2, 2, 20, 35)), ids=str)
def test_triton_attention_with_additive_masks_and_their_gradients(shape, small_tiles, generator):
    paths.additive_mask(shape, generator)


@pytest.mark.parametrize("shape", [MASKS[0], MASKS[7]], ids=str)
@pytest.mark.parametrize("lay", quick(["transposed", "expanded", "step_2"], "transposed"))
def test_triton_attention_with_masks_of_any_strides(lay, shape, small_tiles, generator):
    paths.mask_of_any_strides(lay, shape, generator)


@DTYPE
@pytest.mark.parametrize("shape", [MASKS[0], MASKS[6]], ids=str)
def test_triton_attention_with_bool_masks(shape, dtype, small_tiles, generator):
    paths.bool_mask(shape, dtype, generator)


@DTYPE
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_p": 0.2, "seed": 4}], ids=["bare", "options"])
def test_triton_attention_with_key_masks(options, dtype, small_tiles, generator):
    """Padding at the end, at the beginning, in the middle, and everywhere."""
    paths.key_mask(options, dtype, generator)


@pytest.mark.parametrize("dims", quick([(40, 40), (256, 256), (24, 136)], (40, 40), (24, 136)), ids=str)
def test_triton_attention_with_products_of_a_part_of_the_columns_at_a_time(dims, small_tiles, monkeypatch, generator):
    """A part that is cut off, and values of other parts than keys."""
    for kernel in ("forward", "keys", "queries"):
        monkeypatch.setattr(table, f"part_of_{kernel}", lambda need: 16)
    leaves = leaves_of(generator, torch.float16, 20, 35, *dims, heads=2, key_heads=1)
    leaves["mask"] = torch.randn(1, 2, 20, 35, generator=generator).half()
    options = {"enable_gqa": True, "window": (9, 30), "softcap": 2.0, "dropout_p": 0.1, "seed": 3}
    check(AttentionCall(options), leaves, generator)
    del leaves["mask"]
    check(AttentionCall({"enable_gqa": True}), leaves, generator)


@pytest.mark.parametrize("dim", quick([80, 256], 80))
def test_triton_attention_of_what_is_masked_at_heads_made_again_in_parts(dim, small_tiles, generator):
    """A hidden key and a query that sees nothing are not finite, so every result of their tiles is made again."""
    paths.made_again(dim, generator)


def test_triton_attention_with_only_the_gradients_that_are_wanted(small_tiles):
    paths.only_wanted_gradients()


# --- what the general tests choose, here at the smallest ---


@pytest.mark.parametrize("bad", quick([float("nan"), float("inf")], float("inf")), ids=str)
@pytest.mark.parametrize(
    "hiding", quick(["bool_documents", "key_mask", "keys_after_causal", "queries_outside_window"], "key_mask")
)
def test_triton_attention_of_what_is_masked(hiding, bad, small_tiles, generator):
    masked.test_what_is_masked_reaches_nothing(hiding, False, bad, using(), "cpu", generator)


def test_triton_attention_of_what_is_dropped(small_tiles, generator):
    masked.test_what_is_dropped_reaches_nothing(float("nan"), None, using(), "cpu", generator)


def test_triton_attention_of_infinite_values(small_tiles):
    masked.test_infinite_values_that_are_seen_are_passed_on(None, using(), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_attention_of_large_logits(dtype, small_tiles, generator):
    general.test_large_logits_do_not_overflow(dtype, using(), "cpu", generator)


@pytest.mark.parametrize("sizes", [(2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 4, 5)], ids=str)
def test_triton_attention_of_nothing(sizes):
    general.test_empty(sizes, {}, using(), "cpu")


@pytest.mark.parametrize("name", general.LAYOUTS)
def test_triton_attention_at_every_layout(name, small_tiles, generator):
    general.test_every_layout(name, {"is_causal": True}, using(), "cpu", generator)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "window": (3, None)}, {"dropout_p": 0.3, "seed": 8}], ids=str
)
def test_triton_attention_of_packed_sequences(options, small_tiles, generator):
    general.test_varlen_is_attention_of_each_sequence(1, options, torch.float32, using(), "cpu", generator)


@pytest.mark.parametrize("n_keys", [3, 33, 66])
def test_triton_attention_drops_what_dropout_mask_drops(n_keys, small_tiles):
    """Equal logits; the values and the cotangent are rows of the identity, so results and gradients show the mask."""
    paths.drops_what_dropout_mask_drops(n_keys)


def test_triton_attention_past_2_to_the_31_elements(generator):
    """A head, and a position, that far away; nothing between is touched."""
    paths.past_2_to_the_31_elements(generator)


# --- launches ---


def test_triton_attention_backward_repeats_bit_for_bit(small_tiles):
    paths.repeats_bit_for_bit()


def test_triton_attention_variants_do_not_depend_on_any_length(launches):
    for batch, heads, n_queries, n_keys in ((1, 1, 1, 1), (2, 3, 16, 48), (3, 1, 17, 1), (1, 2, 512, 64)):
        leaves = leaves_of(None, torch.bfloat16, n_queries, n_keys, 64, heads=heads, batch=batch)
        leaves = [leaf.requires_grad_() for leaf in leaves.values()]
        key_mask = torch.ones(batch, n_keys, dtype=torch.bool)
        options = {"key_mask": key_mask, "is_causal": True, "dropout_p": 0.1, "window": (n_keys, None)}
        out = scaled_dot_product_attention(*leaves, scale=0.1 * n_keys, **options)
        torch.autograd.grad(out, leaves, torch.zeros_like(out))
    assert len({launch.compiled for launch in launches}) == 4  # forward, delta, keys and values, queries


def test_triton_attention_reads_what_is_packed_in_place(launches):
    """No copy of a slice of a fused projection, and rows of 16 bytes are known as such."""
    q, k, v = torch.zeros(2, 9, 3, 4, 64, dtype=torch.float16).permute(2, 0, 3, 1, 4).unbind(0)
    out = scaled_dot_product_attention(q, k, v)
    assert out.stride() == (9 * 4 * 64, 64, 4 * 64, 1)
    assert launches[0].variant.aligned


def test_triton_attention_follows_torchs_setting_of_tf32(launches):
    q, before = torch.zeros(1, 1, 4, 16), torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            scaled_dot_product_attention(q, q, q)
            assert precision in launches[-1].variant.constants
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_triton_attention_says_what_it_does_not_take():
    q = torch.zeros(1, 1, 4, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64"):
        scaled_dot_product_attention(q, q, q)
    long = torch.zeros(1, 1, 1, 16).expand(1, 1, 2**29 + 1, 16)
    with pytest.raises(ValueError, match=r"positions"):
        scaled_dot_product_attention(q.float(), long, long)


def test_automatic_choice_never_interprets_attention():
    reluctance = rules.reluctance(
        "triton", "attention_fwd", AttentionInputs(*[torch.ones(1, 1, 2, 8)] * 3), AttentionOptions(2, 2, 1.0)
    )
    assert reluctance is not None and "interpreter" in reluctance
