"""What the Triton kernels of attention have of their own, interpreted; see also tests/providers/test_attention.py."""

from __future__ import annotations

import pytest
import torch
from oracle_attention import AttentionCall, check

from fusednorm import scaled_dot_product_attention, use_provider
from fusednorm.providers.triton import attention_config as table
from tests.providers.test_attention import leaves_of, small_tiles

__all__ = ["small_tiles"]  # which pytest finds by name
pytestmark = pytest.mark.usefixtures("triton")


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float32, torch.float16)], ids=str)
def test_triton_attention_at_257(dtype, generator):
    """With the tiles of the table; several of each kind."""
    leaves = leaves_of(generator, dtype, 257, 257, 64)
    check(AttentionCall({"is_causal": True}), leaves, generator)


def test_triton_attention_at_1025(generator):
    leaves = leaves_of(generator, torch.bfloat16, 1025, 1025, 16)
    out = scaled_dot_product_attention(*leaves.values(), is_causal=True)
    q, k, v = (t.double() for t in leaves.values())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dims", [(40, 40), *slow((256, 256)), (24, 136)], ids=str)
def test_triton_attention_with_products_of_a_part_of_the_columns_at_a_time(dims, small_tiles, monkeypatch, generator):
    """A part that is cut off, and values of other parts than keys."""
    for kernel in ("forward", "keys", "queries", "mask"):
        monkeypatch.setattr(table, f"part_of_{kernel}", lambda need: 16)
    leaves = leaves_of(generator, torch.float16, 20, 35, *dims, heads=2, key_heads=1)
    leaves["mask"] = torch.randn(1, 2, 20, 35, generator=generator).half()
    options = {"enable_gqa": True, "window": (9, 30), "softcap": 2.0, "dropout_p": 0.1, "seed": 3}
    check(AttentionCall(options), leaves, generator)
    leaves["mask"] = torch.randn(1, 35, generator=generator).half()  # its gradient is a sum, by a kernel of its own
    check(AttentionCall({"enable_gqa": True}), leaves, generator)


def test_triton_attention_in_float32_with_the_tiles_of_the_table(generator):
    """Products of 32 of 40 columns at a time, for results and for the gradient of a mask that is a sum."""
    leaves = leaves_of(generator, torch.float32, 40, 45, 40, heads=2)
    leaves["mask"] = torch.randn(40, 45, generator=generator)
    key_mask = torch.arange(45)[None] != 7
    check(AttentionCall({"key_mask": key_mask, "dropout_p": 0.2, "seed": 5}), leaves, generator)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((torch.bool, shape) for shape in ((1, 2, 20, 48), (1, 48))),
        *((torch.float32, shape) for shape in ((1, 2, 20, 48), (20, 48), (1, 48))),  # gradients: direct, and summed
        (torch.float16, (20, 48)),
    ],
    ids=str,
)
def test_triton_attention_reads_a_mask_in_vectors_as_it_does_by_element(dtype, shape, small_tiles, generator):
    """The same bits, of keys that are whole vectors and tiles that the last of them cuts off."""
    leaves = leaves_of(generator, torch.float16, 20, 48, 40, heads=2)
    mask = torch.randn(shape, generator=generator)
    mask = mask > -0.5 if dtype is torch.bool else mask.to(dtype)
    shifted = torch.empty(mask.numel() + 1, dtype=dtype)[1:].view(shape).copy_(mask)  # no vector is aligned
    key_mask = torch.arange(48)[None] != 7
    results = []
    for given in (mask, shifted):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves.values()]
        if given.is_floating_point():
            inputs.append(given.detach().requires_grad_())
        out = scaled_dot_product_attention(
            *inputs[:3], given if dtype is torch.bool else inputs[3], 0.1, key_mask=key_mask, window=(30, 5), seed=3
        )
        results.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    assert len(results[0]) >= 4 and all(map(torch.equal, *results))


def test_triton_attention_reads_a_mask_that_is_the_negative_of_its_memory(generator):
    leaves = [*leaves_of(generator, torch.float32, 20, 48, 16, heads=2).values()]
    negative = torch._neg_view(torch.randn(20, 48, generator=generator))
    found = [scaled_dot_product_attention(*leaves, mask) for mask in (negative, negative.resolve_neg())]
    assert negative.is_neg() and torch.equal(*found)


EXPANDED = [((1, 1, 16, 8), (1, 1, 0, 1)), ((1, 2, 1, 32), (1, 0, 1, 1)), ((1, 1, 20, 40), (1, 8, 0, 1))]


@pytest.mark.parametrize(("shape", "strides"), [*EXPANDED, ((2, 2, 20, 48), (0, 960, 0, 1))], ids=str)
def test_triton_attention_writes_the_gradient_of_an_expanded_mask_at_its_own_strides(shape, strides, generator):
    """The mask is read in vectors. Its gradient may lie otherwise: torch orders equal strides in its own way."""
    batch, heads, n_queries, n_keys = shape
    leaves = leaves_of(generator, torch.float32, n_queries, n_keys, 16, heads=heads, batch=batch).values()
    memory = torch.randn(4096, generator=generator)
    found = []
    for provider in ("triton", "reference"):
        mask = memory.as_strided(shape, strides).detach().requires_grad_()
        with use_provider(provider):
            out = scaled_dot_product_attention(*leaves, mask)
        found += torch.autograd.grad(out, mask, torch.ones_like(out))
    torch.testing.assert_close(*found)


def test_triton_attention_variants_do_not_depend_on_any_length(launches):
    for batch, heads, n_queries, n_keys in ((1, 1, 1, 1), (2, 3, 16, 48), (3, 1, 17, 1), (1, 2, 512, 64)):
        leaves = leaves_of(None, torch.bfloat16, n_queries, n_keys, 64, heads=heads, batch=batch)
        leaves = [leaf.requires_grad_() for leaf in leaves.values()]
        key_mask = torch.ones(batch, n_keys, dtype=torch.bool)
        options = {"key_mask": key_mask, "is_causal": True, "dropout_p": 0.1, "window": (n_keys, None)}
        out = scaled_dot_product_attention(*leaves, scale=0.1 * n_keys, **options)
        torch.autograd.grad(out, leaves, torch.zeros_like(out))
    assert len({launch.compiled for launch in launches}) == 4  # forward, delta, keys and values, queries
