"""Norms of other libraries on inputs whose dimensions lie in memory in another order."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
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


class OfTorch(Rms):
    """By torch's own function, whose results are contiguous."""

    def forward(self, x):
        calls.append(x.shape)
        return F.rms_norm(x, (D,), self.weight, self.eps)


LAYOUTS = {
    "heads": lambda t: t.view(2, 5, 3, D).transpose(1, 2),
    "rotated": lambda t: t.view(5, 3, 2, D).permute(2, 0, 1, 3),
    "samples inside": lambda t: t.view(15, 2, D).transpose(0, 1),
    "flat": lambda t: t.view(30, D),
    "gaps": lambda t: t.view(2, 3, 5, D)[:, :, ::2],
    "features outside": lambda t: t.view(D, 30).t(),
    "repeated": lambda t: t.view(30, D)[:1].expand(4, D),
}
FUSED = ("heads", "rotated", "samples inside", "flat")


def strides(t):
    """Those that mean something."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [Rms, OfTorch])
def test_values_gradients_and_strides_are_the_norms_own(kind, layout):
    own = kind()
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
    assert bool(calls) == (layout not in FUSED or (kind is OfTorch and layout != "flat"))


class Heads(nn.Module):
    """Reads its normed heads as a view, which only some layouts allow."""

    def __init__(self, norm):
        super().__init__()
        self.fc, self.norm = nn.Linear(3 * D, 3 * D), norm

    def forward(self, x):
        return self.norm(self.fc(x).view(2, 5, 3, D).transpose(1, 2)).view(6, 5, D)


def test_a_view_of_the_result_works_as_before():
    own = Heads(OfTorch())
    ours = copy.deepcopy(own)
    assert fusednorm.accelerate(ours).fused
    x = torch.randn(2, 5, 3 * D)
    torch.testing.assert_close(ours(x), own(x))


@pytest.mark.parametrize("kind", [Rms, OfTorch])
def test_a_module_on_meta_runs(kind):
    ours = kind().to("meta")
    fusednorm.accelerate(ours)
    assert ours(torch.empty(2, 5, 3, D, device="meta").transpose(1, 2)).shape == (2, 3, 5, D)
