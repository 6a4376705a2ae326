"""Norms of other libraries on inputs whose dimensions lie in memory in another order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fusednorm

D = 16
calls = []  # of the norm's own forward


class Rms(nn.Module):
    """As Llama's, in torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(D) + 0.5), 1e-6

    def forward(self, x):
        calls.append(x.shape)
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


LAYOUTS = {
    "heads": lambda t: t.view(2, 5, 3, D).transpose(1, 2),
    "rotated": lambda t: t.view(5, 3, 2, D).permute(2, 0, 1, 3),
    "one": lambda t: t.view(2, 15, 1, D).transpose(1, 2),
    "flat": lambda t: t.view(30, D),
    "gaps": lambda t: t.view(2, 3, 5, D)[:, :, ::2],
    "features outside": lambda t: t.view(D, 30).t(),
    "repeated": lambda t: t.view(30, D)[:1].expand(4, D),
}
FUSED = ("heads", "rotated", "one", "flat")


def strides(t):
    """Those that mean something."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_gradients_and_strides_are_the_norms_own(layout):
    own = Rms()
    ours = copy.deepcopy(own)
    assert fusednorm.accelerate(ours).fused
    x = torch.randn(30 * D, requires_grad=True)
    found = []
    for norm in (ours, own):
        y = norm(LAYOUTS[layout](x))
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, norm.weight)), strides(y)))
    torch.testing.assert_close(found[0][:3], found[1][:3])
    assert found[0][3] == found[1][3]
    calls.clear()
    ours(LAYOUTS[layout](x))
    assert bool(calls) == (layout not in FUSED)
