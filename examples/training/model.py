"""What all models here share: two variants from one initial state, batches, the loss, checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

import fusednorm
from examples.training.text import load_tokenizer

VARIANTS = ("eager", "fused")
IGNORED = -100  # what cross_entropy leaves out, unless told otherwise


def library(variant: str) -> Any:
    """Where a variant's layers come from: both have them under the same names, with the same arguments."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(VARIANTS)}")
    return fusednorm if variant == "fused" else nn


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    context: int  # positions that a model has
    layers: int
    width: int
    heads: int
    dropout: float = 0.0
    vocab: int | None = None  # of tokens
    features: int | None = None  # numbers at each position, where no tokens are given
    classes: int | None = None  # that are told apart, where these are no tokens

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "dropout" and value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")


class Twin(nn.Module):
    """A model in one of two variants, whose parameters have the same names: one `state_dict` loads into either.

    The layers of an encoder come from `encoder_of`. `forward` returns logits (batch, ..., classes).
    """

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__()
        self.variant, self.config = variant, config

    def loss(self, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy (nats) over all that is wanted."""
        return F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), ignore_index=IGNORED)


def encoder_of(variant: str, config: ModelConfig) -> Any:
    """A pre-norm encoder of this variant, with GELU and a norm at its end."""
    layer = library(variant).TransformerEncoderLayer(
        *(config.width, config.heads, 4 * config.width, config.dropout, "gelu"), batch_first=True, norm_first=True
    )
    # Nested tensors, which torch would make of a padding mask, do not go with norm_first.
    norm = nn.LayerNorm(config.width)
    return library(variant).TransformerEncoder(layer, config.layers, norm, enable_nested_tensor=False)


class TokenTwin(Twin):
    """One table embeds the tokens, times `scale`, and gives the logits."""

    scale: float | None = None

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__(variant, config)
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.context, config.width)

    def scale_tokens(self) -> None:
        """Start with small tokens, which also give the logits, and make them as large as positions by the scale."""
        self.scale = self.config.width**0.5
        nn.init.normal_(self.token.weight, std=self.config.width**-0.5)
        nn.init.normal_(self.position.weight, std=0.1)

    def embed(self, tokens: torch.Tensor, cache: fusednorm.KVCache | None = None) -> torch.Tensor:
        """With a cache, of tokens that come after those that it holds."""
        x = self.token(tokens) if self.scale is None else self.token(tokens) * self.scale
        positions = torch.arange(tokens.shape[1], device=tokens.device) if cache is None else cache.positions(tokens)
        return F.dropout(x + self.position(positions), self.config.dropout, self.training)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.token.weight)


Model = TypeVar("Model", bound=Twin)


def make_twins(
    kind: type[Model], config: ModelConfig, seed: int, device: torch.device, variants: tuple[str, ...] = VARIANTS
) -> dict[str, Model]:
    """Build the variants with equal parameters: the first is initialised from the seed, the others load its state."""
    torch.manual_seed(seed)
    twins = {variant: kind(variant, config) for variant in variants}
    first = twins[variants[0]]
    for model in twins.values():
        if model is not first:
            model.load_state_dict(first.state_dict(), strict=True)
    return {variant: model.to(device) for variant, model in twins.items()}


class Batch(NamedTuple):
    """What a model is called with, and which token or class it should give at each position, or IGNORED."""

    inputs: tuple[torch.Tensor, ...]
    wanted: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(tuple(tensor.to(device) for tensor in self.inputs), self.wanted.to(device))

    def tokens(self) -> int:
        """How many tokens or classes the batch asks for."""
        return int((self.wanted != IGNORED).sum())


def loss_of(model: Twin, batch: Batch) -> torch.Tensor:
    """The model's loss of a batch, a mean over all that is wanted, in float32 at least."""
    logits = model(*batch.inputs)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return model.loss(logits, batch.wanted)


def save_checkpoint(path: Path, model: Twin, tokenizer: Any) -> None:
    """Write what a later process needs: parameters, model sizes, tokenizer if any; plain types and tensors only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"variant": model.variant, "config": asdict(model.config), "state": model.state_dict()}
    torch.save(content | {"tokenizer": tokenizer and tokenizer.to_str()}, path)


def load_checkpoint(path: Path, kind: type[Model], device: torch.device) -> tuple[Model, Any]:
    """Rebuild model and tokenizer; `weights_only=True` executes nothing that the file contains."""
    saved = torch.load(path, map_location=device, weights_only=True)
    model = kind(saved["variant"], ModelConfig(**saved["config"])).to(device)
    model.load_state_dict(saved["state"], strict=True)
    return model, saved["tokenizer"] and load_tokenizer(saved["tokenizer"])
