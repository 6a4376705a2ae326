"""``AdaptiveLayerNorm``: the norm of diffusion transformers, with a gate, a scale and a shift for each sample."""

from __future__ import annotations

from typing import Any

import torch

from .norm import AddLayerNorm


class AdaptiveLayerNorm(AddLayerNorm):
    r"""The residual step and norm of a diffusion transformer (AdaLN-Zero): an :class:`AddLayerNorm` without weights.

    .. math::
        z = \mathrm{residual} + \mathrm{gate} \odot x, \qquad
        \mathrm{normed} = \mathrm{layer\_norm}(z) \odot (1 + \mathrm{scale}) + \mathrm{shift}

    gate, scale and shift come from the conditioning in each step. `scale` is centred around zero, as in diffusers'
    ``norm(h) * (1 + scale[:, None]) + shift[:, None]``. Without a residual, ``z = gate * x``.

    Args:
        normalized_shape, eps: as in :class:`torch.nn.LayerNorm`; eps is 1e-6 as in DiT, SD3, Flux and Wan.
        elementwise_affine, bias: whether there is a weight, and a bias, before the modulation.

    The other arguments, and the errors, are those of :class:`AddLayerNorm`.

    Source: W. Peebles, S. Xie, "Scalable Diffusion Models with Transformers", arXiv:2212.09748.

    Example:
        >>> norm, conditioning = fusednorm.AdaptiveLayerNorm(8), torch.randn(2, 24)
        >>> gate, scale, shift = conditioning.chunk(3, dim=1)
        >>> normed, residual = norm(torch.randn(2, 5, 8), torch.randn(2, 5, 8), gate=gate, scale=scale, shift=shift)
        >>> normed.shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-6,
        elementwise_affine: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype, **keywords)
