"""Accelerate a model of your own, look at what changed, and undo it."""

import torch
from torch import nn

import fusednorm


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x):
        h = self.norm1(x)
        h, _ = self.attention(h, h, h, need_weights=False)
        x = x + self.drop(h)
        h = self.fc1(self.norm2(x))
        h = self.act(h)
        return x + self.drop(self.fc2(h))


model = nn.Sequential(Block(), Block(), nn.LayerNorm(64))
report = fusednorm.accelerate(model, example=torch.randn(2, 8, 64))  # compares results before and after
print(report)
print("\nThe first block's forward is now:\n", report.source("0"), sep="\n")

model(torch.randn(2, 8, 64)).square().mean().backward()
fusednorm.restore(model)
assert type(model[0]) is Block
print("restore() brought the blocks' own class and forward back")
