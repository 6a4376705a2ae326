"""How the Triton attention kernels address their operands and results: in vectors of 16 bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import host

MAX_STRIDE = 2**23  # a stride at which a tile may span 2**31 elements


def strides(tensor: Tensor, packed: bool) -> tuple[int, int, int]:
    """Of (batch, head, position) in vectors of 16 bytes; 0 where there is one."""
    vec = 16 // tensor.element_size()
    own = [stride // vec if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.stride())]
    return (0, own[1], own[0]) if packed else (own[0], own[1], own[2])


def strides_of(tensors: Sequence[Tensor], packed: bool) -> tuple[int, ...]:
    return tuple([stride for t in tensors for stride in strides(t, packed)])


def _addressable(tensor: Tensor | None, packed: bool) -> bool:
    """Whether kernels can address it: rows of whole 16-byte vectors, and a tile that spans less than 2**31 elements.

    Its address is not looked at. Only the stride of positions is multiplied in 32 bits (`row_pointers`).
    """
    if tensor is None:
        return True
    vec = 16 // tensor.element_size()
    shape, (*outer, column) = tensor.shape, tensor.stride()
    if shape[-1] % vec or column != 1 or tensor.is_neg():  # memory of `.conj().imag` holds the negated values
        return False
    if any(stride % vec and size != 1 for size, stride in zip(shape, outer)):
        return False
    position = 0 if packed else -2
    return shape[position] == 1 or tensor.stride(position) < MAX_STRIDE


class Operands:
    """Tensors of these sizes and strides, copied where kernels cannot address them.

    A copy moves 3 S D elements a head, read an element at a time they would be moved S / BLOCK times as often; and
    pointers to single elements are as many registers as the products, so the kernels would spill.
    """

    def __init__(self, packed: bool, *tensors: Tensor | None) -> None:
        self.copied = tuple([not _addressable(t, packed) for t in tensors])

    def where(self, *tensors: Tensor | None) -> tuple[bool, ...]:
        """Which are copied, now that their addresses are known."""
        if host.aligned(*tensors):
            return self.copied
        return tuple([c or not host.aligned(t) for c, t in zip(self.copied, tensors, strict=True)])


def like(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    """What `host.allocator` takes for such a tensor."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def padded(tensor: Tensor) -> Tensor:
    """Uninitialised, of a shape with whole vectors of 16 bytes."""
    *rows, d = tensor.shape
    return tensor.new_empty((*rows, d + -d % (16 // tensor.element_size())))


def read(tensor: Tensor, copied: bool) -> Tensor:
    """The tensor, or its copy of whole vectors."""
    if not copied:
        return tensor
    copy, d = padded(tensor), tensor.shape[-1]
    copy[..., :d] = tensor
    copy[..., d:] = 0
    return copy


def written_to(result: Tensor | None, copied: bool) -> Tensor | None:
    """The result itself, or where kernels cannot address it what `deliver` copies into it."""
    return result if result is None or not copied else padded(result)


def deliver(written: Tensor | None, result: Tensor | None) -> None:
    if result is not None and written is not None and written is not result:
        result.copy_(written[..., : result.shape[-1]])


def bounded_stride(mask: Tensor | None) -> Tensor | None:
    """attn_mask as kernels read it: with tiles that span less than 2**31 elements, and not as its negative.

    A mask with longer tiles is a part of something vast.
    """
    if mask is None:
        return None
    mask = mask.resolve_neg()
    if all(size == 1 or stride < MAX_STRIDE for size, stride in zip(mask.shape[-2:], mask.stride()[-2:])):
        return mask
    return mask.contiguous()


def mask_vec(mask: Tensor | None, n_keys: int) -> int:
    """How many elements of attn_mask kernels take at once: 16 bytes, or one where its rows are no whole vectors."""
    if mask is None or mask.shape[-1] != n_keys or mask.stride(-1) != 1:
        return 1
    vec = 16 // mask.element_size()
    outer = zip(mask.shape[:-1], mask.stride())
    whole = n_keys % vec == 0 and all(size == 1 or stride % vec == 0 for size, stride in outer)
    return vec if whole and host.aligned(mask) else 1


def mask_strides(mask: Tensor | None, vec: int) -> tuple[int, ...]:
    """Of four dimensions, 0 where it is broadcast, in vectors; along the keys it is 1."""
    if mask is None:
        return (0, 0, 0, 0)
    *outer, last = [stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride())]
    own = (*[stride // vec for stride in outer], last)
    return (*[0] * (4 - len(own)), *own)


def key_mask_strides(key_mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if key_mask is None else tuple(key_mask.stride())


def lse_strides(lse: Tensor) -> tuple[int, int]:
    """Of (batch, head)."""
    return (lse.stride(0), lse.stride(1)) if lse.ndim == 3 else (0, lse.stride(0))
