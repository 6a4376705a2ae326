"""``TransformerEncoderLayer`` and ``TransformerDecoderLayer`` for torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._continued import MEMORY, SRC, TGT, continued
from ._fusible import overridden
from ._layer import FusedLayer, Stream, add_norm, add_pending
from ._masks import Masks, Sizes, prepare
from .attention import MultiheadAttention
from .cache import KVCache


class TransformerEncoderLayer(FusedLayer, nn.TransformerEncoderLayer):
    r""":class:`torch.nn.TransformerEncoderLayer` in fused steps: same constructor, forward, state_dict and results.

    .. math:: x_1 = \mathrm{norm}_1(x + \mathrm{dropout}(\mathrm{attention}(x))), \qquad
              x_2 = \mathrm{norm}_2(x_1 + \mathrm{dropout}(W_2\, \mathrm{dropout}(\mathrm{act}(W_1 x_1 + b_1)) + b_2))

    (post-norm; with `norm_first` the norms stand before the blocks). The biases of the output projection and of W_2,
    the dropout after them, the residual sum and the norm that follows are one :func:`fusednorm.add_layer_norm`; b_1,
    activation and dropout one :func:`fusednorm.bias_act_dropout`. Dropout masks are never stored.

    Args:
        activation: a name that :func:`fusednorm.bias_act_dropout` knows, or a function.
        recompute: what the backward rebuilds instead of keeping: "norms" (the sum before a norm, from the norm's
            output), "activation" (the second linear layer's input), "attention" (projections and attention, from the
            block's input). :func:`fusednorm.activation_bytes` says what each saves.

    A submodule with hooks or a parametrisation, of another class (LoRA, quantised), or an overridden ``_sa_block`` or
    ``_ff_block`` makes the layer call each submodule by itself; :func:`fusednorm.explain` says so. Nested tensors (of
    layout torch.strided) are padded, and the result is nested again. Under autocast normalized tensors have autocast's
    dtype.

    Raises:
        TypeError, ValueError: an argument, input or mask does not fit; the message names it.

    Example:
        >>> layer = fusednorm.TransformerEncoderLayer(8, 2, 32, batch_first=True, norm_first=True)
        >>> layer(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    self_attn: MultiheadAttention
    _attentions, _norms, _dropouts = ("self_attn",), ("norm1", "norm2"), ("dropout1", "dropout2")

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attention and the feed-forward block, each with its residual step.

        Args:
            src: (N, S, E) with `batch_first`, else (S, N, E); or (S, E). Nested with `batch_first`.
            src_mask: (S, S) or (N * nhead, S, S); True hides, a float is added to the logits.
            src_key_padding_mask: (N, S), or (S,) without a batch; True hides, a float is added.
            is_causal: a hint that `src_mask`, which must be given, is causal.
            cache: the positions before src; self-attention is causal then, without a `src_mask`.

        Returns:
            src's shape.
        """
        if cache is not None:
            return continued([self], src, add_pending, cache, src_key_padding_mask, SRC, (src_mask,))
        if getattr(src, "is_nested", False):
            return self._padded(src, src_mask, src_key_padding_mask)
        reason = self._obstacle()
        self._record(reason)
        if reason:
            return self._unfused(src, src_mask, src_key_padding_mask, is_causal)
        sizes = self.self_attn._sizes(src, src, src, ("src",) * 3)
        masks = Masks()
        if src_mask is not None or src_key_padding_mask is not None or is_causal is not False:
            masks = prepare(src_mask, src_key_padding_mask, is_causal, src, sizes, SRC)
        batch = 0 if self.self_attn.batch_first else 1
        x = src if sizes.batched else src.unsqueeze(batch)
        out = add_pending(self._fused(Stream(x), masks))
        return out if sizes.batched else out.squeeze(batch)

    def _obstacle(self) -> str:
        return overridden(self, nn.TransformerEncoderLayer, ("_sa_block", "_ff_block")) or super()._obstacle()

    def _fused(self, stream: Stream, masks: Masks, cache: KVCache | None = None) -> Stream:
        efficient = "norms" in self.recompute
        if self.norm_first:
            x, residual = add_norm(self.norm1, stream, efficient)
            stream = self._attention_branch("self_attn", (x,), masks, residual, "dropout1", cache)
            x, residual = add_norm(self.norm2, stream, efficient)
            return self._feed_forward_branch(x, residual, "dropout2")
        x = stream.branch
        branch = self._attention_branch("self_attn", (x,), masks, x, "dropout1", cache)
        x, _ = add_norm(self.norm1, branch, efficient)
        x, _ = add_norm(self.norm2, self._feed_forward_branch(x, x, "dropout2"), efficient)
        return Stream(x)

    def _unfused(self, src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), mask, padding, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, mask, padding, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))

    def _padded(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """A nested tensor, which torch's encoder makes of a padding mask in eval mode."""
        if src.layout == torch.jagged:
            raise TypeError(
                "src: is a nested tensor of layout torch.jagged, which torch's layer does not take either; pass "
                "torch.nested.as_nested_tensor(src.unbind()), or src.to_padded_tensor(0.0) with src_key_padding_mask"
            )
        if mask is not None or padding is not None:
            raise ValueError("src: is a nested tensor, which stands for its padding mask; pass no mask with it")
        if not self.self_attn.batch_first:
            raise ValueError("src: a nested tensor's first dimension is the batch; construct with batch_first=True")
        lengths = src._nested_tensor_size()[:, 0].to(src.device)
        padded = src.to_padded_tensor(0.0)
        present = torch.arange(padded.shape[1], device=src.device) < lengths[:, None]
        out = self.forward(padded, None, ~present)
        return torch._nested_tensor_from_mask(out, present, mask_check=False)


class TransformerDecoderLayer(FusedLayer, nn.TransformerDecoderLayer):
    r""":class:`torch.nn.TransformerDecoderLayer` in fused steps: same constructor, forward, state_dict and results.

    Attention to itself, attention to the encoder's output (keys and values in one product), and the feed-forward
    block; steps, `recompute`, obstacles and errors as in :class:`TransformerEncoderLayer`.

    Example:
        >>> layer = fusednorm.TransformerDecoderLayer(8, 2, 32, batch_first=True, norm_first=True)
        >>> layer(torch.randn(2, 5, 8), torch.randn(2, 7, 8)).shape
        torch.Size([2, 5, 8])
    """

    self_attn: MultiheadAttention
    multihead_attn: MultiheadAttention
    _attentions = ("self_attn", "multihead_attn")
    _norms, _dropouts = ("norm1", "norm2", "norm3"), ("dropout1", "dropout2", "dropout3")

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attention to tgt, attention to memory and the feed-forward block, each with its residual step.

        Args:
            tgt: (N, T, E) with `batch_first`, else (T, N, E); or (T, E).
            memory: the encoder's output, (N, S, E), (S, N, E) or (S, E).
            tgt_mask: (T, T) or (N * nhead, T, T); True hides, a float is added to the logits.
            memory_mask: (T, S) or (N * nhead, T, S).
            tgt_key_padding_mask, memory_key_padding_mask: (N, T) and (N, S), or (T,) and (S,) without a batch.
            tgt_is_causal, memory_is_causal: a hint that the mask, which must be given, is causal.
            cache: the positions before tgt, and the memory's keys and values: `memory` and its padding count in the
                first call alone. Self-attention is causal then, without a `tgt_mask`.

        Returns:
            tgt's shape.
        """
        if cache is not None:
            given, of_memory = (tgt_mask, memory_mask), (memory, memory_key_padding_mask)
            return continued([self], tgt, add_pending, cache, tgt_key_padding_mask, TGT, given, of_memory)
        reason = self._obstacle()
        self._record(reason)
        if reason:
            return self._unfused(
                *(tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask),
                *(tgt_is_causal, memory_is_causal),
            )
        sizes, across = self._sizes(tgt, memory)
        own = prepare(tgt_mask, tgt_key_padding_mask, tgt_is_causal, tgt, sizes, TGT)
        cross = prepare(memory_mask, memory_key_padding_mask, memory_is_causal, tgt, across, MEMORY)
        batch = 0 if self.self_attn.batch_first else 1
        if not sizes.batched:
            tgt, memory = tgt.unsqueeze(batch), memory.unsqueeze(batch)
        out = add_pending(self._fused(Stream(tgt), memory, own, cross))
        return out if sizes.batched else out.squeeze(batch)

    def _sizes(self, tgt: Tensor, memory: Tensor) -> tuple[Sizes, Sizes]:
        own = self.self_attn._sizes(tgt, tgt, tgt, ("tgt",) * 3)
        return own, self.multihead_attn._sizes(tgt, memory, memory, ("tgt", "memory", "memory"))

    def _obstacle(self) -> str:
        blocks = ("_sa_block", "_mha_block", "_ff_block")
        return overridden(self, nn.TransformerDecoderLayer, blocks) or super()._obstacle()

    def _fused(self, stream: Stream, memory: Tensor, own: Masks, cross: Masks, cache: KVCache | None = None) -> Stream:
        efficient = "norms" in self.recompute
        if self.norm_first:
            x, residual = add_norm(self.norm1, stream, efficient)
            stream = self._attention_branch("self_attn", (x,), own, residual, "dropout1", cache)
            x, residual = add_norm(self.norm2, stream, efficient)
            stream = self._attention_branch("multihead_attn", (x, memory), cross, residual, "dropout2", cache)
            x, residual = add_norm(self.norm3, stream, efficient)
            return self._feed_forward_branch(x, residual, "dropout3")
        x = stream.branch
        branch = self._attention_branch("self_attn", (x,), own, x, "dropout1", cache)
        x, _ = add_norm(self.norm1, branch, efficient)
        branch = self._attention_branch("multihead_attn", (x, memory), cross, x, "dropout2", cache)
        x, _ = add_norm(self.norm2, branch, efficient)
        x, _ = add_norm(self.norm3, self._feed_forward_branch(x, x, "dropout3"), efficient)
        return Stream(x)

    def _unfused(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None,
        memory_mask: Tensor | None,
        tgt_padding: Tensor | None,
        memory_padding: Tensor | None,
        tgt_is_causal: bool,
        memory_is_causal: bool,
    ) -> Tensor:
        if self.norm_first:
            x = tgt + self._sa_block(self.norm1(tgt), tgt_mask, tgt_padding, tgt_is_causal)
            x = x + self._mha_block(self.norm2(x), memory, memory_mask, memory_padding, memory_is_causal)
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(tgt + self._sa_block(tgt, tgt_mask, tgt_padding, tgt_is_causal))
        x = self.norm2(x + self._mha_block(x, memory, memory_mask, memory_padding, memory_is_causal))
        return self.norm3(x + self._ff_block(x))
