"""What autograd keeps from a forward for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(own: Iterable[Tensor], forward: Callable[[], Any]) -> int:
    """Bytes that one forward keeps for its backward: distinct storages, but those of `own`."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()  # held until the storages are counted: a freed address could be another tensor's
    total = sum(kept.values())
    del outputs
    return total
