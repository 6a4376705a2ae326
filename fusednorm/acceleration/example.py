"""The user's own batch through the model before and after, with a float64 copy of the model to judge by."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import fused
from .report import Saving
from .steps import Steps

# In ulps of the largest value, beside twice the original's own error: what another order of sums may change.
_ULPS = 64.0


class Mismatch(Exception):
    """Which result differs, and by how much."""


def check_batch(batch: Any) -> Any:
    """The batch as a dict of keywords or a tuple of arguments."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, Mapping):  # a tokenizer's BatchEncoding too
        return dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch)
    raise TypeError(f"example: expected a dict of keyword arguments, a tuple or a tensor, got {type(batch).__name__}")


class Example:
    """Outputs and gradients of the original model for one batch."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.batch = batch
        self.before = _results(model, batch)
        if not self.before:
            raise ValueError("example: the model's output has no floating-point tensor, so there is nothing to compare")
        self.exact = _in_float64(model, batch)

    def compare(self, model: nn.Module, norms: dict[int, str]) -> list[Saving]:
        """The savings of the fused sums.

        Raises:
            Mismatch: a result is farther from float64 than the original's allows.
        """
        savings: list[Saving] = []

        def listener(norm: nn.Module, total: Tensor, steps: Steps) -> None:
            if id(norm) in norms:
                savings.append(_saving(norms[id(norm)], total, steps))

        with fused.listening(listener):
            after = _results(model, self.batch)
        if set(after) != set(self.before):
            missing = sorted(set(self.before) ^ set(after))
            raise Mismatch(f"{missing[0]} is there only before or only after")
        for name, was in self.before.items():
            _check(name, was, after[name], None if self.exact is None else self.exact.get(name))
        return savings


def _check(name: str, was: Tensor, now: Tensor, exact: Tensor | None) -> None:
    if now.shape != was.shape or now.dtype != was.dtype:
        raise Mismatch(f"{name}: {tuple(now.shape)} {now.dtype} after, {tuple(was.shape)} {was.dtype} before")
    if not was.numel():
        return
    judge = was.double() if exact is None else exact
    finite = torch.isfinite(judge) & torch.isfinite(was)
    if not torch.equal(torch.isfinite(now), torch.isfinite(was)):
        raise Mismatch(f"{name}: other elements are finite after than before")
    size = float(torch.where(finite, judge, 0.0).abs().max())
    own = float(torch.where(finite, was.double() - judge, 0.0).abs().max())
    error = float(torch.where(finite, now.double() - judge, 0.0).abs().max())
    bound = 2.0 * own + _ULPS * torch.finfo(was.dtype).eps * size
    if error > bound:
        against = "float64" if exact is not None else "before"
        raise Mismatch(f"{name}: off by {error:.3g} from {against}, {bound:.3g} allowed")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, with every module's own mode, gradients and torch's generators as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = [d for d in {p.device for p in model.parameters()} if d.type == "cuda"]
    try:
        model.eval()
        for parameter, _ in gradients:
            parameter.grad = None
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _results(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Every floating-point output, and every gradient of their weighted sum."""
    batch = copy.deepcopy(batch)
    with _evaluating(model), torch.enable_grad():
        output = model(**batch) if isinstance(batch, dict) else model(*batch)
        outputs = {f"output{name}": t for name, t in _tensors(output) if t.is_floating_point()}
        results = {name: tensor.detach().clone() for name, tensor in outputs.items()}
        with_graph = [tensor for tensor in outputs.values() if tensor.requires_grad]
        if with_graph:
            total = sum((_weights(t) * t).sum(dtype=torch.float64) for t in with_graph)
            total.backward()  # type: ignore[union-attr]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not parameter.grad.is_sparse:
                results[f"gradient of {name}"] = parameter.grad.detach().clone()
    return results


def _weights(tensor: Tensor) -> Tensor:
    """Different for every element, so that no error is summed away."""
    ramp = torch.arange(tensor.numel(), device=tensor.device, dtype=torch.float32).view(tensor.shape)
    return torch.cos(ramp).to(tensor.dtype)


def _in_float64(model: nn.Module, batch: Any) -> dict[str, Tensor] | None:
    """The original's results in float64, or None if the model cannot be copied or does not run in it."""

    def widened(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        if isinstance(value, dict):
            return {key: widened(item) for key, item in value.items()}
        return type(value)(map(widened, value)) if type(value) in (list, tuple) else value

    try:
        return _results(copy.deepcopy(model).double(), widened(batch))
    except Exception:  # whatever a stranger's forward raises on float64
        return None


def _tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, f"{name}.{key}")
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _tensors(getattr(output, field.name), f"{name}.{field.name}")
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from _tensors(value, f"{name}[{i}]")


def _saving(path: str, total: Tensor, steps: Steps) -> Saving:
    """Torch's operators, each with the tensors it reads and writes, less one that reads two and writes two."""
    before = 2 + 3  # tensors that the norm and the sum move
    launches = 2
    vectors = (steps.layer_scale, steps.gate, steps.scale, steps.shift)
    for used in (steps.dropout_p, *(vector is not None for vector in vectors), steps.drop_path_p):
        before += 2 * bool(used)
        launches += bool(used)
    return Saving(path, launches - 1, (before - 4) * total.numel() * total.element_size())
