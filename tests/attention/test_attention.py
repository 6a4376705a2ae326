"""``scaled_dot_product_attention`` and ``varlen_attention`` over the provider table: against float64."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, keep_scale
from oracle_attention import AttentionCall, check, draw

from fusednorm import dropout_mask, scaled_dot_product_attention, varlen_attention

OP = "attention_fwd"

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
SLOW_DTYPES = (torch.float64, torch.float16)  # of what differs from another dtype in its values alone
FEW_DTYPES = pytest.mark.parametrize(
    "dtype",
    [pytest.param(dtype, marks=pytest.mark.slow if dtype in SLOW_DTYPES else ()) for dtype in DTYPES],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)


def leaves_of(generator, device, dtype, batch=2, heads=4, n_queries=17, n_keys=23, dim=40, key_heads=None):
    q, k, v = draw(
        generator,
        device,
        dtype,
        (batch, heads, n_queries, dim),
        *[(batch, key_heads or heads, n_keys, dim)] * 2,
    )
    return {"q": q, "k": k, "v": v}


PLAIN = {
    "bare": {},
    "causal": {"is_causal": True},
    "causal_lower_right": {"is_causal": True, "causal_align": "lower_right"},
    "window": {"window": (3, 5)},
    "window_left": {"window": (4, None)},
    "window_right_lower_right": {"window": (None, 2), "causal_align": "lower_right"},
    "window_of_the_query_alone": {"window": (0, 0)},
    "scale": {"scale": 0.7},
    "negative_scale": {"scale": -0.3},
    "zero_scale": {"scale": 0.0},
    "softcap": {"softcap": 1.5},
    "softcap_causal": {"softcap": 2.0, "is_causal": True},
    "dropout": {"dropout_p": 0.3, "seed": 2**63 + 5},
    "everything": {"is_causal": True, "window": (6, 3), "softcap": 3.0, "dropout_p": 0.2, "seed": -4, "scale": 0.5},
}


@pytest.mark.certifies("forward", "backward")
@DTYPE
@pytest.mark.parametrize("name", PLAIN)
def test_every_option(name, dtype, using, device, generator):
    with using:
        check(AttentionCall(PLAIN[name]), leaves_of(generator, device, dtype), generator)


@pytest.mark.certifies("forward", "backward")
@DTYPE
@pytest.mark.parametrize("dim", [8, 40, 64, 80, 96, 128, 256])
def test_every_head_dim(dim, dtype, using, device, generator):
    with using:
        check(AttentionCall({"is_causal": True}), leaves_of(generator, device, dtype, 1, 2, 33, 33, dim), generator)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (40, 1), (64, 64), (65, 129)], ids=str)
def test_every_length(lengths, using, device, generator):
    """One query, one key, a block's size, one more."""
    leaves = leaves_of(generator, device, torch.float32, 2, 3, *lengths, 24)
    with using:
        for align in ("upper_left", "lower_right"):
            check(AttentionCall({"is_causal": True, "causal_align": align}), leaves, generator)


def test_sequences_longer_than_a_block_of_queries(using, device, interpreted, generator):
    lengths = (130, 140) if interpreted else (1100, 1030)
    leaves = leaves_of(generator, device, torch.float32, 1, 2, *lengths, 8)
    options = {"dropout_p": 0.25, "seed": 9, "scale": 0.3, "is_causal": True, "causal_align": "lower_right"}
    with using:
        out, lse = scaled_dot_product_attention(*leaves.values(), **options, return_lse=True)
    logits = leaves["q"].double() @ leaves["k"].double().mT * 0.3
    below = torch.ones(lengths, dtype=torch.bool, device=device).tril(lengths[1] - lengths[0])
    alive = below.any(-1)
    exact = logits.masked_fill(~below, -torch.inf).logsumexp(-1)
    weights = torch.exp(logits - exact[..., None]).where(below, 0.0)
    weights = weights * dropout_mask(weights.shape, 0.25, 9, device) / 0.75
    # float32 against float64: the logits' rounding grows through exp in the output, and is added once to the lse
    torch.testing.assert_close(out.double(), weights @ leaves["v"].double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse[..., alive].double(), exact[..., alive], rtol=1e-5, atol=1e-5)


@FEW_DTYPES
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.2, "seed": 3}, {"softcap": 2.0, "is_causal": True}], ids=str)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_queries(key_heads, options, dtype, using, device, generator):
    leaves = leaves_of(generator, device, dtype, key_heads=key_heads)
    with using:
        check(AttentionCall({"enable_gqa": True, **options}), leaves, generator)


MASKS = {
    "matrix": (17, 23),
    "keys": (1, 23),
    "queries": (17, 1),
    "one": (1, 1),
    "heads": (4, 17, 23),
    "batch": (2, 1, 17, 23),
    "key_padding": (2, 1, 1, 23),
    "full": (2, 4, 17, 23),
    "heads_and_keys": (1, 4, 1, 23),
}


@FEW_DTYPES
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_bool_masks(shape, causal, dtype, using, device, generator):
    mask = torch.rand(shape, generator=generator).to(device) > 0.3
    if shape[-2] > 1:
        mask[..., 0, :] = False  # a query that sees nothing
    with using:
        check(AttentionCall({"is_causal": causal}, mask), leaves_of(generator, device, dtype), generator)


@FEW_DTYPES
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "softcap": 1.0, "scale": -0.4}], ids=["bare", "options"])
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_additive_masks_and_their_gradients(shape, options, dtype, using, device, generator):
    """Summed over the dimensions that the mask is broadcast along; -inf masks."""
    leaves = leaves_of(generator, device, dtype)
    (leaves["mask"],) = draw(generator, device, dtype, shape)
    if leaves["mask"].numel() > 1:
        leaves["mask"].view(-1)[::5] = -torch.inf
    with using:
        check(AttentionCall(options), leaves, generator)


def test_a_float32_mask_beside_16_bit_operands(using, device, generator):
    leaves = leaves_of(generator, device, torch.bfloat16)
    (leaves["mask"],) = draw(generator, device, torch.float32, (4, 17, 23))
    with using:
        check(AttentionCall(), leaves, generator)


@DTYPE
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_key_masks(causal, dtype, using, device, generator):
    """Padding of one sequence, all of another."""
    key_mask = torch.arange(23, device=device) < torch.tensor([[9], [0]], device=device)
    attn_mask = torch.rand(4, 17, 23, generator=generator).to(device) > 0.3
    options = {"key_mask": key_mask, "is_causal": causal, "window": (8, None)}
    with using:
        for mask in (None, attn_mask):
            check(AttentionCall(options, mask), leaves_of(generator, device, dtype), generator)


LAYOUTS = {
    "packed_qkv": lambda g: torch.randn(2, 9, 3, 4, 16, generator=g).permute(2, 0, 3, 1, 4).unbind(0),
    "transposed_heads": lambda g: [torch.randn(2, 9, 4, 16, generator=g).transpose(1, 2) for _ in range(3)],
    "transposed_dim": lambda g: [torch.randn(2, 4, 16, 9, generator=g).mT for _ in range(3)],
    "step_2": lambda g: [torch.randn(2, 4, 9, 32, generator=g)[..., ::2] for _ in range(3)],
    "unaligned": lambda g: [torch.randn(1 + 2 * 4 * 9 * 16, generator=g)[1:].view(2, 4, 9, 16) for _ in range(3)],
    "expanded_heads": lambda g: [torch.randn(2, 1, 9, 16, generator=g).expand(2, 4, 9, 16) for _ in range(3)],
    "expanded_positions": lambda g: [torch.randn(2, 4, 1, 16, generator=g).expand(2, 4, 9, 16) for _ in range(3)],
    "wider_values": lambda g: [torch.randn(2, 4, 9, d, generator=g) for d in (16, 16, 24)],
}


@pytest.mark.certifies("strided")
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_p": 0.3, "seed": 1}], ids=["bare", "options"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name, options, using, device, generator):
    leaves = dict(zip("qkv", (t.to(device) for t in LAYOUTS[name](generator)), strict=True))
    with using:
        check(AttentionCall(options), leaves, generator)
        out = scaled_dot_product_attention(*leaves.values(), **options)
    if name == "transposed_heads":  # what a projection after it reads as (B, S, H * D) without a copy
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(9, 16), (3, 9, 16), (2, 3, 4, 9, 16)], ids=str)
def test_any_leading_dimensions(shape, using, device, generator):
    q, k, v = draw(generator, device, torch.float32, shape, shape, shape)
    key_mask = torch.rand(*(shape[:-3] if len(shape) > 3 else shape[:-2]), 9, generator=generator).to(device) > 0.3
    (mask,) = draw(generator, device, torch.float32, (*shape[:-2], 9, 9)[-4:])
    leaves = {"q": q, "k": k, "v": v}
    with using:
        for options in ({}, {"key_mask": key_mask}):
            check(AttentionCall(options), leaves, generator)
            check(AttentionCall(options), leaves | {"mask": mask}, generator)


@pytest.mark.parametrize("leads", [((3,), (2, 3), (2, 3)), ((2, 4), (2, 1), (1, 4)), ((), (2,), (2,))], ids=str)
def test_leading_dimensions_broadcast(leads, using, device, generator):
    q, k, v = draw(generator, device, torch.float32, *[(*lead, 7, 8) for lead in leads])
    with using:
        check(AttentionCall(), {"q": q, "k": k, "v": v}, generator)


@pytest.mark.certifies("empty")
@pytest.mark.parametrize("sizes", [(2, 3, 0, 5), (2, 3, 4, 0), (0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 0)], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "causal_align": "lower_right", "dropout_p": 0.5}], ids=str)
def test_empty(sizes, options, using, device):
    batch, heads, n_queries, n_keys = sizes
    q = torch.randn(batch, heads, n_queries, 8, device=device, requires_grad=True)
    k, v = (torch.randn(batch, heads, n_keys, 8, device=device, requires_grad=True) for _ in range(2))
    mask = torch.zeros(n_queries, n_keys, device=device, requires_grad=True)
    with using:
        for leaves in ((q, k, v), (q, k, v, mask)):
            out, lse = scaled_dot_product_attention(*leaves, **options, return_lse=True)
            gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
            assert torch.equal(out, torch.zeros_like(q)) and (lse == -torch.inf).all()
            assert lse.shape == (batch, heads, n_queries)
            assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, leaves, strict=True))


def test_no_features(using, device):
    """All logits are 0: the mean of the values."""
    v = torch.randn(2, 3, 5, 8, device=device)
    with using:
        out = scaled_dot_product_attention(
            torch.ones(2, 3, 4, 0, device=device), torch.ones(2, 3, 5, 0, device=device), v
        )
    torch.testing.assert_close(out, v.mean(-2, keepdim=True).expand(2, 3, 4, 8))


# --- packed sequences ---


@pytest.mark.certifies("forward", "backward", op="varlen_attention")
@FEW_DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "causal_align": "lower_right", "window": (3, None), "softcap": 2.0, "scale": 0.4},
        {"dropout_p": 0.3, "seed": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("key_heads", [1, 4])
def test_varlen_is_attention_of_each_sequence(key_heads, options, dtype, using, device, generator):
    """Cross attention: queries and keys are packed on their own, some sequences empty of one or the other or both."""
    lengths_q, lengths_k = [5, 0, 9, 1, 0], [7, 4, 0, 12, 0]
    bounds = [
        torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k)
    ]
    shapes = ((15, 4, 16), (23, key_heads, 16), (23, key_heads, 16))
    leaves = [t.requires_grad_() for t in draw(generator, device, dtype, *shapes)]
    dropout = {name: options[name] for name in ("dropout_p", "seed") if name in options}
    bare = {name: value for name, value in options.items() if name not in dropout}
    with using:
        out, lse = varlen_attention(*leaves, *bounds, 9, 12, **options, return_lse=True)
        assert torch.equal(out, varlen_attention(*leaves, *bounds, 9, 12, **options))
        dout, dlse = (
            torch.randn(out.shape, generator=generator).to(out),
            torch.randn(lse.shape, generator=generator).to(lse),
        )
        gradients = torch.autograd.grad((out, lse.clamp_min(-1e30)), leaves, (dout, dlse))
    kept = None
    if dropout:
        kept = dropout_mask((4, 15, 12), options["dropout_p"], options["seed"], device)
    expected, lses = [], []
    for n in range(5):
        queries, keys = slice(*bounds[0][n : n + 2].tolist()), slice(*bounds[1][n : n + 2].tolist())
        q, k, v = (t.double()[part].transpose(0, 1) for t, part in zip(leaves, (queries, keys, keys), strict=True))
        call = AttentionCall({"enable_gqa": True, **bare})
        if kept is not None and q.shape[1]:
            weights = torch.softmax(q @ k.repeat_interleave(4 // key_heads, 0).mT / 4, -1)
            weights = weights * kept[:, queries, : k.shape[1]] * keep_scale(options["dropout_p"])
            expected.append((weights @ v.repeat_interleave(4 // key_heads, 0)).transpose(0, 1))
            lses.append((q @ k.repeat_interleave(4 // key_heads, 0).mT / 4).logsumexp(-1))
            continue
        one, one_lse = call.explicit({"q": q, "k": k, "v": v}, torch.float64)
        expected.append(one.transpose(0, 1))
        lses.append(one_lse)
    expected, lses = torch.cat(expected), torch.cat(lses, -1)
    exact = torch.autograd.grad((expected, lses.clamp_min(-1e30)), leaves, (dout.double(), dlse.double()))
    # a few float32 operations (or one rounding to 16 bits) on values of order one to ten
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=near, atol=near)
    torch.testing.assert_close(lse.double(), lses, rtol=min(near, 1e-6), atol=min(near, 1e-6))
    for got, want in zip(gradients, exact, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=near, atol=2 * near)


@pytest.mark.certifies("empty", op="varlen_attention")
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_varlen_of_nothing(lengths, using, device):
    bounds = torch.tensor([0, *lengths], device=device, dtype=torch.int32)
    q = torch.empty(0, 2, 8, device=device, requires_grad=True)
    with using:
        out, lse = varlen_attention(q, q, q, bounds, bounds, 0, 0, return_lse=True)
        (dq,) = torch.autograd.grad(out, q, torch.empty_like(out))
    assert out.shape == dq.shape == (0, 2, 8) and lse.shape == (2, 0)


# --- the mask of dropout, seeds, the log-sum-exp ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n_keys", [7, 64, 1030])
def test_the_mask_is_dropout_mask(n_keys, dtype, using, device, batch=2):
    """Equal logits; the values and the cotangent are rows of the identity, so results and gradients show the mask."""
    q, k = (torch.zeros(batch, 2, n, 8, device=device, dtype=dtype) for n in (18, n_keys))
    mask = dropout_mask((batch, 2, 18, n_keys), 0.4, -3, device)
    with using:
        for columns in torch.arange(n_keys, device=device).split(256):  # the widest head
            v = torch.eye(n_keys, device=device, dtype=dtype)[:, columns].repeat(batch, 2, 1, 1).requires_grad_()
            out = scaled_dot_product_attention(q, k, v, dropout_p=0.4, seed=-3)
            assert torch.equal(out != 0, mask[..., columns])
            torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / n_keys / 0.6))
        dout = torch.eye(18, len(columns), device=device, dtype=dtype)
        (dv,) = torch.autograd.grad(out, v, dout.expand_as(out))
    queries = min(dout.shape)
    assert torch.equal(dv[..., :queries] != 0, mask[:, :, :queries].mT)


def test_the_lse_is_of_the_precision_computed_in(using, device):
    for dtype in DTYPES:
        x = torch.ones(1, 1, 4, 8, device=device, dtype=dtype)
        with using:
            out, lse = scaled_dot_product_attention(x, x, x, return_lse=True)
        assert (out.dtype, lse.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)


@DTYPE
def test_large_logits_do_not_overflow(dtype, using, device, generator):
    """Logits near 1e4 (1e30 in float32): the largest key takes all, where there is one."""
    size = {torch.float16: 100.0, torch.bfloat16: 1e15, torch.float32: 1e15, torch.float64: 1e150}[dtype]
    q, k = (torch.eye(8, device=device, dtype=dtype) * size for _ in range(2))
    v, dout = draw(generator, device, dtype, (8, 8), (8, 8))
    q, k, v = (t[None, None].requires_grad_() for t in (q, k, v))
    with using:
        out, lse = scaled_dot_product_attention(q, k, v, scale=1.0, return_lse=True)
        gradients = torch.autograd.grad(out, (q, k, v), dout[None, None])
    assert torch.equal(out, v) and lse.isfinite().all()
    assert not gradients[0].any() and not gradients[1].any() and torch.equal(gradients[2][0, 0], dout)
