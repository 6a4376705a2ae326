"""A recogniser of speech: an encoder whose every position says a digit or nothing, trained by CTC."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.training.model import IGNORED, ModelConfig, Twin, encoder_of


class Recogniser(Twin):
    """Features (batch, positions, features) and the length of each row to logits (batch, positions, digits + 1).

    The last class is CTC's blank. Positions beyond a row's length are attended to by no other, and say nothing.
    """

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__(variant, config)
        self.blank = config.classes
        self.features = nn.Linear(config.features, config.width)
        self.position = nn.Parameter(torch.randn(config.context, config.width) * 0.3)
        self.layers = encoder_of(variant, config)
        self.head = nn.Linear(config.width, config.classes + 1)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        count = features.shape[1]
        x = F.dropout(self.features(features) + self.position[:count], self.config.dropout, self.training)
        padding = torch.arange(count, device=features.device) >= lengths[:, None]
        logits = self.head(self.layers(x, src_key_padding_mask=padding))
        # A blank with certainty adds nothing to any path: the loss need not know the lengths.
        silent = torch.full_like(logits[0, 0], -1e4).index_fill(0, lengths.new_tensor([self.blank]), 0.0)
        return torch.where(padding[..., None], silent, logits)

    def loss(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The CTC loss (nats a digit). It is computed on the CPU: CUDA has no deterministic backward of it."""
        likely = F.log_softmax(logits, -1).transpose(0, 1).cpu()
        wanted = wanted.cpu()
        lengths = (wanted != IGNORED).sum(1)
        positions = torch.full_like(lengths, len(likely))
        total = F.ctc_loss(likely, wanted.clamp(min=0), positions, lengths, self.blank, reduction="sum")
        return total.to(logits.device) / lengths.sum()


@torch.no_grad()
def recognise(model: Recogniser, features: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
    """Take the likeliest class of each position; leave out repetitions, then blanks."""
    was_training = model.training
    classes = model.eval()(features, lengths).argmax(-1)
    model.train(was_training)
    rows = [torch.unique_consecutive(row).tolist() for row in classes]
    return [[digit for digit in row if digit != model.blank] for row in rows]
