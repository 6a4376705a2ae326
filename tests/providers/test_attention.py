"""Calls of attention that reach every path of the CUDA and of the Triton kernels, against float64.

Each shape is the smallest that reaches its code path with tiles of 16 or of 32 keys. The CUDA kernels are emulated on
the CPU: a block has 64 queries or keys, of wide float32 heads 32, and goes over tiles of 16 to 64 of the others. The
interpreter runs a program of Triton at a time in Python, so most tests take tiles of 16 x 16 there, for a short
sequence to have tiles seen in full, in part, and not at all.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from derivatives import gradients_of
from oracle_attention import AttentionCall, check

from fusednorm import scaled_dot_product_attention
from fusednorm.providers.triton import attention as triton_attention
from fusednorm.providers.triton import attention_config as table
from tests.attention import test_attention as general
from tests.attention import test_masked as masked

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BFLOAT16, FLOAT32 = {"dtype": [torch.bfloat16]}, {"dtype": [torch.float32]}
using = contextlib.nullcontext  # what the general tests enter; the provider is chosen already


@pytest.fixture(params=["cuda", "triton"])
def kernels(request):
    request.getfixturevalue(request.param)
    return request.param


def by_both(cuda: dict[str, Any], triton: dict[str, Any], **values: Any) -> Any:
    """Every combination of the values by both providers. Fast tests take those that a provider's argument names."""
    cases = []
    for provider, chosen in (("cuda", cuda), ("triton", triton)):
        for case in itertools.product(*values.values()):
            quick = all(value in chosen.get(name, values[name]) for name, value in zip(values, case))
            cases.append(pytest.param(provider, *case, marks=() if quick else pytest.mark.slow))
    return pytest.mark.parametrize(("kernels", *values), cases, indirect=["kernels"], ids=str)


@pytest.fixture
def small_tiles(monkeypatch):
    """Of the Triton kernels; those of CUDA are compiled for theirs."""
    for name in ("forward", "backward_keys", "backward_queries", "backward_mask"):
        monkeypatch.setattr(table, name, lambda need: table.Tile(16, 16, 4, 1))
    triton_attention.forget_variants()
    yield
    triton_attention.forget_variants()


def leaves_of(generator, dtype, n_queries, n_keys, dim=16, dim_v=None, heads=1, key_heads=None, batch=1):
    shapes = {
        "q": (batch, heads, n_queries, dim),
        "k": (batch, key_heads or heads, n_keys, dim),
        "v": (batch, key_heads or heads, n_keys, dim_v or dim),
    }
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for n, shape in shapes.items()}


# --- tiles seen in full, in part and not at all ---

SEEN = {
    "all": ((40, 45), {}),
    "whole_tiles": ((32, 48), {}),
    "causal": ((45, 40), {"is_causal": True}),
    "causal_more_keys": ((20, 70), {"is_causal": True}),
    "causal_lower_right": ((20, 70), {"is_causal": True, "causal_align": "lower_right"}),
    "causal_lower_right_queries_that_see_nothing": ((70, 20), {"is_causal": True, "causal_align": "lower_right"}),
    "window_of_several_tiles": ((70, 70), {"window": (40, 36)}),
    "window_within_a_tile": ((40, 70), {"window": (3, 2), "causal_align": "lower_right"}),
    "window_left": ((50, 40), {"window": (20, None)}),
    "window_past_both_ends": ((20, 33), {"window": (2**40, 2**62)}),
    "causal_window": ((50, 50), {"window": (17, 9), "is_causal": True}),
    "softcap_causal": ((33, 40), {"softcap": 1.5, "is_causal": True}),
    "negative_scale": ((33, 40), {"scale": -0.4, "is_causal": True}),
    "zero_scale": ((17, 33), {"scale": 0.0}),
    "dropout_causal": ((33, 41), {"dropout_p": 0.3, "seed": 2**63 + 5, "is_causal": True}),
}


@pytest.mark.certifies("forward", "backward", op="scaled_dot_product_attention")
@by_both(
    {
        "name": ["causal_lower_right_queries_that_see_nothing", "window_of_several_tiles", "negative_scale"],
        "dtype": [torch.float32, torch.bfloat16],
    },
    {"name": SEEN.keys() - {"window_left", "causal_window", "window_of_several_tiles"}, **FLOAT32},
    name=SEEN,
    dtype=DTYPES,
)
def test_attention_of_tiles_seen_in_full_in_part_and_not_at_all(name, dtype, small_tiles, generator):
    lengths, options = SEEN[name]
    check(AttentionCall(options), leaves_of(generator, dtype, *lengths), generator)


@by_both({"key_heads": [2], **BFLOAT16}, {"key_heads": [2], **FLOAT32}, key_heads=[1, 2], dtype=DTYPES)
def test_attention_of_grouped_queries(key_heads, dtype, small_tiles, generator):
    """Heads that share keys, with dropout."""
    leaves = leaves_of(generator, dtype, 20, 33, heads=4, key_heads=key_heads, batch=2)
    check(AttentionCall({"enable_gqa": True, "dropout_p": 0.2, "seed": 3}), leaves, generator)


@by_both({"dim": [1, 40, 80, 256]}, {}, dim=[1, 8, 40, 64, 80, 96, 128, 256])
def test_attention_of_every_head_dim(dim, generator):
    """With the tiles of the table; dtypes in turn."""
    dtype = DTYPES[dim // 8 % 3]
    check(AttentionCall({"is_causal": True}), leaves_of(generator, dtype, 20, 35, dim), generator)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "dropout_p": 0.1, "seed": 1}, {"window": (64, 64)}], ids=str
)
@pytest.mark.parametrize("dim", [8, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_every_head_dim_at_257(dtype, dim, options, generator):
    check(AttentionCall(options), leaves_of(generator, dtype, 257, 200, dim), generator)


@by_both(
    {"dims": [(24, 133)], **BFLOAT16},
    {"dims": [(16, 40), (40, 8), (24, 33)], **FLOAT32},
    dims=[(16, 40), (40, 8), (24, 33), (24, 133)],
    dtype=DTYPES,
)
def test_attention_of_values_of_another_size(dims, dtype, small_tiles, generator):
    check(AttentionCall({"window": (20, 5)}), leaves_of(generator, dtype, 20, 35, *dims), generator)


# --- masks ---

MASKS = [(20, 35), (1, 35), (20, 1), (1, 1), (2, 20, 35), (2, 1, 20, 35), (2, 1, 1, 35), (2, 2, 20, 35), (1, 2, 1, 35)]


@by_both(
    {"shape": [(1, 35), (2, 20, 35), (2, 1, 20, 35)]},
    {"shape": [(20, 35), (1, 35), (2, 20, 35), (2, 1, 20, 35), (2, 2, 20, 35)], "processors": [1]},
    shape=MASKS,
    processors=[1, 40],
)
def test_attention_with_additive_masks_and_their_gradients(shape, processors, kernels, small_tiles, generator):
    """By one multiprocessor, and in the parts that 40 take; Triton's kernels do not go by them."""
    if kernels == "cuda":
        torch.ops.fusednorm_cuda.emulate(128, 512, 8, processors, 1)
    dtype = DTYPES[len(shape) % 2]
    leaves = leaves_of(generator, dtype, 20, 35, heads=2, batch=2)
    leaves["mask"] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if len(shape) % 2 == 0:
        leaves["mask"].view(-1)[1::5] = -torch.inf
    check(AttentionCall({"is_causal": len(shape) == 3, "window": (30, None)}), leaves, generator)


@by_both(
    {"lay": ["transposed"], "shape": [MASKS[0]]},
    {"lay": ["transposed"]},
    lay=["transposed", "expanded", "step_2"],
    shape=[MASKS[0], MASKS[7]],
)
def test_attention_with_masks_of_any_strides(lay, shape, small_tiles, generator):
    mask = torch.randn(*shape[:-2], shape[-1], 2 * shape[-2], generator=generator)
    mask = mask[..., : shape[-2]].mT if lay == "transposed" else mask[..., ::2].mT
    if lay == "expanded":
        mask = mask[..., :1].expand(shape)
    leaves = leaves_of(generator, torch.float32, 20, 35, heads=2, batch=2) | {"mask": mask}
    check(AttentionCall({"softcap": 2.0, "dropout_p": 0.1, "seed": 3}), leaves, generator)


@by_both({"shape": [MASKS[6]], **BFLOAT16}, FLOAT32, shape=[MASKS[0], MASKS[6]], dtype=DTYPES)
def test_attention_with_bool_masks(shape, dtype, small_tiles, generator):
    mask = torch.rand(shape, generator=generator) > 0.4
    if shape[-2] > 1:
        mask[..., 0, :] = False  # a query that sees nothing
    check(AttentionCall({}, mask), leaves_of(generator, dtype, 20, 35, heads=2, batch=2), generator)


@by_both(BFLOAT16, FLOAT32, options=[{}, {"is_causal": True, "dropout_p": 0.2, "seed": 4}], dtype=DTYPES)
def test_attention_with_key_masks(options, dtype, small_tiles, generator):
    """Padding at the end, at the beginning, in the middle, and everywhere."""
    keys = torch.arange(70)
    key_mask = torch.stack((keys < 33, keys >= 40, (keys < 5) | (keys > 60), keys < 0))
    leaves = leaves_of(generator, dtype, 17, 70, batch=4)
    check(AttentionCall({"key_mask": key_mask, **options}), leaves, generator)


@by_both({"dim": [80]}, {"dim": [80], **FLOAT32}, dim=[80, 256], dtype=DTYPES)
def test_attention_of_what_is_masked_made_again(dim, dtype, small_tiles, generator):
    """A hidden key and a query that sees nothing are not finite, so every result of their tiles is made again."""
    mask = torch.ones(20, 35, dtype=torch.bool)
    mask[:, 30], mask[3] = False, False
    clean = [*leaves_of(generator, dtype, 20, 35, dim).values()]
    spoilt = [t.clone() for t in clean]
    for tensor, row, value in zip(spoilt, (3, 30, 30), (torch.nan, torch.inf, torch.nan)):
        tensor[..., row, :] = value
    dout = torch.randn(1, 1, 20, dim, generator=generator).to(dtype)
    found = []
    for tensors in (clean, spoilt):
        leaves = [t.requires_grad_() for t in tensors]
        out = scaled_dot_product_attention(*leaves, mask)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    for expected, ours in zip(*found, strict=True):
        # sums of 35 float32 terms in another order; of two that are near, rounding to 16 bits may make neighbours
        error = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, expected, rtol=error, atol=error)


def test_attention_with_only_the_gradients_that_are_wanted(small_tiles):
    """Each is what it is among all."""
    leaves = {name: torch.randn(1, 2, 20, 16) for name in "qkv"} | {"mask": torch.randn(20, 20)}
    dout = torch.randn(1, 2, 20, 16)

    def run(leaves):
        return scaled_dot_product_attention(*leaves.values())

    expected = gradients_of([*leaves], run, leaves, [dout])
    for name in leaves:
        assert torch.equal(gradients_of([name], run, leaves, [dout])[name], expected[name])


# --- what the general tests choose, here at the smallest ---


@pytest.mark.certifies("NaN safety", op="scaled_dot_product_attention")
@by_both(
    {"hiding": ["additive_documents"], "bad": [torch.inf]},
    {"hiding": ["padding"], "bad": [torch.inf]},
    hiding=masked.HIDING,
    bad=[torch.nan, torch.inf],
)
def test_attention_of_what_is_masked(hiding, bad, small_tiles, generator):
    masked.test_what_is_masked_reaches_nothing(hiding, False, bad, using(), "cpu", generator)


def test_attention_of_what_is_dropped(small_tiles, generator):
    masked.test_what_is_dropped_reaches_nothing(float("nan"), None, using(), "cpu", generator)


def test_attention_of_infinite_values(small_tiles):
    masked.test_infinite_values_that_are_seen_are_passed_on(None, using(), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_large_logits(dtype, small_tiles, generator):
    general.test_large_logits_do_not_overflow(dtype, using(), "cpu", generator)


@pytest.mark.parametrize("sizes", [(2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 4, 5)], ids=str)
def test_attention_of_nothing(sizes):
    general.test_empty(sizes, {}, using(), "cpu")


@pytest.mark.certifies("strided", op="scaled_dot_product_attention")
@by_both({"name": ["unaligned"]}, {}, name=general.LAYOUTS)
def test_attention_at_every_layout(name, small_tiles, generator):
    general.test_every_layout(name, {"is_causal": True}, using(), "cpu", generator)


@pytest.mark.certifies("forward", "backward", op="varlen_attention")
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "window": (3, None)}, {"dropout_p": 0.3, "seed": 8}], ids=str
)
def test_attention_of_packed_sequences(options, small_tiles, generator):
    general.test_varlen_is_attention_of_each_sequence(1, options, torch.float32, using(), "cpu", generator)


@pytest.mark.certifies("forward", op="dropout_mask")
@by_both({"n_keys": [66]}, {}, n_keys=[3, 33, 66])
def test_attention_drops_what_dropout_mask_drops(n_keys, small_tiles):
    general.test_the_mask_is_dropout_mask(n_keys, torch.float32, using(), "cpu", batch=1)


@pytest.mark.certifies("2^31 elements", op="scaled_dot_product_attention")
def test_attention_past_2_to_the_31_elements(generator):
    """A head, and a position, that far away; nothing between is touched."""
    far = 2**31
    storage = torch.from_numpy(np.empty(2 * far + 64, dtype=np.float16))
    views = [storage.as_strided((1, 2, 2, 8), (0, far, 16, 1)), storage.as_strided((1, 2, 2, 8), (0, 32, far + 32, 1))]
    for view in views:
        view.copy_(torch.randn(view.shape, generator=generator))
        near = view.clone()
        for tensors in ((view, near, near), (near, view, near), (near, near, view)):
            found = scaled_dot_product_attention(*tensors)
            assert torch.equal(found, scaled_dot_product_attention(near, near, near))


def test_attention_backward_repeats_bit_for_bit(small_tiles):
    leaves = [torch.randn(1, 2, 33, 16, requires_grad=True) for _ in range(3)]
    mask, dout = torch.randn(33, 33, requires_grad=True), torch.randn(1, 2, 33, 16)
    runs = [torch.autograd.grad(scaled_dot_product_attention(*leaves, mask), (*leaves, mask), dout) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_attention_says_what_it_does_not_take():
    q = torch.zeros(1, 1, 4, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        scaled_dot_product_attention(q, q, q)
    long = torch.zeros(1, 1, 1, 16).expand(1, 1, 2**29 + 1, 16)
    with pytest.raises(ValueError, match=r"positions"):
        scaled_dot_product_attention(long[:, :, :1], long, long)
