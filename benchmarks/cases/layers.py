"""What is measured of whole Transformer layers: an operation in the form that `cases.operations` asks for.

`both` is a training step of the layer without its optimizer: forward, and the gradients of inputs and parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fusednorm
from benchmarks.cases.base import Call, Leaves, Operation
from fusednorm._saved_bytes import saved_bytes

HEAD_DIM = 64


@dataclass(frozen=True)
class Layer(Operation):
    """An encoder or decoder layer on (batch, length, width): heads of 64, a feed-forward block of 4 x width.

    The results are checked without dropout, because torch draws other masks than ours: what has a `seed`, and the twin.
    What is timed drops elements as in training.
    """

    name: str
    decoder: bool = False  # with a memory as long as the target, and causal self-attention
    norm_first: bool = False
    activation: str = "relu"
    dropout_p: float = 0.1
    family = "layer"

    def _layer(self, module: Any, width: int, dropout_p: float) -> nn.Module:
        """One of `nn` or `fusednorm`, without memory for its parameters."""
        kind = module.TransformerDecoderLayer if self.decoder else module.TransformerEncoderLayer
        heads = max(width // HEAD_DIM, 1)
        return kind(
            *(width, heads, 4 * width, dropout_p, self.activation),
            batch_first=True,
            norm_first=self.norm_first,
            device="meta",
        )

    def inputs(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        parameters = {name: tuple(p.shape) for name, p in self._layer(nn, shape[-1], 0.0).named_parameters()}
        return {"x": shape, **({"memory": shape} if self.decoder else {}), **parameters}

    def values(self, name: str, normal: Tensor) -> Tensor:
        """A leaf from normal numbers: matrices as a trained layer's, weights of norms around 1.

        ReLU's inputs stay six deviations from its kink, above it or below by hidden unit: a rounding that carries one
        of millions across changes gradients by whole numbers, in whichever implementation it happens.
        """
        if self.activation == "relu" and name == "linear1.bias":
            return 6.0 * normal.sign() + 0.2 * normal
        if normal.ndim == 2:
            return normal * normal.shape[1] ** -0.5
        if normal.ndim == 1:
            return (1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.2 * normal
        return normal

    def mask_of(self, shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        return None

    def _call(self, module: Any, t: Leaves, dropout_p: float) -> Call:
        x = t["x"]
        layer = self._layer(module, x.shape[-1], dropout_p).train()
        for name, _ in list(layer.named_parameters()):
            owner, _, last = name.rpartition(".")
            layer.get_submodule(owner)._parameters[last] = t[name]  # the leaf itself: gradients are asked of it
        if not self.decoder:
            return lambda: (layer(x),)
        memory, length = t["memory"], x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device, dtype=x.dtype)
        return lambda: (layer(x, memory, tgt_mask=mask, tgt_is_causal=True),)

    def twin(self, t: Leaves, mask: None) -> tuple[Tensor, ...]:
        """Torch's layer without dropout in the dtype of `t`, float64 included."""
        return self._call(nn, t, 0.0)()

    def eager(self, t: Leaves) -> Call:
        return self._call(nn, t, self.dropout_p)

    def fused(self, t: Leaves, seed: int | None = None) -> Call:
        return self._call(fusednorm, t, self.dropout_p if seed is None else 0.0)

    def kept_bytes(self, t: Leaves, call: Callable[[], Any]) -> int:
        """What one forward keeps for its backward: distinct storages, without inputs and parameters."""
        return saved_bytes(t.values(), call)

    def traffic(self, shape: tuple[int, ...], itemsize: int) -> tuple[int, int, int]:
        """The least traffic with everything between two matrix products in one kernel, and logits in none.

        In tensors of the input's size, read and written, forward: queries, keys and values 1 + 3, attention 3 + 1, its
        projection 1 + 1, add and norm 2 + 1, the feed-forward block 1 + 4, 4 + 4, 4 + 1, add and norm 2 + 1: 34.
        Backward, a product reads its input once and its cotangent twice: 8, attention 5 + 3, 4, norm 2 + 2 (branch and
        residual differ by the dropout), 10, 8 + 4, 10, 4: 60. Norms that come first keep the stream too: 3 more each
        way. Attention to a memory adds 14 and 26. Each matrix is read once forward, and backward read and its gradient
        written; vectors are left out.
        """
        tensor, width = math.prod(shape) * itemsize, shape[-1]
        forward = 34 + 14 * self.decoder + 3 * self.norm_first
        backward = 60 + 26 * self.decoder + 3 * self.norm_first
        matrices = (16 if self.decoder else 12) * width**2 * itemsize
        return forward * tensor + matrices, backward * tensor + 2 * matrices, 0

    def arithmetic(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Of the matrix products. A weight costs 2 a token forward, 4 backward; a pair of query and key 4 x width
        forward (logits, output), 10 x width backward (logits again, dP, dV, dQ, dK)."""
        batch, length, width = shape
        weights = (16 if self.decoder else 12) * width**2 * batch * length
        pairs = batch * (length * (length + 1) // 2 + length**2 if self.decoder else length**2) * width
        return 2 * weights + 4 * pairs, 4 * weights + 10 * pairs

    def memory_needed(self, shape: tuple[int, ...], itemsize: int) -> int:
        """An upper estimate of what checking and measuring take: float64 twins with all logits, and parameters."""
        batch, length, width = shape
        logits = batch * max(width // HEAD_DIM, 1) * length**2 * (2 if self.decoder else 1)
        return math.prod(shape) * 400 + logits * 60 + 16 * width**2 * 60
