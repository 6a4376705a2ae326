"""Faults that users reported against other attention functions, as properties this one has. Each names the report.

Reported faults that other files test: a crash of masks that must be expanded (flash-attention#352, #840, #1179, #1898;
every mask of test_attention), a mask beside is_causal ignored or not checked (pytorch#131254; test_attention's bool
masks, test_errors), double backward refused (pytorch#116350; gradgradcheck in tests/attention/test_autograd.py), NaN
where a query sees nothing (pytorch#41508, #103963, #118628; tests/attention/test_masked.py), NaN of padding in every
result (pytorch#101967; tests/attention/test_masked.py), another dropout mask from each backend (pytorch#149726),
packed queries and keys of unlike lengths (transformers#35032), both in tests/attention/test_attention.py.
"""

from __future__ import annotations

import pytest
import torch
from oracle_attention import AttentionCall, check, operands

import fusednorm
from fusednorm import dropout_mask, scaled_dot_product_attention

OP = "attention_fwd"


# pytorch#108108: which corner is_causal starts from
def test_causal_alignment_is_said_and_kept(using, device):
    q, k = torch.zeros(1, 1, 2, 8, device=device), torch.zeros(1, 1, 4, 8, device=device)
    v = torch.eye(4, device=device)[None, None]
    with using:
        upper = scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0] > 0
        lower = scaled_dot_product_attention(q, k, v, is_causal=True, causal_align="lower_right")[0, 0] > 0
    assert upper.tolist() == [[True, False, False, False], [True, True, False, False]]
    assert lower.tolist() == [[True, True, True, False], [True, True, True, True]]


# pytorch#124464, #99293: the functional form drops whenever it is told to, as it says
def test_dropout_goes_by_its_argument_alone(using, device, generator):
    q, k, v = operands(generator, device, *[(1, 2, 6, 8)] * 3)
    with using, torch.no_grad():
        kept = scaled_dot_product_attention(q, k, v, dropout_p=0.0, seed=1)
        dropped = scaled_dot_product_attention(q, k, v, dropout_p=0.5, seed=1)
        bare = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(kept, bare)
    assert not torch.equal(dropped, bare)


# pytorch#116350
def test_double_backward_of_every_way(using, device, generator):
    q, k, v = operands(generator, device, *[(1, 2, 6, 8)] * 3)
    with using:
        for options in ({}, {"is_causal": True}, {"softcap": 1.0}, {"dropout_p": 0.5, "seed": 1}):
            out = scaled_dot_product_attention(q, k, v, **options)
            first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))
            assert all(gradient.isfinite().all() and gradient.any() for gradient in second)


# pytorch#187227, #147585: masks of more than 2**31 or 2**32 elements, long sequences; a mask that is broadcast is small
def test_a_broadcast_mask_is_not_expanded(using, device, interpreted, generator):
    n = 64 if interpreted else 2048
    q, k, v = operands(generator, device, *[(1, 1, n, 8)] * 3)
    mask = torch.zeros(1, n, device=device, requires_grad=True)
    with using:
        out = scaled_dot_product_attention(q, k, v, mask)
        (dmask,) = torch.autograd.grad(out, mask, torch.ones_like(out))
    assert dmask.shape == (1, n) and dmask.isfinite().all()


@pytest.mark.gpu
@pytest.mark.alone
def test_logits_past_2_to_the_32_elements():
    n = 66_000
    q, k, v = (torch.randn(1, 1, n, 8, device="cuda") for _ in range(3))
    with fusednorm.use_provider("reference"):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.25, seed=3)
        tail = scaled_dot_product_attention(q[:, :, -4:], k, v, is_causal=True, causal_align="lower_right")
    kept = dropout_mask((1, 1, n, 1), 0.25, 3, "cuda")
    assert out.isfinite().all() and torch.equal(out[0, 0, 0] == 0, (~kept[0, 0, 0]).expand(8))
    assert tail.isfinite().all()


# pytorch#188302
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
@pytest.mark.parametrize("shape", [(6, 6), (2, 1, 6), (1, 1, 1, 6)], ids=str)
def test_only_the_mask_requires_grad(shape, options, using, device, generator):
    leaves = operands(generator, device, *[(1, 2, 6, 8)] * 3, shape)
    dout = torch.randn(1, 2, 6, 8, generator=generator).to(device)
    with using:
        every = torch.autograd.grad(scaled_dot_product_attention(*leaves, **options), leaves, dout)
        alone = [t.detach() for t in leaves[:3]] + leaves[3:]
        (dmask,) = torch.autograd.grad(scaled_dot_product_attention(*alone, **options), leaves[3], dout)
    assert dmask.shape == shape and dmask.any()
    torch.testing.assert_close(dmask, every[3])


# flash-attention#332, #342, pytorch#152593, #145208, #157677
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 9), (1, 2, 1, 9), (3, 2, 6, 9)], ids=str)
def test_a_learned_bias_has_its_gradient(shape, dtype, using, device, generator):
    q, k, v = operands(generator, device, (3, 2, 6, 8), (3, 2, 9, 8), (3, 2, 9, 8), dtype=dtype)
    (mask,) = operands(generator, device, shape, dtype=dtype)
    leaves = {"q": q, "k": k, "v": v, "mask": mask}
    key_mask = torch.arange(9, device=device) < torch.tensor([[9], [4], [0]], device=device)
    with using:
        check(AttentionCall({"key_mask": key_mask}), {n: t.detach() for n, t in leaves.items()}, generator)


# flash-attention#1556, triton#1975: a head dim that is not served
@pytest.mark.parametrize("dim", [1, 3, 8, 96, 128, 160, 256])
def test_no_head_dim_is_left_out(dim, using, device, generator):
    leaves = operands(generator, device, *[(1, 2, 5, dim)] * 3, dtype=torch.bfloat16)
    with using:
        check(AttentionCall({"is_causal": True}), dict(zip("qkv", leaves, strict=True)), generator)
