"""A small pre-norm decoder-only Transformer, of the layers of fusednorm or of `torch.nn`.

A decoder that attends to nothing but itself is what both call an encoder, with a causal mask.
"""

from __future__ import annotations

import math

import torch
from torch import nn

import fusednorm
from examples.training.model import ModelConfig, TokenTwin, encoder_of


class LanguageModel(TokenTwin):
    """Tokens (batch, length) int64 to logits (batch, length, vocab)."""

    future: torch.Tensor

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__(variant, config)
        self.layers = encoder_of(variant, config)
        self.register_buffer("future", torch.ones(config.context, config.context).triu(1).bool(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            if parameter.dim() < 2:
                nn.init.zeros_(parameter)
                continue
            # The two projections of each layer that write to the residual stream start smaller, as in GPT-2.
            last = name.endswith(("out_proj.weight", "linear2.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if last else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        return self.logits(self.layers(self.embed(tokens), mask=self.future[:length, :length], is_causal=True))

    def step(self, tokens: torch.Tensor, cache: fusednorm.KVCache) -> torch.Tensor:
        """Logits of tokens that come after those that the cache holds; of the fused variant alone."""
        return self.logits(self.layers(self.embed(tokens, cache), cache=cache))


def continue_text(model: LanguageModel, tokens: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Sample up to `count` tokens at temperature 0.7 after the (1, n) prompt; the draw depends on the seed alone.

    Where the positions of the model end, the last half of them is the prompt of what follows.
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)
    model.eval()
    wanted = tokens.shape[1] + count
    while tokens.shape[1] < wanted:
        prompt = tokens if tokens.shape[1] < model.config.context else tokens[:, -(model.config.context // 2) :]
        room = min(wanted - tokens.shape[1], model.config.context - prompt.shape[1])
        try:
            new, _ = fusednorm.generate(model.step, prompt, room, sample=True, temperature=0.7, generator=generator)
        except ValueError:  # training diverged; the verdict on the curves says so
            break
        tokens = torch.cat([tokens, new], dim=1)
    return tokens
