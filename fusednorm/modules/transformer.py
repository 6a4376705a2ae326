"""``TransformerEncoder``, ``TransformerDecoder`` and ``Transformer`` for torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._transforms import readable
from ._arguments import check_count, check_layer
from ._continued import MEMORY, TGT, continued
from ._fusible import EVERYWHERE, AtomicStateDict, record, warn_of_torchs, why_not_fused
from ._layer import NORMS, FusedLayer, Stream, add_norm, add_pending
from ._masks import Names, prepare
from .cache import KVCache
from .layers import TransformerDecoderLayer, TransformerEncoderLayer
from .norm import LayerNorm

SRC = Names("mask", "src_key_padding_mask", "is_causal", "src")


class _Stack(AtomicStateDict):
    """What the two stacks share: whether the residual may travel, the hint, and the last norm."""

    layers: Any
    norm: Any

    def _obstacle(self, kind: type[FusedLayer]) -> str:
        """Why each layer has to be called by itself, or nothing."""
        if not self.layers:
            return "there are no layers"
        first = self.layers[0]
        for i, layer in enumerate(self.layers):
            reason = why_not_fused(f"layers.{i}", layer, (kind,))
            if reason:
                return reason
            reason = layer._obstacle()
            if reason:
                return reason if reason == EVERYWHERE else f"layers.{i}.{reason}"
            if layer._compiled_call_impl is not None:
                return f"layers.{i} is compiled by itself"
            attention, firsts = layer.self_attn, first.self_attn
            if attention.num_heads != firsts.num_heads or attention.batch_first != firsts.batch_first:
                return f"layers.{i} has other heads or another layout than the first"
        return ""

    def _record(self, reason: str) -> None:
        travels = self.layers and getattr(self.layers[0], "norm_first", False)
        how = f"{len(self.layers)} layers" + (", each residual step with the next layer's norm" if travels else "")
        if travels and self.norm is not None:
            last = why_not_fused("norm", self.norm, NORMS)
            how += f"; the last norm by itself: {last}" if last else ""
        record(self, how, reason)

    def _finish(self, stream: Stream) -> Tensor:
        if self.norm is None:
            return add_pending(stream)
        if stream.residual is None or why_not_fused("norm", self.norm, NORMS):
            return self.norm(add_pending(stream))
        return add_norm(self.norm, stream, "norms" in self.layers[-1].recompute)[0]


def _causal(mask: Tensor | None, hint: bool | None) -> tuple[bool, bool]:
    """(whether the mask is causal, whether it was looked at). A graph cannot depend on what a mask holds."""
    if hint is not None or not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != mask.shape[1]:
        return bool(hint), False
    if mask.requires_grad or not readable(mask):
        return False, False
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False, False
    future = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype == torch.bool:
        same = torch.equal(mask, future)
    else:
        same = torch.equal(mask, torch.zeros_like(mask).masked_fill(future, -torch.inf))
    return same, same


class TransformerEncoder(_Stack, nn.TransformerEncoder):
    r""":class:`torch.nn.TransformerEncoder`: same constructor, forward and state_dict.

    Between layers of this package with `norm_first`, the branch and the residual stream travel apart, so that each sum
    is fused with the norm that follows, be it the next layer's or the last. A causal `mask` is looked for as torch
    does, but not under ``torch.compile``.

    Nested tensors are never made of a padding mask: a padded position has the same output in training and in eval mode,
    where torch's has zeros in eval mode without gradients. `enable_nested_tensor` and `mask_check` are kept as they
    are given. Layers of torch.nn are called one by one as they are, of which the constructor warns.

    Raises:
        TypeError, ValueError: an argument, input or mask does not fit; the message names it.

    Example:
        >>> layer = fusednorm.TransformerEncoderLayer(8, 2, 32, batch_first=True, norm_first=True)
        >>> fusednorm.TransformerEncoder(layer, 2)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        check_layer("encoder_layer", encoder_layer)
        check_count("num_layers", num_layers)
        warn_of_torchs("encoder_layer", encoder_layer, nn.TransformerEncoderLayer, TransformerEncoderLayer)
        nn.TransformerEncoder.__init__(self, encoder_layer, num_layers, norm, False, mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The layers in turn, then the norm.

        Args:
            src: (N, S, E) with the layers' `batch_first`, else (S, N, E); or (S, E). Nested with `batch_first`.
            mask: (S, S) or (N * nhead, S, S); True hides, a float is added to the logits.
            src_key_padding_mask: (N, S), or (S,) without a batch; True hides, a float is added.
            is_causal: whether `mask` is causal; None: look.
            cache: the positions before src; self-attention is causal then, without a `mask`.

        Returns:
            src's shape.
        """
        if cache is not None:
            return continued(self.layers, src, self._finish, cache, src_key_padding_mask, SRC, (mask,))
        reason = (
            "src is a nested tensor" if getattr(src, "is_nested", False) else self._obstacle(TransformerEncoderLayer)
        )
        self._record(reason)
        causal, verified = _causal(mask, is_causal)
        if reason:
            out = src
            for layer in self.layers:
                out = layer(out, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
            return out if self.norm is None else self.norm(out)
        attention = self.layers[0].self_attn
        sizes = attention._sizes(src, src, src, ("src",) * 3)
        masks = prepare(mask, src_key_padding_mask, causal, src, sizes, SRC, verified=verified)
        batch = 0 if attention.batch_first else 1
        stream = Stream(src if sizes.batched else src.unsqueeze(batch))
        for layer in self.layers:
            stream = layer._fused(stream, masks)
        out = self._finish(stream)
        return out if sizes.batched else out.squeeze(batch)


class TransformerDecoder(_Stack, nn.TransformerDecoder):
    r""":class:`torch.nn.TransformerDecoder`: same constructor, forward, state_dict and results.

    The residual stream, the causal mask and layers of torch.nn are as in :class:`TransformerEncoder`.

    Raises:
        TypeError, ValueError: an argument, input or mask does not fit; the message names it.

    Example:
        >>> layer = fusednorm.TransformerDecoderLayer(8, 2, 32, batch_first=True, norm_first=True)
        >>> fusednorm.TransformerDecoder(layer, 2)(torch.randn(2, 5, 8), torch.randn(2, 7, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self, decoder_layer: nn.TransformerDecoderLayer, num_layers: int, norm: nn.Module | None = None
    ) -> None:
        check_layer("decoder_layer", decoder_layer)
        check_count("num_layers", num_layers)
        warn_of_torchs("decoder_layer", decoder_layer, nn.TransformerDecoderLayer, TransformerDecoderLayer)
        nn.TransformerDecoder.__init__(self, decoder_layer, num_layers, norm)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The layers in turn, then the norm.

        Args:
            tgt: (N, T, E) with the layers' `batch_first`, else (T, N, E); or (T, E).
            memory: the encoder's output, (N, S, E), (S, N, E) or (S, E).
            tgt_mask: (T, T) or (N * nhead, T, T); True hides, a float is added to the logits.
            memory_mask: (T, S) or (N * nhead, T, S).
            tgt_key_padding_mask, memory_key_padding_mask: (N, T) and (N, S), or (T,) and (S,) without a batch.
            tgt_is_causal, memory_is_causal: whether the mask is causal; None: look.
            cache: the positions before tgt, and the memory's keys and values: `memory` and its padding count in the
                first call alone. Self-attention is causal then, without a `tgt_mask`.

        Returns:
            tgt's shape.
        """
        if cache is not None:
            given, of_memory = (tgt_mask, memory_mask), (memory, memory_key_padding_mask)
            return continued(self.layers, tgt, self._finish, cache, tgt_key_padding_mask, TGT, given, of_memory)
        reason = self._obstacle(TransformerDecoderLayer)
        self._record(reason)
        causal, verified = _causal(tgt_mask, tgt_is_causal)
        if reason:
            out = tgt
            for layer in self.layers:
                out = layer(
                    out,
                    memory,
                    tgt_mask=tgt_mask,
                    memory_mask=memory_mask,
                    tgt_key_padding_mask=tgt_key_padding_mask,
                    memory_key_padding_mask=memory_key_padding_mask,
                    tgt_is_causal=causal,
                    memory_is_causal=memory_is_causal,
                )
            return out if self.norm is None else self.norm(out)
        first = self.layers[0]
        sizes, across = first._sizes(tgt, memory)
        own = prepare(tgt_mask, tgt_key_padding_mask, causal, tgt, sizes, TGT, verified=verified)
        cross = prepare(memory_mask, memory_key_padding_mask, memory_is_causal, tgt, across, MEMORY)
        batch = 0 if first.self_attn.batch_first else 1
        if not sizes.batched:
            tgt, memory = tgt.unsqueeze(batch), memory.unsqueeze(batch)
        stream = Stream(tgt)
        for layer in self.layers:
            stream = layer._fused(stream, memory, own, cross)
        out = self._finish(stream)
        return out if sizes.batched else out.squeeze(batch)


class Transformer(AtomicStateDict, nn.Transformer):
    r""":class:`torch.nn.Transformer` of this package's layers: same constructor, forward, state_dict and results.

    A custom encoder or decoder is used as it is given; one of torch.nn runs unfused, of which the constructor warns.

    Args:
        recompute: as in :class:`TransformerEncoderLayer`, for every layer made here.

    Raises:
        TypeError, ValueError: an argument, input or mask does not fit; the message names it.
        RuntimeError: batch or features of src and tgt differ, as torch has it.

    Example:
        >>> model = fusednorm.Transformer(8, 2, 1, 1, 32, batch_first=True)
        >>> model.load_state_dict(torch.nn.Transformer(8, 2, 1, 1, 32, batch_first=True).state_dict())
        <All keys matched successfully>
        >>> model(torch.randn(2, 5, 8), torch.randn(2, 7, 8)).shape
        torch.Size([2, 7, 8])
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: Iterable[str] = (),
    ) -> None:
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        recompute = tuple(recompute) if not isinstance(recompute, str) else recompute

        def norm() -> LayerNorm:
            return LayerNorm(d_model, layer_norm_eps, bias=bias, **options)

        if custom_encoder is not None:
            warn_of_torchs("custom_encoder", custom_encoder, nn.TransformerEncoder, TransformerEncoder)
        else:
            check_count("num_encoder_layers", num_encoder_layers)
        if custom_decoder is not None:
            warn_of_torchs("custom_decoder", custom_decoder, nn.TransformerDecoder, TransformerDecoder)
        else:
            check_count("num_decoder_layers", num_decoder_layers)
        # in torch's order, so that a seed gives the same parameters
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*sizes, **options, recompute=recompute)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm())
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*sizes, **options, recompute=recompute)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm())
        nn.Transformer.__init__(
            self,
            d_model,
            nhead,
            custom_encoder=custom_encoder,
            custom_decoder=custom_decoder,
            batch_first=batch_first,
        )
