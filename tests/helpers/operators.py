"""Every public operator as one small call: the package's, eager's, and the float64 formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from oracle import DRAWS, MODULATION, Call, assert_within_budget, evaluate
from oracle_activation import ActivationCall
from oracle_attention import AttentionCall
from shapes import FUSED, PLAIN, Shape, inputs, random_leaves
from torch import Tensor

Leaves = Mapping[str, Tensor]
WIDTH = 24
DROPPED = {"dropout_p": 0.5, "seed": 4}


@dataclass(frozen=True)
class Operator:
    """`rows` are the leaves that have a sample in each index of dimension 0, as the outputs have."""

    name: str
    ours: Callable[[Leaves], tuple[Tensor, ...]]
    exact: Callable[[Leaves], tuple[Tensor, ...]]
    make: Callable[..., dict[str, Tensor]]  # samples, dtype, device, generator -> leaves
    check: Callable[..., None]  # leaves, generator: outputs and gradients within the error budget
    rows: tuple[str, ...]
    twin: Callable[[Tensor], Tensor] | None = None  # torch's function of one tensor, for its dtype under autocast
    dropped: Callable[[Leaves], tuple[Tensor, ...]] | None = None  # `ours` with DROPPED

    def leaves(
        self, dtype: torch.dtype, device: str, generator: torch.Generator, samples: int = 3
    ) -> dict[str, Tensor]:
        return self.make(samples, dtype, device, generator)

    def widest(self, provider: str) -> torch.dtype:
        """The widest dtype that the provider's kernels take."""
        return torch.float32 if self.attention and provider in ("cuda", "triton") else torch.float64

    @property
    def attention(self) -> bool:
        return "attention" in self.name


def dtype_of(leaves: Leaves) -> torch.dtype:
    return next(iter(leaves.values())).dtype


def _rows(names: tuple[str, ...], samples: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> Any:
    return random_leaves(Shape("", (samples, 2, WIDTH)), names, dtype, device, generator)


def _norm(function: str, name: str = "", extra: tuple[str, ...] = (), affine: bool = True) -> Operator:
    call = Call(function)
    own = ("x", "residual") if function in FUSED else ("x",)
    twin = {"layer_norm": F.layer_norm, "rms_norm": F.rms_norm}.get(function)
    return Operator(
        name or function,
        call.ours,
        lambda leaves: call.exact(leaves, torch.float64),
        partial(_rows, (*(inputs(function) if affine else own), *extra)),
        partial(oracle.check, call),
        rows=(*own, *extra),
        twin=None if twin is None else lambda x: twin(x, x.shape[-1:]),
        dropped=replace(call, options=DROPPED).ours if function in FUSED else None,
    )


def _activation() -> Operator:
    call = ActivationCall("gelu")
    return Operator(
        "bias_act_dropout",
        call.ours,
        lambda leaves: call.exact(leaves, torch.float64),
        partial(_rows, ("x", "bias")),
        partial(oracle.check, call),
        rows=("x",),
        twin=F.gelu,
        dropped=replace(call, options=DROPPED).ours,
    )


# --- attention: causal, leaves of (samples, heads, positions, features), or packed with positions before heads ---


def _drawn(shape: tuple[int, ...], samples: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> Any:
    values = {name: torch.randn(samples, *shape, generator=generator, dtype=torch.float64) for name in "qkv"}
    return {name: value.to(device, dtype) for name, value in values.items()}


def _sdpa(leaves: Leaves) -> tuple[Tensor, ...]:
    import fusednorm

    return (fusednorm.scaled_dot_product_attention(*(leaves[name] for name in "qkv"), is_causal=True),)


def _packed(leaves: Leaves) -> tuple[Tensor, ...]:
    import fusednorm

    samples, length = leaves["q"].shape[:2]
    q, k, v = (leaves[name].flatten(0, 1) for name in "qkv")
    bounds = torch.arange(samples + 1, device=q.device, dtype=torch.int32) * length
    out = fusednorm.varlen_attention(q, k, v, bounds, bounds, length, length, is_causal=True)
    return (out.unflatten(0, (samples, length)),)


def _attention(name: str, shape: tuple[int, ...], ours: Callable[[Leaves], tuple[Tensor, ...]]) -> Operator:
    call, packed = AttentionCall({"is_causal": True}), ours is _packed

    def explicit(leaves: Leaves, computed_in: torch.dtype, twin: bool) -> tuple[Tensor, ...]:
        heads_first = {name: leaf.transpose(1, 2) if packed else leaf for name, leaf in leaves.items()}
        out = call.explicit(heads_first, computed_in, twin)[0]
        return (out.transpose(1, 2) if packed else out,)

    def check(leaves: Leaves, generator: torch.Generator) -> None:
        dtype = dtype_of(leaves)
        computed_in = torch.float64 if dtype == torch.float64 else torch.float32

        def draw() -> tuple[dict[str, Any], ...]:
            given = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for n, t in leaves.items()}
            cotangents = (torch.randn(leaves["q"].shape, generator=generator, dtype=torch.float64).to(leaves["q"]),)
            wide = {n: t.double() for n, t in given.items()}
            return (
                evaluate(ours, given, cotangents),
                evaluate(lambda t: explicit(t, computed_in, True), given, cotangents),
                evaluate(lambda t: explicit(t, torch.float64, False), wide, (cotangents[0].double(),)),
            )

        first = draw()
        try:
            assert_within_budget(*first, what=f"{name} ", computed_in=computed_in)
        except AssertionError:  # of one draw the largest error says little: that of several must keep the budget
            draws = [first, *(draw() for _ in range(DRAWS - 1))]
            stacked = [{n: torch.stack([r[n] for r in results]) for n in results[0]} for results in zip(*draws)]
            assert_within_budget(*stacked, what=f"{name} ", computed_in=computed_in)

    return Operator(
        *(name, ours, lambda leaves: explicit(leaves, torch.float64, False), partial(_drawn, shape), check),
        rows=("q", "k", "v"),
        twin=lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    )


OPERATORS = {
    operator.name: operator
    for operator in (
        *map(_norm, (*PLAIN, *FUSED)),
        _norm("add_layer_norm", "modulation", MODULATION, affine=False),
        _activation(),
        _attention("scaled_dot_product_attention", (2, 5, 8), _sdpa),
        _attention("varlen_attention", (5, 2, 8), _packed),
    )
}
