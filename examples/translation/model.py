"""An encoder-decoder Transformer: `fusednorm.Transformer` or `torch.nn.Transformer`, else the same."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import fusednorm
from examples.training.model import ModelConfig, TokenTwin, library
from examples.translation.data import BEGIN_ID, END_ID, PAD_ID


def make_transformer(variant: str, config: ModelConfig) -> nn.Transformer:
    with warnings.catch_warnings():
        # torch announces that nested tensors do not go with norm_first; nobody asked for them
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")
        return library(variant).Transformer(
            *(config.width, config.heads, config.layers, config.layers, 4 * config.width, config.dropout),
            # GELU, not ReLU: where an input lies at ReLU's corner its last bit decides whether a gradient is 0, and the
            # curves of two ways to round part 10,000 times as far.
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )


class Translator(TokenTwin):
    """Source and target tokens (batch, length) int64 to logits (batch, target length, vocab).

    Positions filled with PAD are attended to by no other, so they change no output but their own. Both languages have
    one table of tokens.
    """

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__(variant, config)
        self.transformer = make_transformer(variant, config)
        self.scale_tokens()

    def encode(self, source: torch.Tensor) -> torch.Tensor:
        return self.transformer.encoder(self.embed(source), src_key_padding_mask=source == PAD_ID)

    def decode(
        self,
        target: torch.Tensor,
        memory: torch.Tensor,
        source: torch.Tensor,
        cache: fusednorm.KVCache | None = None,
    ) -> torch.Tensor:
        """What the decoder makes of each position of the target, (batch, target length, width).

        With a cache the target continues what that holds; of the fused variant alone.
        """
        if cache is not None:
            x = self.embed(target, cache)
            return self.transformer.decoder(x, memory, memory_key_padding_mask=source == PAD_ID, cache=cache)
        length = target.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        return self.transformer.decoder(
            self.embed(target),
            memory,
            tgt_mask=future,
            tgt_is_causal=True,
            tgt_key_padding_mask=target == PAD_ID,
            memory_key_padding_mask=source == PAD_ID,
        )

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.logits(self.decode(target, self.encode(source), source))


@torch.no_grad()
def translate(model: Translator, source: torch.Tensor, beams: int = 1) -> list[list[int]]:
    """Token ids of the translations, without BEGIN and END, which end at END or at the last position.

    The fused variant decodes with a cache of keys and values, with `beams` over 1 by beam search. The eager variant
    computes all positions again for each token.
    """
    was_training = model.training
    model.eval()
    if model.variant == "fused":
        memory = model.encode(source)
        try:
            tokens, _ = fusednorm.generate(
                lambda target, cache: model.logits(model.decode(target, memory, source, cache)),
                source.new_full((len(source), 1), BEGIN_ID),
                model.config.context,
                end=END_ID,
                forbidden=(PAD_ID, BEGIN_ID),  # neither stands inside a translation
                beams=beams,
            )
        except ValueError:  # training diverged; the verdict on the curves says so
            tokens = source.new_zeros((len(source), 0))
        rows = [row[: row.index(END_ID)] if END_ID in row else row for row in tokens.tolist()]
    else:
        rows = recompute(model, source)
    model.train(was_training)
    return rows


def recompute(model: Translator, source: torch.Tensor) -> list[list[int]]:
    """Take the likeliest next token, without a cache."""
    rows: list[list[int]] = [[] for _ in source]
    going = list(range(len(source)))  # the rows without END so far: only these are decoded further
    memory = model.encode(source)
    target = source.new_full((len(source), 1), BEGIN_ID)
    for _ in range(model.config.context):
        logits = model.logits(model.decode(target, memory, source)[:, -1])
        logits[:, [PAD_ID, BEGIN_ID]] = -torch.inf  # neither stands inside a translation
        chosen = logits.argmax(-1)
        goes_on = chosen != END_ID
        target = torch.cat([target, chosen[:, None]], dim=1)[goes_on]
        memory, source = memory[goes_on], source[goes_on]
        going = [row for row, on in zip(going, goes_on.tolist()) if on]
        for row, token in zip(going, chosen[goes_on].tolist()):
            rows[row].append(token)
        if not going:
            break
    return rows
