"""What encoder layers keep for their backward, by the part that keeps it: torch.nn's measured, ours as they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import fusednorm

PARTS = ("attention", "feed-forward", "norms and sums", "output")  # the output is what the loss reads
OF_MODULE = {
    "self_attn": "attention",
    **dict.fromkeys(("linear1", "dropout", "linear2", "activation"), "feed-forward"),
    **dict.fromkeys(("norm1", "norm2", "dropout1", "dropout2"), "norms and sums"),
}


def parts_of_torch(layers: Iterable[nn.Module], own: Iterable[Tensor], forward: Callable[[], Any]) -> dict[str, int]:
    """Bytes by the module that keeps them first, each storage once."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in own}
    owner: dict[int, str] = {}
    kept: dict[int, tuple[str, int]] = {}
    running: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in left_out:
            part = owner.get(address, running[-1] if running else "output")
            kept.setdefault(address, (part, storage.nbytes()))
        return tensor

    def enter(part: str) -> Callable[..., None]:
        return lambda module, given: running.append(part)

    def leave(part: str, owns: bool) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, result: Any) -> None:
            running.pop()
            if owns:  # a norm's output is the norm's, whichever layer reads it first
                owner[result.untyped_storage().data_ptr()] = part

        return hook

    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(enter("feed-forward")))  # the activation is a function
        hooks.append(layer.register_forward_hook(leave("", False)))
        for name, part in OF_MODULE.items():
            module = getattr(layer, name)
            if isinstance(module, nn.Module):
                hooks.append(module.register_forward_pre_hook(enter(part)))
                hooks.append(module.register_forward_hook(leave(part, name.startswith("norm"))))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = forward()  # held until all is counted: a freed address could be another tensor's
    finally:
        for hook in hooks:
            hook.remove()
    del outputs
    return _sums(kept.values())


def parts_of_ours(layers: Iterable[nn.Module], batch: int, length: int) -> dict[str, int]:
    """What `activation_bytes` says of each layer, what it leaves out as given, and the output."""
    sizes: list[tuple[str, int]] = []
    given = 0
    for i, layer in enumerate(layers):
        for name, size in fusednorm.activation_bytes(layer, batch, length).items():
            part = {"attention": "attention", "feed_forward": "feed-forward"}.get(name, "norms and sums")
            sizes.append((part, size))
        linear: Any = layer.linear1
        given = batch * length * linear.in_features * linear.weight.element_size()
        if i and "norms" not in layer.recompute:  # an efficient norm keeps its output alone
            sizes.append(("norms and sums", given))
    return _sums([*sizes, ("output", given)])


def _sums(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part, size in sizes:
        total[part] += size
    return {part: total[part] for part in PARTS if total[part]}
