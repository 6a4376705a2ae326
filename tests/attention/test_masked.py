"""Attention over the provider table: what is masked or dropped reaches nothing, NaN and Inf included."""

from __future__ import annotations

import pytest
import torch
from oracle_attention import draw, operands

from fusednorm import dropout_mask, scaled_dot_product_attention

OP = "attention_fwd"

BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
N = 12
POSITION = torch.arange(N)
ONE_DOCUMENT = (POSITION < 9) == (POSITION[:, None] < 9)
HIDING = {  # options; bad positions of (keys and values), of (queries and cotangents); positions of (q, k) not reached
    "bool_documents": ({"attn_mask": ONE_DOCUMENT}, slice(9, N), slice(9, N), slice(0, 9), slice(0, 9)),
    "additive_documents": (
        {"attn_mask": torch.where(ONE_DOCUMENT, 0.5, -torch.inf)},
        *(slice(9, N), slice(9, N), slice(0, 9), slice(0, 9)),
    ),
    "padding": ({"key_mask": (POSITION < 9).expand(2, N)}, slice(9, N), slice(0), slice(0, N), slice(0, N)),
    "padding_as_bool_mask": (
        {"attn_mask": (POSITION < 9).expand(2, 1, 1, N)},
        *(slice(9, N), slice(0), slice(0, N), slice(0, N)),
    ),
    "keys_after_causal": ({"is_causal": True}, slice(9, N), slice(0), slice(0, 9), slice(0)),
    "queries_before_causal": ({"is_causal": True}, slice(0), slice(0, 3), slice(3, N), slice(3, N)),
    "keys_outside_window": ({"window": (None, 1)}, slice(9, N), slice(0), slice(0, 8), slice(0)),
    "queries_outside_window": ({"window": (None, 1)}, slice(0), slice(0, 3), slice(3, N), slice(4, N)),
    "queries_that_see_nothing": (
        {"attn_mask": (POSITION >= 3)[:, None].expand(N, N)},
        *(slice(0), slice(0, 3), slice(0, N), slice(0, N)),
    ),
}


@pytest.mark.certifies("NaN safety")
@BAD
@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("hiding", HIDING)
def test_what_is_masked_reaches_nothing(hiding, create_graph, bad, using, device, generator):
    """Results and gradients are what they are with zeros there, to a rounding of float32."""
    options, bad_keys, bad_queries, *clean = HIDING[hiding]
    options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    tensors = draw(generator, device, torch.float32, *[(2, 3, N, 8)] * 4)
    results = []
    with using:
        for value in (bad, 0.0):
            q, k, v, dout = (t.clone() for t in tensors)
            for tensor, where in ((q, bad_queries), (dout, bad_queries), (k, bad_keys), (v, bad_keys)):
                tensor[:, :, where] = value
            leaves = [t.requires_grad_() for t in (q, k, v)]
            for lse_too in (False, True):
                out, *lse = outputs = scaled_dot_product_attention(*leaves, **options, return_lse=True)
                if not lse_too:
                    out = scaled_dot_product_attention(*leaves, **options)
                    outputs = (out,)
                cotangents = (dout, torch.where(lse[0] > -torch.inf, dout[..., 0], value))[: len(outputs)]
                dq, dk, dv = torch.autograd.grad(outputs, leaves, cotangents, create_graph=create_graph)
                if "padding" in hiding:
                    assert not dk[:, :, bad_keys].any() and not dv[:, :, bad_keys].any()
                results.append([t[:, :, clean[0]] for t in (out, dq)] + [t[:, :, clean[1]] for t in (dk, dv)])
                results[-1].append(torch.where(lse[0] > -torch.inf, lse[0], 0.0)[:, :, clean[0]])
    for got, expected in zip(results[0] + results[1], results[2] + results[3], strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected)


@BAD
@pytest.mark.parametrize("hiding", HIDING)
def test_what_is_masked_reaches_no_transform(hiding, bad, using, device, generator):
    """Gradients by torch.func, and tangents."""
    options, bad_keys, bad_queries, *clean = HIDING[hiding]
    options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    q, k, v, dout = draw(generator, device, torch.float32, *[(2, 3, N, 8)] * 4)
    for tensor, where in ((q, bad_queries), (dout, bad_queries), (k, bad_keys), (v, bad_keys)):
        tensor[:, :, where] = bad

    def run(*leaves):
        return scaled_dot_product_attention(*leaves, **options)

    with using:
        out, pull = torch.func.vjp(run, q, k, v)
        dq, dk, dv = pull(dout)
        _, tangent = torch.func.jvp(run, (q, k, v), (torch.ones_like(q), k, v))
    for got in (out, dq, tangent):
        assert got[:, :, clean[0]].isfinite().all()
    for got in (dk, dv):
        assert got[:, :, clean[1]].isfinite().all()


@BAD
def test_what_is_dropped_reaches_nothing(bad, ours, using, device, generator):
    mask = dropout_mask((1, 1, 6, 10), 0.5, 4, device)[0, 0]
    dropped = ~mask[2]
    q, k, v = draw(generator, device, torch.float32, *[(1, 1, n, 8) for n in (6, 10, 10)])
    results = []
    with using:
        for value in (bad, 0.0):
            values = torch.where(dropped[:, None], value, v).requires_grad_()
            out = scaled_dot_product_attention(q, k, values, dropout_p=0.5, seed=4)
            results.append(out[:, :, 2])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)  # the sum may be made in another order then


def test_infinite_values_that_are_seen_are_passed_on(ours, using, device):
    q, k = torch.zeros(1, 1, 3, 8, device=device), torch.zeros(1, 1, 3, 8, device=device)
    v = torch.zeros(1, 1, 3, 8, device=device)
    v[..., 0, 0], v[..., 1, 1], v[..., 2, 2], v[..., 0, 3], v[..., 1, 3] = (
        *(torch.inf, -torch.inf, torch.nan),
        *(torch.inf, -torch.inf),
    )
    with using:
        out = scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0]
    expected = torch.zeros(3, 8)
    expected[:, 0], expected[1:, 1], expected[2, 2], expected[:, 3] = torch.inf, -torch.inf, torch.nan, torch.nan
    expected[0, 3] = torch.inf
    torch.testing.assert_close(out.cpu(), expected, equal_nan=True)


# pytorch#41508, #103963, #118628: NaN where a query or a whole sequence sees nothing
@pytest.mark.parametrize("kind", ["attn_mask", "additive", "key_mask", "window"])
def test_fully_masked_rows_are_zero_and_so_are_their_gradients(kind, using, device, generator):
    """And their log-sum-exp is -inf."""
    *leaves, dout = operands(generator, device, *[(2, 2, 5, 8)] * 4)
    nothing = torch.zeros(5, 5, dtype=torch.bool, device=device)
    options = {
        "attn_mask": {"attn_mask": nothing},
        "additive": {"attn_mask": torch.full((5, 5), -torch.inf, device=device)},
        "key_mask": {"key_mask": nothing[:2]},
        "window": {"window": (0, 0), "attn_mask": ~torch.eye(5, dtype=torch.bool, device=device)},
    }[kind]
    with using:
        out, lse = scaled_dot_product_attention(*leaves, **options, return_lse=True)
        plain = scaled_dot_product_attention(*leaves, **options)
        gradients = torch.autograd.grad((out, plain), leaves, (dout, dout))
    assert not out.any() and not plain.any() and (lse == -torch.inf).all()
    assert not any(gradient.any() for gradient in gradients)
