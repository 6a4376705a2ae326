"""Counter-based dropout: seeds, and the masks that every provider reproduces bit for bit.

An element's fate depends on the seed and on its position alone, so the backward regenerates the mask instead of
storing it, and any launch geometry on any device gives the same one.

Source: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32; 7 rounds is the
smallest count that passes BigCrush).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._options import ActivationInputs, AttentionInputs, NormInputs, Options
from ._transforms import traced, transform_active
from .providers.cpu import library as cpu

ROUNDS = 7
ELEMENT_STREAM = 0  # one decision for each element
PATH_STREAM = 1  # one decision for each sample (drop path): row = index along dimension 0, column = 0

_I = TypeVar("_I", NormInputs, ActivationInputs, AttentionInputs)
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """The smallest 32-bit word that is kept: ``floor(p * 2**32)``."""
    return int(p * 2.0**32)


def keep_scale(p: float) -> float:
    """The factor of what is kept, ``float32(1 / (1 - p))``, as a Python float.

    Rounded to 24 bits, ties to even, by Python's arithmetic: a number read from a tensor would break a graph.
    """
    if not p:
        return 1.0
    mantissa, exponent = math.frexp(1.0 / (1.0 - p))
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)


def default_seed(device: torch.device) -> Tensor:
    """A fresh seed from torch's generator of `device`, left on the device.

    ``torch.manual_seed``, activation checkpointing and CUDA-graph replay therefore act on it as on torch's dropout.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def with_seed(inputs: _I, options: Options) -> _I:
    """The inputs with a seed, drawn where the call has a mask and none was given.

    It is drawn late, because torch's own dropout draws its own mask.
    """
    if inputs.seed is not None or not (options.dropout_p or options.dropped):
        return inputs
    seed = default_seed(inputs[0].device)
    if isinstance(inputs, AttentionInputs):
        return inputs._replace(seed=seed)
    return type(inputs)(*inputs[:-1], seed)  # half the time of _replace


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a one-element int64 tensor on `device`; integers are taken modulo 2**64."""
    if seed is None:
        return default_seed(device)
    if isinstance(seed, Tensor):
        return seed.detach().reshape(1).to(device)
    return torch.full((1,), (int(seed) + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def _multiply_32x32(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product; int64 wraps around, its bits are those of the unsigned product."""
    product = a * multiplier
    return (product >> 32) & _LOW, product & _LOW


def philox_words(rows: Tensor, n_columns: int, seed: Tensor, stream: int) -> Tensor:
    """Philox4x32-7 words as int64 in [0, 2**32), shape ``(len(rows), n_columns)``.

    key = (low, high) 32 bits of the seed, counter = (column // 4, row low, row high, stream); an element takes
    output word ``column % 4``, so one evaluation serves four neighbours.
    """
    quads = torch.arange((n_columns + 3) // 4, device=rows.device)
    c0 = quads.expand(rows.shape[0], -1)
    c1 = (rows & _LOW)[:, None].expand_as(c0)
    c2 = ((rows >> 32) & _LOW)[:, None].expand_as(c0)
    c3 = torch.full_like(c0, stream)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        high0, low0 = _multiply_32x32(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply_32x32(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(1)
    # A copy: a view is contiguous where 4 divides n_columns, and a compiled graph would be guarded on that.
    return words.narrow_copy(1, 0, n_columns)


def element_mask(shape: Sequence[int], p: float, seed: Tensor) -> Tensor:
    """True where an element is kept, on the seed's device; see `dropout_mask`."""
    if 0 in shape:  # as many rows, or columns, as there are would be counted for nothing
        return torch.ones(tuple(shape), dtype=torch.bool, device=seed.device)
    n_columns = shape[-1] if len(shape) else 1
    if _native_serves(seed):
        return cpu.dropout_mask(seed, math.prod(shape[:-1]), n_columns, p).view(tuple(shape))
    rows = torch.arange(math.prod(shape[:-1]), device=seed.device)
    return (philox_words(rows, n_columns, seed, ELEMENT_STREAM) >= threshold(p)).reshape(tuple(shape))


def rows_mask(rows: Tensor, n_columns: int, p: float, seed: Tensor) -> Tensor:
    """Some rows of a mask, by their numbers: shape ``(*rows.shape, n_columns)``."""
    words = philox_words(rows.flatten(), n_columns, seed, ELEMENT_STREAM)
    return (words >= threshold(p)).reshape(*rows.shape, n_columns)


def _native_serves(seed: Tensor) -> bool:
    """Whether the native library makes the mask: 20 times as fast, but to be seen by no transform, mode or tracer."""
    return (
        not torch.compiler.is_compiling()
        and not traced()
        and seed.device.type == "cpu"
        and type(seed) is Tensor
        and not transform_active()
        and not torch._C._len_torch_dispatch_stack()
        and cpu.unavailable_reason() is None
    )


def path_mask(n_samples: int, p: float, seed: Tensor) -> Tensor:
    """True where a sample's branch is kept, shape ``(n_samples,)``."""
    rows = torch.arange(n_samples, device=seed.device)
    return philox_words(rows, 1, seed, PATH_STREAM)[:, 0] >= threshold(p)


def path_factor(x: Tensor, normalized_ndim: int, p: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """0 or 1/(1-p) for each sample (index along dimension 0), broadcastable to x.

    Torch's own dropout draws it where there is no seed.
    """
    n_samples = x.shape[0] if x.ndim > normalized_ndim else 1
    if seed is None:
        factor = F.dropout(x.new_ones(n_samples, dtype=dtype), p)
    else:
        factor = path_mask(n_samples, p, seed).to(dtype) * keep_scale(p)
    return factor.reshape(-1, *[1] * (x.ndim - 1)) if x.ndim > normalized_ndim else factor.reshape([1] * x.ndim)


def dropout_mask(
    shape: Sequence[int], p: float, seed: int | Tensor, device: torch.device | str | int | None = None
) -> Tensor:
    r"""The very mask that the kernels use: True where an element is kept.

    .. math:: \mathrm{mask}[r, c] = \mathrm{word}_{c \bmod 4}(\mathrm{Philox}(c \div 4, r;\ \mathrm{seed}))
              \ge \lfloor p\, 2^{32} \rfloor

    Args:
        shape: the dropped tensor's shape; *c* is the index along its last dimension, *r* the flattened index along
            the others.
        p: the probability that an element is dropped, in [0, 1].
        seed: an int (taken modulo 2**64) or a one-element int64 tensor.
        device: where the mask is made; the seed's device, or torch's default one, if not given.

    Returns:
        A bool tensor of the given shape. Kept values are to be multiplied by ``float32(1 / (1 - p))``.

    Raises:
        ValueError: `p` or `shape` is out of range.
        TypeError: `seed` is neither an int nor a one-element int64 tensor.

    Source: Salmon et al., SC 2011 (Philox4x32, 7 rounds).

    Example:
        >>> mask = fusednorm.dropout_mask((2, 8), 0.5, seed=3)
        >>> torch.equal(mask, fusednorm.dropout_mask((2, 8), 0.5, seed=3))
        True
    """
    p = _checks.check_probability("p", p)
    _checks.check_seed(seed)
    if not traced():
        _checks.check_mask_shape(shape)
    if device is None:
        # torch.get_default_device() breaks a graph
        device = seed.device if isinstance(seed, Tensor) else torch.empty(0).device
    else:
        device = _checks.check_device(device)
    if p == 1.0:
        return torch.zeros(tuple(shape), dtype=torch.bool, device=device)
    return element_mask(shape, p, seed_tensor(seed, device))


def all_dropped(x: Tensor, *parts: Tensor | None) -> Tensor:
    """Zeros in place of x plus the parts: dropout at p = 1, whose mask and scale no kernel can represent.

    The gradients of x and of the parts are zeros as well. It selects instead of multiplying, because 0 * NaN is NaN.
    """
    for part in parts:
        x = x if part is None else x + part.to(x.dtype)
    return torch.where(torch.zeros((), dtype=torch.bool, device=x.device), x, 0.0)
