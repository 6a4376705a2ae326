"""A query that sees no key: its output and gradients are zero, its log-sum-exp is -inf."""

from __future__ import annotations

import pytest
import torch

from fusednorm import scaled_dot_product_attention

OP = "attention_fwd"


def operands(generator, device, *shapes, dtype=torch.float32):
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


# pytorch#41508, #103963, #118628: NaN where a query or a whole sequence sees nothing
@pytest.mark.parametrize("kind", ["attn_mask", "additive", "key_mask", "window"])
def test_fully_masked_rows_are_zero_and_so_are_their_gradients(kind, using, device, generator):
    q, k, v, dout = operands(generator, device, *[(2, 2, 5, 8)] * 4)
    nothing = torch.zeros(5, 5, dtype=torch.bool, device=device)
    options = {
        "attn_mask": {"attn_mask": nothing},
        "additive": {"attn_mask": torch.full((5, 5), -torch.inf, device=device)},
        "key_mask": {"key_mask": nothing[:2]},
        "window": {"window": (0, 0), "attn_mask": ~torch.eye(5, dtype=torch.bool, device=device)},
    }[kind]
    with using:
        out, lse = scaled_dot_product_attention(q, k, v, **options, return_lse=True)
        plain = scaled_dot_product_attention(q, k, v, **options)
        gradients = torch.autograd.grad((out, plain), (q, k, v), (dout, dout))
    assert not out.any() and not plain.any() and (lse == -torch.inf).all()
    assert not any(gradient.any() for gradient in gradients)
