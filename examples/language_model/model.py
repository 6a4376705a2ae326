"""A small pre-norm decoder-only Transformer in two variants: the layers of fusednorm, and those of `torch.nn`.

Both have the same parameters under the same names, so one `state_dict` loads strictly into either. A decoder that
attends to nothing but itself is what both call an encoder, with a causal mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import fusednorm

VARIANTS = ("eager", "fused")


@dataclass(frozen=True)
class ModelConfig:
    vocab: int
    context: int
    layers: int = 4
    width: int = 512
    heads: int = 8
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")


def make_layers(variant: str, config: ModelConfig) -> nn.TransformerEncoder:
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(VARIANTS)}")
    kind = fusednorm if variant == "fused" else nn
    layer = kind.TransformerEncoderLayer(
        *(config.width, config.heads, 4 * config.width, config.dropout, "gelu"), batch_first=True, norm_first=True
    )
    # a padding mask, of which torch would make nested tensors, is never given
    return kind.TransformerEncoder(layer, config.layers, nn.LayerNorm(config.width), enable_nested_tensor=False)


class LanguageModel(nn.Module):
    """Tokens (batch, length) int64 to logits (batch, length, vocab). The table of tokens gives the logits too."""

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__()
        self.variant, self.config = variant, config
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.layers = make_layers(variant, config)
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
        positions = torch.arange(length, device=tokens.device)
        x = F.dropout(self.token(tokens) + self.position(positions), self.config.dropout, self.training)
        x = self.layers(x, mask=self.future[:length, :length], is_causal=True)
        return F.linear(x, self.token.weight)


def make_twins(
    config: ModelConfig, seed: int, device: torch.device, variants: tuple[str, ...] = VARIANTS
) -> dict[str, LanguageModel]:
    """Build the variants with equal parameters: the first is initialised from the seed, the others load its state."""
    torch.manual_seed(seed)
    twins = {variant: LanguageModel(variant, config) for variant in variants}
    first = twins[variants[0]]
    for model in twins.values():
        if model is not first:
            model.load_state_dict(first.state_dict(), strict=True)
    return {variant: model.to(device) for variant, model in twins.items()}


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy (nats a token) of predicting each row's next token, in float32 at least."""
    logits = model(rows[:, :-1])
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def continue_text(model: LanguageModel, tokens: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Sample up to `count` tokens at temperature 0.7 after the (1, n) prompt; the draw depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    for _ in range(count):
        logits = model(tokens[:, -model.config.context :])[:, -1].float().cpu()
        if not logits.isfinite().all():
            break  # training diverged; the verdict on the curves says so
        drawn = torch.multinomial(torch.softmax(logits / 0.7, dim=-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)], dim=1)
    return tokens
