"""Calls of attention that reach every path of a provider's kernels, and how each is checked.

A provider's own tests choose which of them run every time, and how large its tiles are: each shape is the smallest that
reaches its code path with tiles of 16 or of 32 keys.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from derivatives import gradients_of
from oracle_attention import AttentionCall, check

from fusednorm import dropout_mask, scaled_dot_product_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quick(values, *chosen):
    """Parameters of which only the chosen ones are tested in every run."""
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]


def leaves_of(generator, dtype, n_queries, n_keys, dim=16, dim_v=None, heads=1, key_heads=None, batch=1):
    shapes = {
        "q": (batch, heads, n_queries, dim),
        "k": (batch, key_heads or heads, n_keys, dim),
        "v": (batch, key_heads or heads, n_keys, dim_v or dim),
    }
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for n, shape in shapes.items()}


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


MASKS = [(20, 35), (1, 35), (20, 1), (1, 1), (2, 20, 35), (2, 1, 20, 35), (2, 1, 1, 35), (2, 2, 20, 35), (1, 2, 1, 35)]


def tiles(name, dtype, generator):
    """Seen in full, in part and not at all."""
    lengths, options = SEEN[name]
    check(AttentionCall(options), leaves_of(generator, dtype, *lengths), generator)


def grouped_queries(key_heads, dtype, generator):
    """Heads that share keys, with dropout."""
    leaves = leaves_of(generator, dtype, 20, 33, heads=4, key_heads=key_heads, batch=2)
    check(AttentionCall({"enable_gqa": True, "dropout_p": 0.2, "seed": 3}), leaves, generator)


def head_dim(dim, generator):
    """With the tiles of the table; dtypes in turn."""
    dtype = DTYPES[dim // 8 % 3]
    check(AttentionCall({"is_causal": True}), leaves_of(generator, dtype, 20, 35, dim), generator)


def values_of_another_size(dims, dtype, generator):
    """Than the keys'."""
    check(AttentionCall({"window": (20, 5)}), leaves_of(generator, dtype, 20, 35, *dims), generator)


def additive_mask(shape, generator):
    """And its gradient."""
    dtype = DTYPES[len(shape) % 2]
    leaves = leaves_of(generator, dtype, 20, 35, heads=2, batch=2)
    leaves["mask"] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if len(shape) % 2 == 0:
        leaves["mask"].view(-1)[1::5] = -torch.inf
    check(AttentionCall({"is_causal": len(shape) == 3, "window": (30, None)}), leaves, generator)


def mask_of_any_strides(lay, shape, generator):
    """Transposed, expanded and with a step."""
    mask = torch.randn(*shape[:-2], shape[-1], 2 * shape[-2], generator=generator)
    mask = mask[..., : shape[-2]].mT if lay == "transposed" else mask[..., ::2].mT
    if lay == "expanded":
        mask = mask[..., :1].expand(shape)
    leaves = leaves_of(generator, torch.float32, 20, 35, heads=2, batch=2) | {"mask": mask}
    check(AttentionCall({"softcap": 2.0, "dropout_p": 0.1, "seed": 3}), leaves, generator)


def bool_mask(shape, dtype, generator):
    """With a query that sees nothing."""
    mask = torch.rand(shape, generator=generator) > 0.4
    mask[..., :1, :] &= torch.rand(shape[-1], generator=generator) > 2  # a query that sees nothing
    check(AttentionCall({}, mask), leaves_of(generator, dtype, 20, 35, heads=2, batch=2), generator)


def key_mask(options, dtype, generator):
    """Padding at the end, at the beginning, in the middle, and everywhere."""
    keys = torch.arange(70)
    key_mask = torch.stack((keys < 33, keys >= 40, (keys < 5) | (keys > 60), keys < 0))
    leaves = leaves_of(generator, dtype, 17, 70, batch=4)
    check(AttentionCall({"key_mask": key_mask, **options}), leaves, generator)


def made_again(dim, generator, dtype=torch.float32):
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


def only_wanted_gradients():
    """Each is what it is among all."""
    leaves = {name: torch.randn(1, 2, 20, 16) for name in "qkv"} | {"mask": torch.randn(20, 20)}
    dout = torch.randn(1, 2, 20, 16)

    def run(leaves):
        return scaled_dot_product_attention(*leaves.values())

    expected = gradients_of([*leaves], run, leaves, [dout])
    for name in leaves:
        assert torch.equal(gradients_of([name], run, leaves, [dout])[name], expected[name])


def drops_what_dropout_mask_drops(n_keys):
    """Equal logits; the values and the cotangent are rows of the identity, so results and gradients show the mask."""
    mask = dropout_mask((1, 2, 18, n_keys), 0.4, -3)
    q, k = torch.zeros(1, 2, 18, 8), torch.zeros(1, 2, n_keys, 8)
    v = torch.eye(n_keys).expand(1, 2, -1, -1).clone().requires_grad_()
    out = scaled_dot_product_attention(q, k, v, dropout_p=0.4, seed=-3)
    (dv,) = torch.autograd.grad(out, v, torch.eye(18, n_keys).expand(1, 2, -1, -1))
    assert torch.equal(out != 0, mask)
    seen = min(18, n_keys)
    assert torch.equal(dv[..., :seen] != 0, mask.mT[..., :seen])


def past_2_to_the_31_elements(generator):
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


def repeats_bit_for_bit():
    """The backward, twice."""
    leaves = [torch.randn(1, 2, 33, 16, requires_grad=True) for _ in range(3)]
    mask, dout = torch.randn(33, 33, requires_grad=True), torch.randn(1, 2, 33, 16)
    runs = [torch.autograd.grad(scaled_dot_product_attention(*leaves, mask), (*leaves, mask), dout) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
