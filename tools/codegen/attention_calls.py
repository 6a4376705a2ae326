"""Every kind of attention call that dispatch tells apart, and choices among them that cover all pairs of values.

The axes are the code's own switches: what `triton_attention` compiles by, and which pointers a launch has. What follows
from lengths, strides and values takes part nowhere, since a variant is compiled without them: rows are whole vectors of
16 bytes, batches and positions are run-time numbers, and a head dim counts only by its padded size and by whether it is
padded (its value is one bound of a comparison).
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from fusednorm._options import from_flat
from fusednorm.providers.triton import attention as triton_attention
from fusednorm.providers.triton import attention_config as table
from fusednorm.providers.triton import host as triton_host
from fusednorm.providers.triton.attention_config import columns
from tools.codegen import compile
from tools.codegen.compile import Launch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDEST = 256
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
_LENGTH, _BATCH, _HEADS = 512, 2, 2
_FEW, _MANY = 16, 4096  # queries and keys of a call whose keys are shared out
_PROCESSORS = 132


class Call(NamedTuple):
    """A forward and its backward."""

    d: int
    dv: int
    dtype: str
    precision: str = "ieee"  # of float32 products
    mask: str = "none"
    key_mask: bool = False
    logits: str = "folded"  # folded: the scale is a part of the exponent; apart; softcap
    lower: bool = False  # whether the keys of a query are bounded below, and above
    upper: bool = False
    lower_right: bool = False
    dropout: bool = False
    packed: bool = False
    dlse: bool = False
    unaligned: bool = False  # whether attn_mask is read an element at a time, not in vectors of 16 bytes
    gradient: str = "none"  # of attn_mask: direct, of the logits' shape; heads or queries: summed over them
    few: bool = False  # few queries, to many keys that are shared out: the forward alone

    @property
    def valid(self) -> bool:
        """Whether the public functions let it through, and it is not compiled as another is."""
        wide = self.dtype == "float32"
        return (
            (wide or self.precision == "ieee")
            and not (self.packed and (self.mask != "none" or self.key_mask))
            and (self.mask in ("float32", self.dtype) or self.gradient == "none")
            and not (wide and self.logits == "folded")
            and not (self.mask in ("float32", self.dtype) and self.logits == "folded")
            and (self.mask != "none" or not self.unaligned)
            and (not self.lower_right or self.lower or self.upper)
            and not (self.few and (self.dropout or self.packed or self.dlse or self.gradient != "none"))
            and (not self.dlse or wide or self.gradient != "none" or self == self.plain._replace(dlse=True))
        )

    @property
    def plain(self) -> Call:
        return Call(self.d, self.dv, self.dtype)


def head_dims() -> tuple[int, ...]:
    """One for each padded size, whole and padded, of the largest that are padded to it."""
    found = {(columns(d), columns(d) == d): d for d in range(8, WIDEST + 1, 8)}
    return tuple(sorted(found.values()))


def axes(dims: Iterable[int], dtypes: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    sizes = tuple(dims)
    floats = tuple(dtypes)
    both = (False, True)
    return {
        "d": sizes,
        "dv": sizes,
        "dtype": floats,
        "precision": ("ieee", "tf32"),
        "mask": tuple(dict.fromkeys(("none", "bool", "float32", *floats))),
        "key_mask": both,
        "logits": ("folded", "apart", "softcap"),
        **dict.fromkeys(("lower", "upper", "lower_right", "dropout", "packed", "dlse", "unaligned"), both),
        "gradient": ("none", "direct", "heads", "queries"),
        "few": both,
    }


def every(dims: Iterable[int], dtypes: Iterable[str]) -> Iterator[Call]:
    return (c for c in map(Call._make, itertools.product(*axes(dims, dtypes).values())) if c.valid)


def _parts(call: Call, strength: int) -> set[tuple[tuple[int, Any], ...]]:
    return set(itertools.combinations(enumerate(call), strength))


def covering(dims: Iterable[int], dtypes: Iterable[str], strength: int) -> list[Call]:
    """Few calls among which each `strength` of an axis' values that can go together do so, and all at once."""
    calls = list(every(dims, dtypes))
    rng = random.Random(0)
    found = heaviest(calls)
    missing = set().union(*(_parts(call, strength) for call in calls)).difference(*(_parts(c, strength) for c in found))
    rng.shuffle(calls)
    pool = itertools.cycle(calls)
    while missing:
        best = max(itertools.islice(pool, 40), key=lambda c: len(missing & _parts(c, strength)))
        gained = _parts(best, strength) & missing
        if gained:
            found.append(best)
            missing -= gained
    return found


@functools.cache
def _tiles(need: table.Need) -> tuple[Any, ...]:
    """What the table gives a call's kernels on each device."""
    devices = [triton_host.compiled_for(divmod(arch, 10)) for arch in ARCHITECTURES]
    needs = [need._replace(**device._asdict()) for device in devices]
    tiles = (table.forward, table.delta, table.backward_queries, table.backward_keys, table.backward_mask)
    parts = (table.part_of_forward, table.part_of_keys, table.part_of_queries, table.part_of_mask, table.splits)
    return tuple(choose(need) for need in needs for choose in (*tiles, *parts))


def _need(call: Call) -> table.Need:
    """What the provider says a call needs, on one device."""
    return triton_attention._Problem(
        *(call.d, call.dv, DTYPES[call.dtype], call.precision, call.logits == "folded", call.logits == "softcap"),
        *(call.mask, 1, call.dropout, call.lower, call.upper, call.lower_right),
        triton_host.compiled_for(triton_attention.INTERPRETED),
    ).need


def heaviest(calls: Iterable[Call]) -> list[Call]:
    """Of all calls that the table gives the same tiles the one with most to hold at once.

    Calls that differ in dropout, in a mask's kind or alignment, in how its gradient is summed, or in whether keys are
    shared out are kept apart.
    """
    best: dict[tuple[Any, ...], tuple[int, Call]] = {}
    for call in calls:
        if call.d != call.dv:
            continue
        switches = (call.mask == "float32", call.key_mask, call.lower, call.upper, call.lower_right, call.dlse)
        weight = sum(switches) + 2 * (call.logits == "softcap") + (call.logits == "apart") + (call.gradient == "direct")
        summed = call.gradient in ("heads", "queries") and call.gradient
        mask = call.mask if call.mask in ("none", "bool") else "additive"
        kind = (call.d, call.dtype, call.precision, call.dropout, mask, call.unaligned, summed, call.few)
        key = (kind, _tiles(_need(call)))
        if weight > best.get(key, (-1, call))[0]:
            best[key] = (weight, call)
    return [call for _, call in best.values()]


def chosen(dims: Iterable[int], dtypes: Iterable[str], cover: str) -> list[Call]:
    """Of every head dim and dtype on its own the calls that `cover` names, and values of other sizes than keys."""
    sizes, floats = tuple(dims), tuple(dtypes)
    found: dict[Call, None] = {}
    for d, dtype in itertools.product(sizes, floats):
        if cover == "heaviest":
            found.update(dict.fromkeys(heaviest(every((d,), (dtype,)))))
        elif cover == "all":
            found.update(dict.fromkeys(every((d,), (dtype,))))
        else:
            found.update(dict.fromkeys(covering((d,), (dtype,), int(cover))))
    if cover in ("1", "2") and len(sizes) > 1:  # tiles go by the wider: with both as wide, all takes as much or more
        found.update(dict.fromkeys(covering(sizes, floats, 1)))
    return list(found)


def launches(call: Call, capability: tuple[int, int]) -> list[Launch]:
    """What a forward and a backward launch on a device of the capability, noted from real calls of the provider."""
    noted: list[Launch] = []

    def take(launch: Launch) -> None:
        if launch.kernel.startswith("attention"):
            noted.append(launch)

    arguments, operands = _arguments(call)
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = call.precision
    triton_host.forget_prepared()  # for another device
    try:
        with (
            compile.launches(take),
            mock.patch.object(triton_attention, "INTERPRETED", capability),
            mock.patch.object(triton_host, "processors", lambda index: _PROCESSORS),
        ):
            inputs, options = from_flat("attention_fwd", (*operands, *arguments))
            out, lse = triton_attention.attention_fwd(inputs, options)
            if call.few:
                return noted
            wanted = [True, True, True, call.gradient != "none"]
            dlse = lse if call.dlse else None
            triton_attention.attention_bwd(out, dlse, inputs, out, lse, options, wanted)
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    return noted


def _arguments(call: Call) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """As the provider takes them, but for the operands: memory that nobody touches."""
    lengths = (_FEW, _MANY) if call.few else (_LENGTH, _LENGTH)
    leads = [(_BATCH * n, _HEADS) if call.packed else (_BATCH, _HEADS, n) for n in lengths]
    sizes = ((leads[0], call.d), (leads[1], call.d), (leads[1], call.dv))
    q, k, v = (torch.empty(*lead, d, dtype=DTYPES[call.dtype]) for lead, d in sizes)
    shape = {"none": lengths, "heads": lengths, "queries": (1, lengths[1])}
    shape["direct"] = (_BATCH, _HEADS, *lengths)
    kinds = {"bool": torch.bool, **DTYPES}
    *rows, n_keys = shape[call.gradient]
    row = torch.empty((*rows, n_keys + call.unaligned), dtype=kinds[call.mask]) if call.mask != "none" else None
    mask = None if row is None else row[..., call.unaligned :]
    bounds = torch.empty(_BATCH + 1, dtype=torch.int32) if call.packed else None
    return (
        mask,
        torch.empty(_BATCH, n_keys, dtype=torch.bool) if call.key_mask else None,
        torch.empty(1, dtype=torch.int64) if call.dropout else None,
        *(bounds, bounds, *lengths),
        0.125 if call.logits != "apart" or call.mask in DTYPES or call.dtype == "float32" else -0.125,
        0.1 if call.dropout else 0.0,
        *(False, call.lower_right, 64 if call.lower else -1, 0 if call.upper else -1),
        16.0 if call.logits == "softcap" else 0.0,
    ), [q, k, v]
