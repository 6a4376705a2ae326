"""The CUDA kernels of attention, emulated on the CPU: every path, against float64.

`test_sanitizers.py` runs a part of this file once more on a library built with sanitizers. A block has 64 queries or
keys, of wide float32 heads 32, and goes over tiles of 16 to 64 of the others.
"""

from __future__ import annotations

import contextlib

import attention_paths as paths
import pytest
import torch
from attention_paths import DTYPES, MASKS, SEEN, leaves_of, quick
from oracle_attention import AttentionCall, check

import fusednorm
from fusednorm import scaled_dot_product_attention
from fusednorm._options import AttentionInputs, AttentionOptions
from fusednorm.dispatch import rules
from tests.attention import test_attention as general
from tests.attention import test_masked as masked
from tests.providers.cuda.test_norm import pytestmark

__all__ = ["pytestmark"]  # which pytest finds by name
using = contextlib.nullcontext  # what the general tests enter; the provider is chosen already
DTYPE = pytest.mark.parametrize("dtype", quick(DTYPES, torch.bfloat16), ids=str)
MACHINE = (128, 512, 8, 2)  # threads of a block, blocks of a cluster, multiprocessors


@pytest.fixture(autouse=True)
def on_the_emulation():
    torch.ops.fusednorm_cuda.emulate(*MACHINE, 1)
    with fusednorm.use_provider("cuda"):
        yield
    torch.ops.fusednorm_cuda.emulate(*MACHINE, 1)


# --- tiles seen in full, in part and not at all ---


@pytest.mark.parametrize("dtype", quick(DTYPES, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "name", quick(SEEN, "causal_lower_right_queries_that_see_nothing", "window_of_several_tiles", "negative_scale")
)
def test_cuda_attention_of_tiles_seen_in_full_in_part_and_not_at_all(name, dtype, generator):
    paths.tiles(name, dtype, generator)


@DTYPE
@pytest.mark.parametrize("key_heads", quick([1, 2], 2))
def test_cuda_attention_of_grouped_queries(key_heads, dtype, generator):
    paths.grouped_queries(key_heads, dtype, generator)


@pytest.mark.parametrize("dim", quick([1, 8, 40, 64, 80, 96, 128, 256], 1, 40, 80, 256))
def test_cuda_attention_of_every_head_dim(dim, generator):
    paths.head_dim(dim, generator)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "dropout_p": 0.1, "seed": 1}, {"window": (64, 64)}], ids=str
)
@pytest.mark.parametrize("dim", [8, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_attention_of_every_head_dim_at_257(dtype, dim, options, generator):
    check(AttentionCall(options), leaves_of(generator, dtype, 257, 200, dim), generator)


@DTYPE
@pytest.mark.parametrize("dims", quick([(16, 40), (40, 8), (24, 133)], (24, 133)), ids=str)
def test_cuda_attention_of_values_of_another_size(dims, dtype, generator):
    paths.values_of_another_size(dims, dtype, generator)


@pytest.mark.parametrize("dtype", quick(DTYPES, torch.bfloat16), ids=str)
def test_cuda_attention_of_several_blocks(dtype, generator):
    check(AttentionCall({"is_causal": True}), leaves_of(generator, dtype, 137, 151, 64), generator)


# --- masks ---


@pytest.mark.parametrize("processors", [1, 40], ids=["whole", "in_parts"])
@pytest.mark.parametrize("shape", quick(MASKS, (1, 35), (2, 20, 35), (2, 1, 20, 35)), ids=str)
def test_cuda_attention_with_additive_masks_and_their_gradients(shape, processors, generator):
    torch.ops.fusednorm_cuda.emulate(*MACHINE[:3], processors, 1)
    paths.additive_mask(shape, generator)


@pytest.mark.parametrize("shape", [(75, 70), (1, 70)], ids=str)
def test_cuda_attention_with_masks_of_several_tiles(shape, generator):
    leaves = leaves_of(generator, torch.bfloat16, 75, 70, heads=2)
    leaves["mask"] = torch.randn(shape, generator=generator)
    check(AttentionCall({"is_causal": True}), leaves, generator)


@pytest.mark.parametrize("shape", quick([MASKS[0], MASKS[7]], MASKS[0]), ids=str)
@pytest.mark.parametrize("lay", quick(["transposed", "expanded", "step_2"], "transposed"))
def test_cuda_attention_with_masks_of_any_strides(lay, shape, generator):
    paths.mask_of_any_strides(lay, shape, generator)


@DTYPE
@pytest.mark.parametrize("shape", quick([MASKS[0], MASKS[6]], MASKS[6]), ids=str)
def test_cuda_attention_with_bool_masks(shape, dtype, generator):
    paths.bool_mask(shape, dtype, generator)


@DTYPE
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_p": 0.2, "seed": 4}], ids=["bare", "options"])
def test_cuda_attention_with_key_masks(options, dtype, generator):
    paths.key_mask(options, dtype, generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", quick([80, 256], 80))
def test_cuda_attention_of_what_is_masked_made_again(dim, dtype, generator):
    paths.made_again(dim, generator, dtype)


def test_cuda_attention_with_only_the_gradients_that_are_wanted():
    paths.only_wanted_gradients()


# --- what the general tests choose, here at the smallest ---


@pytest.mark.parametrize("bad", quick([float("nan"), float("inf")], float("inf")), ids=str)
@pytest.mark.parametrize("hiding", quick(masked.HIDING, "additive_documents"))
def test_cuda_attention_of_what_is_masked(hiding, bad, generator):
    masked.test_what_is_masked_reaches_nothing(hiding, False, bad, using(), "cpu", generator)


def test_cuda_attention_of_what_is_dropped(generator):
    masked.test_what_is_dropped_reaches_nothing(float("nan"), None, using(), "cpu", generator)


def test_cuda_attention_of_infinite_values():
    masked.test_infinite_values_that_are_seen_are_passed_on(None, using(), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_attention_of_large_logits(dtype, generator):
    general.test_large_logits_do_not_overflow(dtype, using(), "cpu", generator)


@pytest.mark.parametrize("sizes", [(2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 4, 5)], ids=str)
def test_cuda_attention_of_nothing(sizes):
    general.test_empty(sizes, {}, using(), "cpu")


@pytest.mark.parametrize("name", quick(general.LAYOUTS, "unaligned"))
def test_cuda_attention_at_every_layout(name, generator):
    general.test_every_layout(name, {"is_causal": True}, using(), "cpu", generator)


@pytest.mark.parametrize("dtype", quick(DTYPES, torch.bfloat16), ids=str)
def test_cuda_attention_at_strides_of_its_own(dtype, generator):
    """Features two apart: 16-byte accesses do not reach them, and neither do rows of 40 bytes."""
    leaves = {n: torch.randn(1, 2, 20, 40, generator=generator).to(dtype)[..., ::2] for n in "qkv"}
    check(AttentionCall({"is_causal": True}), leaves, generator)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "window": (3, None)}, {"dropout_p": 0.3, "seed": 8}], ids=str
)
def test_cuda_attention_of_packed_sequences(options, generator):
    general.test_varlen_is_attention_of_each_sequence(1, options, torch.float32, using(), "cpu", generator)


@pytest.mark.parametrize("n_keys", quick([3, 33, 66], 66))
def test_cuda_attention_drops_what_dropout_mask_drops(n_keys):
    paths.drops_what_dropout_mask_drops(n_keys)


def test_cuda_attention_past_2_to_the_31_elements(generator):
    paths.past_2_to_the_31_elements(generator)


# --- launches ---


def test_cuda_attention_backward_repeats_bit_for_bit():
    paths.repeats_bit_for_bit()


@pytest.mark.parametrize("seed", quick([2, 3], 2))
def test_cuda_attention_does_not_depend_on_the_order_of_threads(seed, generator):
    leaves = leaves_of(generator, torch.bfloat16, 70, 70, 64, heads=2)
    found = []
    for order in (1, seed):
        torch.ops.fusednorm_cuda.emulate(*MACHINE, order)
        given = [leaf.detach().requires_grad_() for leaf in leaves.values()]
        out = scaled_dot_product_attention(*given, is_causal=True, dropout_p=0.1, seed=1)
        found.append((out, *torch.autograd.grad(out, given, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_cuda_attention_says_what_it_does_not_take():
    q = torch.zeros(1, 1, 4, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        scaled_dot_product_attention(q, q, q)
    long = torch.zeros(1, 1, 1, 16).expand(1, 1, 2**29 + 1, 16)
    with pytest.raises(ValueError, match=r"positions"):
        scaled_dot_product_attention(long[:, :, :1], long, long)


def test_automatic_choice_never_emulates_attention():
    reluctance = rules.reluctance(
        "cuda", "attention_fwd", AttentionInputs(*[torch.ones(1, 1, 2, 8)] * 3), AttentionOptions(2, 2, 1.0)
    )
    assert reluctance is not None and "emulation" in reluctance
