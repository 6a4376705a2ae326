"""Attention at the edges of its arguments: any scale, huge numbers behind masks, no heads, odd layouts."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from oracle_attention import AttentionCall, check, operands
from torch._subclasses.fake_tensor import FakeTensorMode

import fusednorm
from fusednorm import scaled_dot_product_attention, varlen_attention

OP = "attention_fwd"

SCALE = pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-3, 200.0])


def finite_gradients(out, leaves, cotangent=None):
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out) if cotangent is None else cotangent)
    assert all(torch.isfinite(g).all() for g in gradients)
    return gradients


@SCALE
@pytest.mark.parametrize("causal", [True, False])
def test_causality_holds_for_every_scale(scale, causal, using, device, generator):
    """What is masked is gone whatever the scale makes of -inf."""
    leaves = dict(zip("qkv", operands(generator, device, *[(1, 2, 5, 8)] * 3)))
    leaves["q"] = (leaves["q"].detach() / max(1.0, abs(scale))).requires_grad_()
    with using:
        check(AttentionCall({"scale": scale, "is_causal": causal}), leaves, generator)


@SCALE
@pytest.mark.parametrize("needs_grad", [True, False])
def test_causality_holds_for_every_scale_by_automatic_choice(scale, needs_grad):
    q = torch.randn(1, 2, 40, 8, requires_grad=needs_grad)
    out = scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale)
    seen = torch.ones(40, 40, dtype=torch.bool).tril()
    weights = torch.softmax((q.double() @ q.double().mT * scale).masked_fill(~seen, -math.inf), -1)
    torch.testing.assert_close(out.double(), weights @ q.double(), rtol=1e-4, atol=1e-5)
    if needs_grad:
        finite_gradients(out, [q])


HUGE = {torch.float32: torch.finfo(torch.float32).max, torch.bfloat16: torch.finfo(torch.bfloat16).max}


@pytest.mark.parametrize("dtype", HUGE, ids=str)
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("form", ["attn_mask", "additive", "key_mask", "causal"])
def test_huge_numbers_behind_a_mask_reach_nothing(form, which, dtype, ours, using, device, generator):
    """Their products overflow: 0 times infinity is NaN where the product is made before the mask is looked at."""
    q, k, v = operands(generator, device, *[(1, 2, 8, 16)] * 3, dtype=dtype)
    with torch.no_grad():
        (k if which == "k" else v)[:, :, -1] = HUGE[dtype]
        q[:, :, -1] = 0.0  # with causality the last query sees the last key: their product would be NaN by right
    mask = torch.ones(8, 8, dtype=torch.bool, device=device)
    mask[:, -1] = False
    options = {
        "attn_mask": {"attn_mask": mask},
        "additive": {"attn_mask": torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)},
        "key_mask": {"key_mask": mask[:1]},
        "causal": {"is_causal": True},
    }[form]
    n = 7 if form == "causal" else 8  # the last query sees the last key
    with using:
        out = scaled_dot_product_attention(q, k, v, **options)[:, :, :n]
        gradients = finite_gradients(out, [q, k, v])
        with torch.no_grad():
            k[:, :, -1] = v[:, :, -1] = 0.0
        expected = scaled_dot_product_attention(q, k, v, **options)[:, :, :n]
    torch.testing.assert_close(out, expected)
    for found, wanted in zip(gradients, finite_gradients(expected, [q, k, v])):
        torch.testing.assert_close(found[:, :, :7], wanted[:, :, :7])


@pytest.mark.parametrize("which", ["k", "v", "attn_mask"])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_huge_numbers_behind_a_mask_by_automatic_choice(which, needs_grad):
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    k[:, :, -1] = v[:, :, -1] = torch.finfo(torch.float32).max
    q[:, :, -1] = 0.0  # with causality the last query sees the last key
    q, k, v = (t.requires_grad_(needs_grad) for t in (q, k, v))
    mask = torch.ones(64, 64, dtype=torch.bool)
    mask[:, -1] = False
    options = {"attn_mask": mask} if which == "attn_mask" else {"is_causal": True}
    out = scaled_dot_product_attention(q, k, v, **options)[:, :, :-1]
    assert torch.isfinite(out).all()
    if needs_grad:
        finite_gradients(out, [q, k, v])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_softcap_keeps_what_is_masked_out_of_gradients(bad, using, device, generator):
    """The cap's derivative is NaN there."""
    q, k, v = operands(generator, device, *[(2, 1, 3, 8)] * 3)
    with torch.no_grad():
        k[:, :, 2] = bad
        q[1, :, 1] = bad  # a query that sees nothing
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool, device=device)
    mask[:, :, :, 2] = mask[1, :, 1] = False
    with using:
        out = scaled_dot_product_attention(q, k, v, mask, softcap=30.0)
        dq, dk, _ = finite_gradients(out, [q, k, v])
    assert (dk[:, :, 2] == 0).all() and (dq[1, :, 1] == 0).all()


def test_no_heads_of_queries(using, device):
    q = torch.randn(1, 0, 4, 8, device=device, requires_grad=True)
    k, v = (torch.randn(1, 2, 4, 8, device=device, requires_grad=True) for _ in range(2))
    with using:
        for options in ({}, {"softcap": 1.0}, {"key_mask": torch.ones(1, 4, dtype=torch.bool, device=device)}):
            out = scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
            assert out.shape == (1, 0, 4, 8)
            assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), [q, k, v]))
        bounds = torch.tensor([0, 4], dtype=torch.int32, device=device)
        packed = [t.detach()[0].transpose(0, 1).requires_grad_() for t in (q, k, v)]
        out = varlen_attention(*packed, bounds, bounds, 4, 4)
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), packed))


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("value_dim", [4, 8])
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_a_mask_beside_causality(share, value_dim, needs_grad, using, device, generator):
    """Torch's own operator refuses the two together, or not, by which of its kernels serves the call."""
    q, k, v = (
        t.detach().requires_grad_(needs_grad)
        for t in operands(generator, device, *[(1, 2, 8, 8)] * 2, (1, 2, 8, value_dim))
    )
    mask = torch.rand(8, 8, generator=generator).to(device) < share
    mask[:, 0] = True
    with using:
        out = scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    both = mask & torch.ones_like(mask).tril()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, both))


@pytest.mark.parametrize("needs_grad", [True, False])
def test_lengths_may_be_dynamic_under_compile(needs_grad):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q: scaled_dot_product_attention(q, q, q), fullgraph=True, dynamic=True, backend="eager"
    )
    for length in (5, 9):
        q = torch.randn(2, 2, length, 4, requires_grad=needs_grad)
        torch.testing.assert_close(compiled(q), F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": True}], ids=["bare", "causal", "masked"])
def test_fake_tensors_outside_their_mode(options):
    with FakeTensorMode():
        q, mask = torch.randn(1, 2, 40, 8), torch.ones(40, 40, dtype=torch.bool)
    if "attn_mask" in options:
        options = {"attn_mask": mask}
    assert scaled_dot_product_attention(q, q, q, **options).shape == (1, 2, 40, 8)


@pytest.mark.parametrize("far", [2**40, 2**63, 2**70])
def test_a_window_may_be_wider_than_any_sequence(far, using, device, generator):
    q, k, v = operands(generator, device, *[(1, 2, 9, 8)] * 3)
    with using:
        out = scaled_dot_product_attention(q, k, v, window=(far, 0))
        torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, window=(None, 0)))


def test_boundaries_of_any_stride(using, device, generator):
    q, k, v = operands(generator, device, *[(9, 2, 8)] * 3)
    bounds = torch.tensor([0, 7, 4, 7, 9, 7], dtype=torch.int32, device=device)[::2]
    with using:
        out = varlen_attention(q, k, v, bounds, bounds, 5, 5)
        torch.testing.assert_close(out, varlen_attention(q, k, v, bounds.clone(), bounds.clone(), 5, 5))
        finite_gradients(out, [q, k, v])


@pytest.mark.parametrize("route", ["torch", "fastpath", "native"])
@pytest.mark.parametrize("causal", [True, False])
def test_hooks_on_saved_tensors_may_bring_another_layout(route, causal, monkeypatch):
    left_out = fusednorm.dispatch.settings.without_fastpath() if route == "torch" else contextlib.nullcontext()
    if route != "native":
        monkeypatch.setattr(fusednorm.dispatch.rules_attention, "ours_is_faster", lambda *_: False)
        fastpath = fusednorm.dispatch.fastpath.load()[0]
        if fastpath is None and route == "fastpath":
            pytest.skip(fusednorm.dispatch.fastpath.load()[1])
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    bring = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.mT.contiguous().mT if t.ndim == 4 else t)
    with left_out:
        expected = torch.autograd.grad(scaled_dot_product_attention(q, k, v, is_causal=causal).sin().sum(), [q, k, v])
        with bring:
            out = scaled_dot_product_attention(q, k, v, is_causal=causal)
    found = torch.autograd.grad(out.sin().sum(), [q, k, v])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


LAYOUTS = {  # of (2, 2, 9, 16)
    "contiguous": lambda: torch.randn(2, 2, 9, 16),
    "transposed_rows": lambda: torch.randn(2, 2, 16, 9).mT,
    "positions_before_heads": lambda: torch.randn(2, 9, 2, 16).transpose(1, 2),
    "slice_of_a_projection": lambda: torch.randn(2, 9, 2, 48).transpose(1, 2)[..., 16:32],
    "every_second_column": lambda: torch.randn(2, 2, 9, 32)[..., ::2],
    "expanded": lambda: torch.randn(1, 2, 9, 16).expand(2, 2, 9, 16),
    "permuted_last": lambda: torch.randn(9, 16, 2, 2).permute(2, 3, 0, 1),
}


OPTIONS = {"plain": {}, "causal": {"is_causal": True}, "mask": {"attn_mask": torch.ones(9, 9).tril() > 0}}


@pytest.mark.parametrize("needs_grad", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_lie_as_torchs_do(layout, name, needs_grad, using, device):
    """In memory, so that ``view`` works where it works there."""
    options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in OPTIONS[name].items()}
    leaves = [LAYOUTS[layout]().to(device).requires_grad_(needs_grad) for _ in range(3)]
    with using:
        out = scaled_dot_product_attention(*leaves, **options)
        gradients = torch.autograd.grad(out, leaves, torch.randn_like(out)) if needs_grad else ()
    torchs = F.scaled_dot_product_attention(*leaves, **options)
    assert out.stride() == torchs.stride()
    expected = torch.autograd.grad(torchs, leaves, torch.randn_like(out)) if needs_grad else ()
    for got, other in zip(gradients, expected, strict=True):  # where torch's columns are apart, ours need not be
        assert got.stride(-1) == 1 or got.stride() == other.stride()
