"""A pre-norm block of torch's own pieces, for tests of accelerate."""

from __future__ import annotations

from torch import nn

D = 16


class Block(nn.Module):
    """A pre-norm block with a feed-forward part."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mix = nn.Linear(D, D)
        self.fc1, self.fc2, self.act, self.drop = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.GELU(), nn.Dropout(p)

    def forward(self, x):
        x = x + self.drop(self.mix(self.norm1(x)))
        h = self.norm2(x)
        h = self.fc1(h)
        h = self.act(h)
        h = self.fc2(h)
        return x + self.drop(h)


class Stack(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(p), Block(p)])
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def sums(report):
    return [entry for entry in report.fused if entry.kind == "residual"]
