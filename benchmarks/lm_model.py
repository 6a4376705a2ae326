"""A small pre-norm decoder-only Transformer in two variants that differ in one module.

`fused` does residual add, dropout and LayerNorm in one `fusednorm.AddLayerNorm`; `eager` does the same with
`nn.LayerNorm` and explicit operators. Both have the same parameters under the same names, so one `state_dict`
loads strictly into either.
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


class EagerAddLayerNorm(nn.LayerNorm):
    """What `fusednorm.AddLayerNorm` replaces: dropout, residual add and `nn.LayerNorm` as separate operators.

    With `same_masks` the dropout takes the mask that the fused operator draws from the seed, so that both variants
    compute the same function; that is slow (the mask becomes a tensor). Without, it is torch's own dropout.
    """

    def __init__(self, width: int, dropout_p: float = 0.0) -> None:
        super().__init__(width)
        self.dropout_p = dropout_p
        self.same_masks = True

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, residual: torch.Tensor | None = None, *, seed: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.training and self.dropout_p > 0.0:
            if self.same_masks and seed is not None:
                mask = fusednorm.dropout_mask(x.shape, self.dropout_p, seed, x.device)
                x = torch.where(mask, x * (1.0 / (1.0 - self.dropout_p)), 0.0)
            else:
                x = F.dropout(x, self.dropout_p)
        stream = x if residual is None else residual + x
        return super().forward(stream), stream


def add_norm(variant: str, config: ModelConfig) -> nn.Module:
    if variant == "fused":
        return fusednorm.AddLayerNorm(config.width, dropout_p=config.dropout)
    if variant == "eager":
        return EagerAddLayerNorm(config.width, config.dropout)
    raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(VARIANTS)}")


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = add_norm(variant, config)
        self.attention = Attention(config)
        self.norm2 = add_norm(variant, config)
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.contract = nn.Linear(4 * config.width, config.width)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, seeds: tuple[int | None, int | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.norm1(x, residual, seed=seeds[0])
        normed, residual = self.norm2(self.attention(normed), residual, seed=seeds[1])
        return self.contract(F.gelu(self.expand(normed))), residual


class LanguageModel(nn.Module):
    """Tokens (batch, length) int64 to logits (batch, length, vocab).

    `x` is the last sublayer's output, not yet added: each norm adds it to the residual stream, drops elements of it
    and normalises in one step. The first norm has no stream yet; the last one closes it.
    """

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__()
        self.variant, self.config = variant, config
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(variant, config) for _ in range(config.layers))
        self.norm = add_norm(variant, config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue
            if parameter.dim() < 2:
                nn.init.zeros_(parameter)
                continue
            # The two projections of each block that write to the residual stream start smaller, as in GPT-2.
            last = name.endswith(("attention.out.weight", "contract.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers) if last else 0.02)

    def forward(self, tokens: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        """`seed` fixes every dropout mask of this call."""
        norms = 2 * len(self.blocks) + 1
        seeds = [None if seed is None else seed * norms + i for i in range(norms)]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        residual = None
        for i, block in enumerate(self.blocks):
            x, residual = block(x, residual, (seeds[2 * i], seeds[2 * i + 1]))
        normed, _ = self.norm(x, residual, seed=seeds[-1])
        return F.linear(normed, self.token.weight)


def use_torch_dropout(model: nn.Module) -> None:
    """Let an eager model draw dropout as torch users do, for timing it."""
    for module in model.modules():
        if isinstance(module, EagerAddLayerNorm):
            module.same_masks = False


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


def loss_of(model: nn.Module, rows: torch.Tensor, seed: int | None = None) -> torch.Tensor:
    """Mean cross entropy (nats a token) of predicting each row's next token, in float32 at least."""
    logits = model(rows[:, :-1], seed)
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
