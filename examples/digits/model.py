"""A Vision Transformer: squares of an image in, the digit of the image or the class of each pixel out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.training.model import ModelConfig, Twin, encoder_of

# Spread of the positions at the start. With 0.02 the squares of one image are all but equal, and each norm makes their
# rounding errors 50 times as large: the two variants' losses then part by 1e-2 in five epochs, with 0.3 by 1e-7.
POSITIONS = 0.3


class VisionTransformer(Twin):
    """Squares (batch, squares, pixels) to what each has become in the encoder (batch, squares, width)."""

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__(variant, config)
        self.patch = nn.Linear(config.features, config.width)
        self.position = nn.Parameter(torch.randn(config.context, config.width) * POSITIONS)
        self.layers = encoder_of(variant, config)

    def encode(self, squares: torch.Tensor) -> torch.Tensor:
        x = self.patch(squares) + self.position
        return self.layers(F.dropout(x, self.config.dropout, self.training))


class Classifier(VisionTransformer):
    """Squares to logits of the whole image, (batch, classes), from the mean of all squares."""

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__(variant, config)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, squares: torch.Tensor) -> torch.Tensor:
        return self.head(self.encode(squares).mean(1))


class Segmenter(VisionTransformer):
    """Squares to logits of each of their pixels, (batch, squares, pixels, classes)."""

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__(variant, config)
        self.head = nn.Linear(config.width, config.features * config.classes)

    def forward(self, squares: torch.Tensor) -> torch.Tensor:
        return self.head(self.encode(squares)).unflatten(-1, (self.config.features, self.config.classes))
