"""What a model of model_zoo.py computes, in float32 and in float64, and how much two of them may differ."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.helpers.model_zoo import Batch, Model

Figures = dict[str, Tensor]


class Float64(TorchFunctionMode):
    """Models compute norms, softmax and rotations in float32 whatever they are given: here float64 takes its place."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})


def doubled(batch: Batch) -> Batch:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def figures(entry: Model, model: nn.Module, batch: Batch) -> tuple[Figures, Figures]:
    """The outputs, the loss among them, and the gradient of every parameter that has one."""
    model.zero_grad()
    outputs = entry.run(model, batch)
    outputs[0].backward()
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {f"output {i}": output.detach() for i, output in enumerate(outputs)}, gradients


def exact(entry: Model, model: nn.Module, batch: Batch) -> tuple[Figures, Figures]:
    with Float64():
        return figures(entry, copy.deepcopy(model).double(), doubled(batch))


def floor(name: str, reference: Figures, ulps: int = 8) -> float:
    """A few float32 ulps of the largest value: by luck, a small tensor has no error at all.

    Gradients of queries and keys are sums that cancel. Their errors are to their terms, of the size of the gradients
    beside them in the attention. So the largest value is that of the module two levels up.
    """
    block = ".".join(name.split(".")[:-2])
    near = [value for other, value in reference.items() if other == name or (block and other.startswith(block + "."))]
    return ulps * 2**-23 * max(value.abs().max().item() for value in near)


def differences(ours: Figures, theirs: Figures, reference: Figures, ulps: int = 8) -> list[str]:
    """What differs by more than it may."""
    assert ours.keys() == theirs.keys() == reference.keys()
    found = []
    for name, value in reference.items():
        error, allowed = ((figure[name] - value).abs().max().item() for figure in (ours, theirs))
        if not error <= 2 * allowed + floor(name, reference, ulps):
            found.append(f"{name}: error {error:.2g}, the untouched model's is {allowed:.2g}")
    return found


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def same_figures(ours: Figures, theirs: Figures) -> bool:
    return ours.keys() == theirs.keys() and same(tuple(ours.values()), tuple(theirs.values()))


def kept(model: nn.Module) -> Figures:
    return {name: value.clone() for name, value in model.state_dict().items()}


def scattered(entry: Model, model: nn.Module, batch: Batch, groups: int = 16, size: int = 6) -> tuple[Tensor, Tensor]:
    """For each group of seeds, the mean square of the outputs' means, and the mean of their variances."""
    torch.manual_seed(5)
    outputs = [
        torch.cat([each.detach().flatten() for each in entry.outputs(model, batch)]) for _ in range(groups * size)
    ]
    grouped = torch.stack(outputs).unflatten(0, (groups, size))
    return grouped.mean(1).square().mean(-1), grouped.var(1).mean(-1)


def losses(entry: Model, model: nn.Module, batches: list[Batch]) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    made = []
    for batch in batches:
        loss = entry.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # a step that is too long multiplies every rounding
        optimizer.step()
        made.append(loss.detach())
    return torch.stack(made)


def state(model: nn.Module) -> dict[str, Any]:
    """What each module is and has: its class, forward, settings, and the identity of its tensors and modules."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        forward = getattr(module.forward, "__func__", module.forward)
        found[name] = (id(module), type(module), forward, {key: plain(value) for key, value in vars(module).items()})
    config = getattr(model, "config", {})
    found["config"] = copy.deepcopy(config.to_dict() if hasattr(config, "to_dict") else dict(config))
    return found


def plain(value: Any) -> Any:
    """Something that equals a later one if that is the same object, or has the same content where it is a container."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, torch.dtype)) else id(value)


def checkpoint(model: nn.Module) -> None:
    """By the method's name of transformers 5, or of before."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
