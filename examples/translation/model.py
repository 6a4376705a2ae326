"""An encoder-decoder Transformer in two variants: `fusednorm.Transformer` and `torch.nn.Transformer`, else the same.

Both have the same parameters under the same names, so one `state_dict` loads strictly into either.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import fusednorm
from examples.translation.data import BEGIN_ID, END_ID, PAD_ID, Batch

VARIANTS = ("eager", "fused")


@dataclass(frozen=True)
class ModelConfig:
    vocab: int
    positions: int
    layers: int = 3
    width: int = 256
    heads: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab", "positions", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")


def make_transformer(variant: str, config: ModelConfig) -> nn.Transformer:
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(VARIANTS)}")
    kind = fusednorm.Transformer if variant == "fused" else nn.Transformer
    with warnings.catch_warnings():
        # torch announces that nested tensors do not go with norm_first; nobody asked for them
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")
        return kind(
            config.width,
            config.heads,
            config.layers,
            config.layers,
            4 * config.width,
            config.dropout,
            # GELU, not ReLU: where an input lies at ReLU's corner its last bit decides whether a gradient is 0, and the
            # curves of two ways to round part 10,000 times as far.
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )


class Translator(nn.Module):
    """Source and target tokens (batch, length) int64 to logits (batch, target length, vocab).

    Positions filled with PAD are attended to by no other, so they change no output but their own. One table embeds
    both languages and gives the logits.
    """

    def __init__(self, variant: str, config: ModelConfig) -> None:
        super().__init__()
        self.variant, self.config = variant, config
        self.token = nn.Embedding(config.vocab, config.width)
        self.position = nn.Embedding(config.positions, config.width)
        self.transformer = make_transformer(variant, config)
        nn.init.normal_(self.token.weight, std=config.width**-0.5)
        nn.init.normal_(self.position.weight, std=0.1)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) * math.sqrt(self.config.width) + self.position(positions)
        return F.dropout(x, self.config.dropout, self.training)

    def encode(self, source: torch.Tensor) -> torch.Tensor:
        return self.transformer.encoder(self.embed(source), src_key_padding_mask=source == PAD_ID)

    def decode(self, target: torch.Tensor, memory: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of each position of the target, (batch, target length, width)."""
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

    def logits(self, decoded: torch.Tensor) -> torch.Tensor:
        return F.linear(decoded, self.token.weight)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.logits(self.decode(target, self.encode(source), source))


def make_twins(
    config: ModelConfig, seed: int, device: torch.device, variants: tuple[str, ...] = VARIANTS
) -> dict[str, Translator]:
    """Build the variants with equal parameters: the first is initialised from the seed, the others load its state."""
    torch.manual_seed(seed)
    twins = {variant: Translator(variant, config) for variant in variants}
    first = twins[variants[0]]
    for model in twins.values():
        if model is not first:
            model.load_state_dict(first.state_dict(), strict=True)
    return {variant: model.to(device) for variant, model in twins.items()}


def loss_of(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross entropy (nats a token) of each target's next token, PAD left out, in float32 at least."""
    logits = model(batch.source, batch.target[:, :-1])
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    wanted = batch.target[:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=PAD_ID, label_smoothing=smoothing)


@torch.no_grad()
def translate(model: Translator, source: torch.Tensor) -> list[list[int]]:
    """Take the likeliest next token until END or the last position; return token ids without BEGIN and END."""
    was_training = model.training
    model.eval()
    rows: list[list[int]] = [[] for _ in source]
    going = list(range(len(source)))  # the rows without END so far: only these are decoded further
    memory = model.encode(source)
    target = source.new_full((len(source), 1), BEGIN_ID)
    for _ in range(model.config.positions):
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
    model.train(was_training)
    return rows
