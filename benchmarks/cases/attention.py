"""What is measured of `scaled_dot_product_attention`: an operation in the form that `cases.operations` asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusednorm
from benchmarks.cases.base import Call, Leaves, Operation


@dataclass(frozen=True)
class Attention(Operation):
    """Self-attention of queries (B, H, S, D), with the masks that a user of plain torch would write out."""

    name: str
    causal: bool = False
    padded: bool = False  # a key_mask: sequences of a batch are between half as long as the longest and as long
    window: int | None = None  # keys to the left that a query sees, beside causality
    group: int = 1  # query heads to a head of keys and values
    dropout_p: float = 0.0
    family = "attention"

    def inputs(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        batch, heads, length, dim = shape
        keys = (batch, max(heads // self.group, 1), length, dim)
        return {"query": shape, "key": keys, "value": keys}

    def mask_of(self, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor | None:
        """The weights that `fused` keeps with this seed; None without dropout."""
        if not self.draws_mask:
            return None
        return fusednorm.dropout_mask((*shape[:3], shape[2]), self.dropout_p, seed, device)

    def lengths(self, shape: tuple[int, ...]) -> list[int]:
        """Keys that are no padding, of each sequence of the batch."""
        batch, length = shape[0], shape[2]
        if not self.padded:
            return [length] * batch
        return [length - (length // 2) * b // max(batch - 1, 1) for b in range(batch)]

    def key_mask(self, query: Tensor) -> Tensor | None:
        if not self.padded:
            return None
        lengths = torch.tensor(self.lengths(tuple(query.shape)), device=query.device)
        return torch.arange(query.shape[2], device=query.device) < lengths[:, None]

    def attn_mask(self, query: Tensor) -> Tensor | None:
        """What torch needs in place of the key mask and the window."""
        padding = self.key_mask(query)
        if self.window is None:
            return None if padding is None else padding[:, None, None, :]
        at = torch.arange(query.shape[2], device=query.device)
        behind = at[:, None] - at
        return (behind >= 0) & (behind <= self.window)

    def twin(self, t: Leaves, mask: Tensor | None) -> tuple[Tensor, ...]:
        if mask is None:
            return self.eager(t)()
        query, key, value = t["query"], *(t[n].repeat_interleave(self.group, 1) for n in ("key", "value"))
        logits = query @ key.mT * query.shape[-1] ** -0.5
        if self.causal:
            seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril()
            logits = logits.masked_fill(~seen, -math.inf)
        weights = torch.where(mask, logits.softmax(-1) * (1.0 / (1.0 - self.dropout_p)), 0.0)
        return (weights @ value,)

    def eager(self, t: Leaves, backend: SDPBackend | None = None) -> Call:
        """What a user of plain torch writes: its masks are made beforehand. With `backend` that one and no other."""
        query, key, value = t["query"], t["key"], t["value"]
        mask, causal, p = self.attn_mask(query), self.causal and self.window is None, self.dropout_p
        grouped = self.group > 1

        def call() -> tuple[Tensor, ...]:
            return (F.scaled_dot_product_attention(query, key, value, mask, p, causal, enable_gqa=grouped),)

        def forced() -> tuple[Tensor, ...]:
            with sdpa_kernel(backend):
                return call()

        return call if backend is None else forced

    def fused(self, t: Leaves, seed: int | None = None) -> Call:
        query, key, value = t["query"], t["key"], t["value"]
        options: dict[str, object] = {"is_causal": self.causal}
        if self.padded:
            options["key_mask"] = self.key_mask(query)
        if self.window is not None:
            options["window"] = (self.window, 0)
        if self.group > 1:
            options["enable_gqa"] = True
        if self.draws_mask:
            options |= {"dropout_p": self.dropout_p, "seed": seed}
        return lambda: (fusednorm.scaled_dot_product_attention(query, key, value, **options),)

    def traffic(self, shape: tuple[int, ...], itemsize: int) -> tuple[int, int, int]:
        """Each tensor once, no logits, the log-sum-exp (kept for a backward) in float32."""
        queries, statistics = math.prod(shape) * itemsize, math.prod(shape[:3]) * 4
        keys = 2 * math.prod(self.inputs(shape)["key"]) * itemsize
        return 2 * queries + keys, (3 * queries + keys + statistics) + (queries + keys), statistics

    def pairs(self, shape: tuple[int, ...]) -> int:
        """Queries and keys that see each other, in a head, over the batch."""
        length, total = shape[2], 0
        for seen in self.lengths(shape):
            if self.causal:
                reach = length if self.window is None else self.window + 1
                total += sum(min(i + 1, seen) - min(max(i + 1 - reach, 0), seen) for i in range(length))
            else:
                total += length * seen
        return total

    def arithmetic(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Of the matrix products: two forward (logits, output), five backward (logits again, dP, dV, dQ, dK)."""
        product = 2 * shape[3] * shape[1] * self.pairs(shape)
        return 2 * product, 5 * product

    def memory_needed(self, shape: tuple[int, ...], itemsize: int) -> int:
        """An upper estimate of what checking and measuring take: float64 twins, with all logits and their gradients."""
        logits = shape[0] * shape[1] * shape[2] ** 2
        return logits * (6 * 8 + 2 * itemsize + (40 if self.draws_mask else 0)) + math.prod(shape) * 150
