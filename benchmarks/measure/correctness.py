"""Results against float64 at the very shape that is measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OPS, Call, Case, Leaves, runner

DRAWS = 8
PEER_TOLERANCE = 16  # a baseline further than this many budgets from float64 computes something else


@dataclass(frozen=True)
class Problem:
    """Inputs of a case, and what float64 and eager make of them."""

    leaves: Leaves
    cotangents: tuple[Tensor, ...]
    mask_seed: int
    exact: Mapping[str, Tensor]
    eager_error: Mapping[str, float]

    def leaves_for(self, direction: str) -> dict[str, Tensor]:
        """Inputs to be timed, at the same addresses each time."""
        return {name: leaf.detach().requires_grad_(direction != "forward") for name, leaf in self.leaves.items()}

    def runner(self, direction: str, build: Callable[[Leaves], Call]) -> Callable[[], Any]:
        """What is timed of a call on such inputs."""
        leaves = self.leaves_for(direction)
        return runner(build(leaves), leaves.values(), self.cotangents, direction)


@functools.lru_cache(maxsize=1)
def _problem(op_name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, draw: int) -> Problem:
    op, generator = OPS[op_name], torch.Generator(device).manual_seed(1000 + draw)
    leaves = {}
    for name, size in op.inputs(shape).items():
        values = torch.randn(size, generator=generator, device=device)
        leaves[name] = op.values(name, values).to(dtype)
    cotangents = tuple(torch.randn(shape, generator=generator, device=device).to(dtype) for _ in op.outputs())
    mask = op.mask_of(shape, seed=draw, device=device)
    wide = {name: leaf.double() for name, leaf in leaves.items()}
    exact = results(lambda t: lambda: op.twin(t, mask), op.outputs(), wide, tuple(c.double() for c in cotangents))
    eager = results(lambda t: lambda: op.twin(t, mask), op.outputs(), leaves, cotangents)
    errors = {name: _largest(eager[name].double() - exact[name]) for name in exact}
    return Problem(leaves, cotangents, draw, exact, errors)


def problem(case: Case, device: torch.device, draw: int = 0) -> Problem:
    return _problem(case.op, case.shape, case.torch_dtype, device, draw)


def forget_problem() -> None:
    """Free the inputs and float64 results of the last case."""
    _problem.cache_clear()


def results(
    build: Callable[[Leaves], Call], names: Sequence[str], leaves: Leaves, cotangents: tuple[Tensor, ...] | None
) -> dict[str, Tensor]:
    """Outputs by name and, with cotangents, every input's gradient."""
    leaves = {name: leaf.detach().clone().requires_grad_(cotangents is not None) for name, leaf in leaves.items()}
    outputs = build(leaves)()
    found = {name: output.detach() for name, output in zip(names, outputs, strict=True)}
    if cotangents is not None:
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        found |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return found


def _largest(difference: Tensor) -> float:
    value = difference.abs().max().item() if difference.numel() else 0.0
    return value if math.isfinite(value) else math.inf


@dataclass(frozen=True)
class Verdict:
    """`worst` is the largest error in budgets: at most 1 is right."""

    worst: float
    detail: str

    @property
    def ok(self) -> bool:
        return self.worst <= 1.0


def check(case: Case, device: torch.device, build: Callable[[Leaves, int], Call] | None = None) -> Verdict:
    """The error budget at the very shape measured: max|ours - fp64| <= 2 max|eager - fp64| + one rounding.

    Two largest errors of one draw say little on a small tensor (eager may be lucky), so a case a little over the
    budget is judged by the largest errors over several draws.
    """
    op, cotangents = case.operation, None
    build = build or op.fused
    errors: dict[str, float] = {}
    allowed: dict[str, float] = {}
    for draw in range(DRAWS):
        inputs = problem(case, device, draw)
        if case.direction != "forward":
            cotangents = inputs.cotangents
        ours = results(lambda t, seed=inputs.mask_seed: build(t, seed), op.outputs(), inputs.leaves, cotangents)
        for name, result in ours.items():
            exact = inputs.exact[name]
            if result.shape != exact.shape or result.dtype != case.torch_dtype:
                return Verdict(math.inf, f"{name} is {result.dtype} {tuple(result.shape)}")
            errors[name] = max(errors.get(name, 0.0), _largest(result.double() - exact))
            rounding = torch.finfo(case.torch_dtype).eps / 2 * exact.abs().max().item()
            budget = 2 * inputs.eager_error[name] + max(rounding, torch.finfo(case.torch_dtype).tiny)
            allowed[name] = max(allowed.get(name, 0.0), budget)
        name = max(errors, key=lambda name: errors[name] / allowed[name])
        worst = errors[name] / allowed[name]
        detail = f"max|{name} - fp64| is {errors[name]:.3g}, {worst:.3g} x the budget {allowed[name]:.3g}"
        if not 1 < worst <= 4:
            break
    return Verdict(worst, detail)
