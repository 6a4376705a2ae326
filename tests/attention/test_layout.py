"""How attention's results lie in memory: as torch's own, so that ``view`` works where it works there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusednorm import scaled_dot_product_attention

OP = "attention_fwd"

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
