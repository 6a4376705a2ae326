"""Drawn calls of the norm functions: layouts, dtypes and arguments nobody thought of, for any provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, note
from hypothesis import strategies as st
from oracle import MODULATION, Call, check
from shapes import FUSED, PLAIN, Shape, random_leaves
from torch import Tensor

import fusednorm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NARROW = st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 128, 130, 255, 256, 257, 1023, 1024, 1032])
WIDE = st.sampled_from([2049, 4096, 5120, 8200, 16392, 33000])  # several tiles, slabs, past the registers
LEAD = st.integers(0, 5) | st.just(1)
CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True, "database": None}


COTANGENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda c: c,
    "one for a row": lambda c: c[..., :1].expand_as(c),
    "one for a column": lambda c: c[:1].expand_as(c) if c.ndim > 1 else c,
    "every second column": lambda c: c.repeat_interleave(2, -1)[..., ::2],
    "past an aligned address": lambda c: shifted(c, 1),
}


# How a leaf of (samples, columns) is passed.
MODULATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "vectors": lambda leaf: leaf,
    "rows": lambda leaf: leaf[:, None],
    "chunks": lambda leaf: torch.stack((leaf, torch.full_like(leaf, torch.nan)), 1).flatten(1)[:, : leaf.shape[-1]],
    "every second column": lambda leaf: leaf.repeat_interleave(2, -1)[..., ::2],
}


def shifted(tensor: Tensor, by: int) -> Tensor:
    """A contiguous copy `by` elements past an aligned address."""
    return tensor.new_zeros(by + tensor.numel())[by:].view(tensor.shape).copy_(tensor)


@dataclass(frozen=True)
class Memory:
    """How a tensor of a given shape lies in memory: made from a larger leaf, read through a view of it."""

    permutation: tuple[int, ...]  # of the leading dimensions
    lead_step: int
    column_step: int
    margin: int  # columns on either side that belong to something else
    expand: int  # a leading dimension of stride 0, or -1
    overlap: int  # elements from one row to the next, which then share all others; 0 for rows apart
    negated: bool  # the memory holds the negated values, as that of `.conj().imag` does

    def leaf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.overlap:
            return (*shape[:-2], (shape[-2] - 1) * self.overlap + shape[-1])
        lead = [1 if i == self.expand else size for i, size in enumerate(shape[:-1])]
        stored = [lead[i] for i in self.permutation]
        if stored:
            stored[0] *= self.lead_step
        return (*stored, shape[-1] * self.column_step + 2 * self.margin)

    def columns(self, leaf: Tensor) -> Tensor:
        """The column of the view that each column of a leaf belongs to."""
        return (torch.arange(leaf.shape[-1]) - self.margin) // self.column_step

    def view(self, leaf: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self.negated:
            leaf = torch._neg_view(leaf)
        if self.overlap:
            return leaf.unfold(-1, shape[-1], self.overlap)
        stop = leaf.shape[-1] - self.margin
        seen = leaf[..., self.margin : stop : self.column_step]
        if len(shape) > 1:
            seen = seen[:: self.lead_step]
        inverse = [self.permutation.index(i) for i in range(len(shape) - 1)]
        return seen.permute(*inverse, len(shape) - 1).expand(shape)


@dataclass(frozen=True)
class Drawn:
    """One call."""

    function: str
    shape: tuple[int, ...]
    normalized_ndim: int
    memory: dict[str, Memory]
    shifts: dict[str, int]  # of the parameters, in elements
    dtypes: dict[str, torch.dtype]
    options: dict[str, Any]
    seed_in_a_tensor: bool
    used: tuple[bool, bool]
    cotangent: str
    generator_seed: int
    modulation: str = "vectors"


@st.composite
def memories(draw: st.DrawFn, shape: tuple[int, ...]) -> Memory:
    lead = len(shape) - 1
    may_overlap = lead and shape[-2] and shape[-1] >= 8
    return Memory(
        permutation=tuple(draw(st.permutations(range(lead)))),
        lead_step=draw(st.sampled_from([1, 1, 2])),
        column_step=draw(st.sampled_from([1, 1, 1, 2, 3])),
        margin=draw(st.sampled_from([0, 0, 0, 1, 8])),
        expand=draw(st.integers(-1, lead - 1)) if draw(st.booleans()) else -1,
        overlap=draw(st.sampled_from([0, 0, 0, 0, 1, 3])) if may_overlap else 0,
        negated=draw(st.integers(0, 7)) == 7,
    )


@st.composite
def calls(
    draw: st.DrawFn,
    columns: st.SearchStrategy[int],
    lead: st.SearchStrategy[int] = LEAD,
    most: int = 6000,  # elements: the patience of an interpreter
    dropout_over_several: bool = False,  # dimensions normalized together
) -> Drawn:
    function = draw(st.sampled_from(PLAIN + FUSED))
    shape = (*draw(st.lists(lead, max_size=3)), draw(columns))
    while len(shape) > 1 and torch.Size(shape).numel() > most:
        shape = shape[1:]
    rms, fused = "rms" in function, function in FUSED
    optional = ["weight"] + ([] if rms else ["bias"]) + (["residual", "x_bias", "layer_scale"] if fused else [])
    names = ["x", *(name for name in optional if draw(st.booleans()))]
    if fused and len(shape) > 1 and draw(st.integers(0, 2)) == 0:
        names += [name for name in MODULATION if draw(st.booleans())]
    one = draw(st.sampled_from(DTYPES))
    mixed = draw(st.booleans())
    dtypes = {name: draw(st.sampled_from(DTYPES)) if mixed else one for name in names}
    memory = {name: draw(memories(shape)) for name in names if name in ("x", "residual")}
    options: dict[str, Any] = {"eps": draw(st.sampled_from([1e-5, 1e-6, 1e-3]))}
    if fused:
        options |= {
            "dropout_p": draw(st.sampled_from([0.0, 0.1, 0.5, 0.9])),
            "drop_path_p": draw(st.sampled_from([0.0, 0.0, 0.3])),
            "seed": draw(st.integers(-(2**63), 2**64 - 1)),
            "residual_dtype": draw(st.sampled_from([None, None, *DTYPES])),
            "zero_centered_weight": draw(st.booleans()),
            "memory_efficient": draw(st.booleans()),
        }
    several = len(shape) > 1 + any(name in MODULATION for name in names) and (
        dropout_over_several or not options.get("dropout_p")
    )
    return Drawn(
        function,
        shape,
        normalized_ndim=2 if several and draw(st.booleans()) else 1,
        memory=memory,
        shifts={name: draw(st.sampled_from([0, 0, 1, 8])) for name in names if name not in memory},
        dtypes=dtypes,
        options=options,
        seed_in_a_tensor=draw(st.booleans()),
        used=draw(st.sampled_from([(True, True), (True, False), (False, True)])) if fused else (True, True),
        cotangent=draw(st.sampled_from(["contiguous", *COTANGENTS])),
        generator_seed=draw(st.integers(0, 2**31)),
        modulation=draw(st.sampled_from([*MODULATIONS])),
    )


def hold_to_budget(drawn: Drawn, provider: str, device: str = "cpu") -> None:
    """One drawn call on a provider, forward and every gradient against the oracle.

    Few columns are drawn apart from one another: a nearly constant row magnifies every rounding, and the largest of
    such errors is that of one row, which says nothing of who computes it better.
    """
    note(str(drawn))
    generator = torch.Generator().manual_seed(drawn.generator_seed)
    names, shape = tuple(drawn.dtypes), Shape("drawn", drawn.shape, normalized_ndim=drawn.normalized_ndim)
    options = drawn.options
    if drawn.seed_in_a_tensor and "seed" in options:  # read where it lies
        signed = (options["seed"] + 2**63) % 2**64 - 2**63
        options = options | {"seed": torch.tensor([0, signed], device=device)[1:]}

    def draw() -> dict[str, Tensor]:
        leaves = random_leaves(shape, names, torch.float32, device, generator, drawn.dtypes)
        for name, memory in drawn.memory.items():
            leaf = torch.randn(memory.leaf_shape(drawn.shape), generator=generator, dtype=torch.float64) * 1.5 + 0.25
            if drawn.shape[-1] < 8:
                leaf += 4 * memory.columns(leaf).remainder(2) - 2
            leaves[name] = leaf.to(device, drawn.dtypes[name])
        return leaves | {name: shifted(leaves[name], by) for name, by in drawn.shifts.items()}

    views = {name: lambda leaf, m=memory: m.view(leaf, drawn.shape) for name, memory in drawn.memory.items()}
    passed = MODULATIONS[drawn.modulation if drawn.normalized_ndim == 1 else "vectors"]
    if drawn.modulation == "rows" and len(drawn.shape) < 3:  # there is no dimension for the one
        passed = MODULATIONS["vectors"]
    residual = views.get("residual")
    call = Call(drawn.function, drawn.normalized_ndim, views["x"], residual, options=options, modulation=passed)
    with fusednorm.use_provider(provider):
        check(call, draw(), generator, drawn.used, draw, COTANGENTS[drawn.cotangent])
