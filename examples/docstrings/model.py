"""An encoder of text, as in BERT, that tells a text's class or the tokens hidden in it."""

from __future__ import annotations

import torch
from torch import nn

from examples.docstrings.data import PAD_ID
from examples.training.model import ModelConfig, TokenTwin, encoder_of


class TextEncoder(TokenTwin):
    """Tokens (batch, length) int64 to what each has become, (batch, length, width). PAD is attended to by no other."""

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__(variant, config)
        self.layers = encoder_of(variant, config)
        self.scale_tokens()

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(self.embed(tokens), src_key_padding_mask=tokens == PAD_ID)


class TextClassifier(TextEncoder):
    """Tokens to logits of the text's class, (batch, classes), from the mean over its tokens."""

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__(variant, config)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        real = (tokens != PAD_ID)[..., None]
        encoded = self.encode(tokens).masked_fill(~real, 0.0)
        return self.head(encoded.sum(1) / real.sum(1))


class MaskedModel(TextEncoder):
    """Tokens, some of them hidden, to logits of what stood at some places, (places, vocab).

    A place counts on through all rows. Only these logits are computed: all would cost more than the encoder.
    """

    def forward(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self.logits(self.encode(tokens).flatten(0, 1)[places])
