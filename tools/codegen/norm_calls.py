"""Every call of the norms and activations that compiles something of its own, from the code's own switches.

    python3 -m tools.codegen.norm_calls                              # on all architectures: hours
    python3 -m tools.codegen.norm_calls --which pairs --arch 90
    python3 -m tools.codegen.norm_calls --which random --sample 500 --seed 7
    python3 -m tools.codegen.norm_calls --which heaviest --arch 90 --json sm_90.json
    python3 -m tools.codegen.norm_calls --which heaviest --arch 80 86 89 100 120 --near sm_90.json

A call is one value for each axis of `NORM` or `ACTIVATION`. The product of the axes has more than 10^9 calls, so they
are chosen four ways. Calls that compile alike are compiled once.

heaviest     at every choice the norms' tables can make, the calls that carry the most operands and gradients
activations  every value of every axis of the activations with every other, at one width after the other
pairs        calls in which any two values of any two axes occur together, the widths of the tables' choices included
random       a thousand calls, drawn from the whole product

`--near` compiles only what could break the gate: in the file, they came within 16 registers of their limit, or
need more shared memory than the smallest device has. Another architecture changes a kernel's registers by a few.

Exit status: 0; 1 when a variant breaks the gate (see `compile.faults`).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from fusednorm._activations import ACTIVATIONS
from fusednorm._options import from_flat
from fusednorm.autograd import activation as autograd_activation
from fusednorm.autograd import norm as autograd_norm
from fusednorm.providers.triton import activation as triton_activation
from fusednorm.providers.triton import activation_config as triton_activation_table
from fusednorm.providers.triton import host as triton_host
from fusednorm.providers.triton import launch as triton_launch
from fusednorm.providers.triton import norm as triton_norm
from fusednorm.providers.triton import norm_config as table
from fusednorm.providers.triton.config import PARTIALS, SAMPLE_PARTIALS, Config
from tools.codegen.compile import DEVICES, RESERVED, Launch, Variant, faults, figures, in_processes, launches

DTYPES = tuple(triton_launch.TYPES)
NO_YES = (False, True)
# contiguous, from an odd address on, and every second element, each also with two strides for the rows
LAYOUTS = ("aligned", "aligned_outer", "shifted", "shifted_outer", "strided", "strided_outer")
_LEAVES = ("x", "residual", "weight", "bias", "x_bias", "layer_scale")
_OF_SAMPLES = ("weight", "bias", "layer_scale")
Axes = Mapping[str, Sequence[Any]]
Call = dict[str, Any]

NORM: Axes = {
    "backward": NO_YES,
    "rms": NO_YES,
    "zero_centered": NO_YES,
    "residual": NO_YES,
    "weight": NO_YES,
    "bias": NO_YES,
    "x_bias": NO_YES,
    "layer_scale": NO_YES,
    **{f"own_{name}": NO_YES for name in _OF_SAMPLES},  # a vector for each sample
    "one_program": NO_YES,  # has all rows of a sample in the backward, and writes its gradients whole
    "dropout": NO_YES,
    "drop_path": NO_YES,
    "memory_efficient": NO_YES,
    "stream_used": NO_YES,  # residual_out has a cotangent
    **{f"d_{name}": NO_YES for name in _LEAVES},
    "dtype": DTYPES,
    "residual_dtype": (None, *DTYPES),
    "stream_dtype": (None, *DTYPES),
    "normed_dtype": (None, torch.bfloat16, torch.float16),  # autocast's
    "parameter_dtype": (None, *DTYPES),
    "layout": LAYOUTS,
    "width": range(40),  # of the widths of the table's choices, modulo their number
}
ACTIVATION: Axes = {
    "backward": NO_YES,
    "activation": tuple(ACTIVATIONS),
    "dropout": NO_YES,
    "bias": NO_YES,
    "d_x": NO_YES,
    "d_bias": NO_YES,
    "dtype": DTYPES,
    "parameter_dtype": (None, *DTYPES),
    "layout": LAYOUTS,
    "width": range(16),
}
_WIDEST = 40960  # past the widest row that any configuration holds in registers


def whole(words: Collection[str], **given: Any) -> Call:
    """A call with weight, bias and every gradient, these switches on or this activation; its other values as given."""
    activation = next((name for name in ACTIVATIONS if name in words), None)
    axes = ACTIVATION if activation else NORM
    on = {*words, "weight", "stream_used", *(name for name in axes if name.startswith("d_"))}
    if "rms" not in words or "own_bias" in words:
        on.add("bias")
    return {name: name in on for name in axes} | ({"activation": activation} if activation else {}) | given


# --- what is called ---


def rows(n: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    step, first = 1 + ("strided" in layout), int("shifted" in layout)
    memory = torch.empty(8 * step * n + first, dtype=dtype)[first:].view(4, 2, step * n)[..., ::step]
    return memory.transpose(0, 1) if "outer" in layout else memory


def _cotangent(t: torch.Tensor, n: int, layout: str) -> torch.Tensor:
    return rows(n, t.dtype, layout).reshape_as(t) if "outer" not in layout else rows(n, t.dtype, layout)


def norm_call(call: Call, n: int) -> None:
    """One call of the autograd Function on rows of n columns, as `norm.py` makes it."""
    dtype, layout = call["dtype"], call["layout"]
    residual_dtype = call["residual_dtype"] or dtype
    stream = call["stream_dtype"] or (residual_dtype if call["residual"] else dtype)
    parameter = call["parameter_dtype"] or dtype
    leaves: dict[str, torch.Tensor | None] = {"x": rows(n, dtype, layout)}
    leaves["residual"] = rows(n, residual_dtype, layout) if call["residual"] else None
    samples = 2 if "outer" in layout else 4
    for name in _LEAVES[2:]:
        memory = (torch.zeros if name == "bias" else torch.ones)(samples, 6 * n, dtype=parameter)
        vectors = memory[:, :n] if call.get(f"own_{name}") else memory[0, :n]
        leaves[name] = vectors.detach() if call[name] else None
    for name, leaf in leaves.items():
        if leaf is not None:
            leaf.requires_grad_(call["backward"] and call[f"d_{name}"])
    dropped = call["dropout"] or call["drop_path"]
    changed = call["residual"] or call["x_bias"] or call["layer_scale"] or dropped or stream != dtype
    args = (
        *(leaves[name] for name in _LEAVES),
        *(torch.zeros(1, dtype=torch.int64) if dropped else None, 1, 1e-5, 0.1 * call["dropout"]),
        *(0.1 * call["drop_path"], call["normed_dtype"] or dtype, stream, call["rms"]),
        *(call["zero_centered"], changed),
    )
    from_normed = call["memory_efficient"] and autograd_norm.invertible(*from_flat("add_layer_norm_fwd", args))
    outputs = autograd_norm.AddLayerNormFunction.apply(*args, "triton", from_normed)[
        : 1 + (call["stream_used"] and changed)
    ]
    wanted = [leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad]
    if wanted and call["backward"]:
        given = [_cotangent(output, n, layout) for output in outputs]
        torch.autograd.grad(outputs, wanted, given, allow_unused=True)


def activation_call(call: Call, n: int) -> None:
    x = rows(n, call["dtype"], call["layout"]).requires_grad_(call["backward"] and call["d_x"])
    bias = None
    if call["bias"]:
        bias = torch.ones(n, dtype=call["parameter_dtype"] or call["dtype"])
        bias.requires_grad_(call["backward"] and call["d_bias"])
    seed = torch.zeros(1, dtype=torch.int64) if call["dropout"] else None
    y = autograd_activation.BiasActDropoutFunction.apply(
        x, bias, seed, call["activation"], 0.1 * call["dropout"], "triton"
    )
    wanted = [leaf for leaf in (x, bias) if leaf is not None and leaf.requires_grad]
    if wanted:
        torch.autograd.grad(y, wanted, _cotangent(y, n, call["layout"]))


@contextmanager
def _recorded() -> Iterator[list[tuple[Any, tuple[Any, ...], Config]]]:
    """What the tables are asked inside: the function, its arguments beside the width, its answer."""
    asked: list[tuple[Any, tuple[Any, ...], Config]] = []

    def recording(function: Any) -> Any:
        def record(n: int, *args: Any, **kwargs: Any) -> Config:
            config = function(n, *args, **kwargs)
            asked.append((function, (args, tuple(kwargs.items())), config))
            return config

        return record

    triton_norm.forget_variants()
    triton_activation._plan.cache_clear()
    with ExitStack() as stack:
        for module, name in itertools.product((table, triton_activation_table), ("forward", "backward")):
            stack.enter_context(mock.patch.object(module, name, recording(getattr(module, name))))
        yield asked


def note(call: Call, n: int, asked: list[Any] | None = None) -> list[Variant]:
    """The variants that a call on rows of n columns launches; `asked` gets what its direction asked the tables."""
    noted: list[Variant] = []
    words = [name for name, value in call.items() if value is True]
    words += [str(value) for name, value in call.items() if name in ("activation", "layout")]
    dtypes = [f"{name}={value}" for name, value in call.items() if isinstance(value, torch.dtype)]
    of = ("+".join(words), " ".join(dtypes).replace("torch.", ""), n)

    def take(launch: Launch) -> None:
        if ("fwd" in launch.kernel) == call["backward"]:
            return
        config = tables[-1][2]
        if launch.kernel == "sum_partials":
            config = SAMPLE_PARTIALS if launch.constants[0] else PARTIALS
        if launch.kernel == "add_layer_norm_bwd_sums":
            config = table.SUMS_FLOAT64 if launch.pointer_dtypes[2] == torch.float64 else table.SUMS
        noted.append(Variant(launch, *of, config))
        if asked is not None and launch.kernel not in ("sum_partials", "add_layer_norm_bwd_sums"):
            asked.append(tables[-1])

    programs = mock.patch.object(triton_host, "programs", lambda *_: 2 - call.get("one_program", False))
    with _recorded() as tables, launches(take), programs:
        (activation_call if "activation" in call else norm_call)(call, n)
    return noted


# --- which calls ---


@functools.cache
def widths(choose: Any, args: tuple[Any, ...]) -> dict[tuple[Config, bool], int]:
    """A width for every answer of a table's function to these arguments: the row a whole number of tiles, and not."""
    found: dict[tuple[Config, bool], int] = {}
    positional, named = args
    for n in range(8, _WIDEST, 8):
        config = choose(n, *positional, **dict(named))
        whole = n % (config.block_n * max(config.chunks, 1)) == 0
        found.setdefault((config, whole), n)
    return found


def at_width(call: Call) -> list[Variant]:
    """The variants of a call at the width that its `width` names."""
    asked: list[Any] = []
    note(call, 64, asked)
    if not asked:  # nothing is differentiated
        return []
    chosen = list(widths(*asked[0][:2]).values())
    return note(call, chosen[call["width"] % len(chosen)])


def heaviest() -> Iterator[list[Variant]]:
    """For each question to the tables the calls that carry the most, at the longest row of each tile.

    Longer rows on the same tile take more registers where the limit is the same, and rows that do not fill their last
    tile take more than those that do.
    """
    everything = {name: name != "rms" for name, values in NORM.items() if values is NO_YES} | {"one_program": False}
    shared = dict.fromkeys([f"own_{name}" for name in _OF_SAMPLES], False)
    lighter = ("layer_scale", "dropout", "memory_efficient", "d_x_bias")
    forward, backward = ((), ("dropout",)), ((), ("layer_scale",), ("layer_scale", "memory_efficient"), lighter)
    switches: list[Call] = [{"backward": False} | dict.fromkeys(off, False) for off in forward]
    switches += [dict.fromkeys(off, False) for off in backward]
    switches += [switch | shared for switch in switches]
    mixes = [dict(zip(_DTYPE_AXES, mix, strict=True)) for mix in _MIXES]
    for switch, mix, layout in itertools.product(switches, mixes, _HEAVY_LAYOUTS):
        call = everything | switch | mix | {"layout": layout}
        asked: list[Any] = []
        note(call, 64, asked)
        yield from (note(call, n) for n in _longest(widths(*asked[0][:2])))


def _longest(found: dict[tuple[Config, bool], int]) -> list[int]:
    longest: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for (config, whole), n in found.items():
        tile = (config.block_m, config.block_n, config.warps, config.registers, config.chunks == 0)
        longest[tile] = max(longest.get(tile, ()), (config.chunks, not whole, n))
    return [n for _, _, n in longest.values()]


# rows, residual, stream, normed, parameters
_DTYPE_AXES = ("dtype", "residual_dtype", "stream_dtype", "normed_dtype", "parameter_dtype")
_MIXES = (
    (torch.bfloat16, None, None, None, None),
    (torch.float32, None, None, None, None),
    (torch.float64, None, None, None, None),
    (torch.bfloat16, torch.float32, torch.float32, None, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16, None, torch.float32),
    (torch.bfloat16, None, None, None, torch.float64),
    (torch.float32, None, None, torch.bfloat16, None),
)
_HEAVY_LAYOUTS = ("aligned", "aligned_outer", "strided", "strided_outer")  # shifted ones take fewer registers


def activations() -> Iterator[Call]:
    """Every value of every axis with every other, at one width after the other; dtypes not mixed."""
    fixed = {"d_x": (True,), "d_bias": (True,), "parameter_dtype": (None,)}
    axes = {name: values for name, values in (ACTIVATION | fixed).items() if name != "width"}
    for width, values in enumerate(itertools.product(*axes.values())):
        yield dict(zip(axes, values, strict=True)) | {"width": width}


def pairs(axes: Axes, seed: int = 0) -> Iterator[Call]:
    """Calls in which any two values of any two axes occur together; the best of a few drawn ones each time."""
    drawing = random.Random(seed)
    missing = [
        pair
        for a, b in itertools.combinations(axes, 2)
        for pair in itertools.product(((a, x) for x in axes[a]), ((b, y) for y in axes[b]))
    ]
    drawing.shuffle(missing)
    covered: set[Any] = set()
    for pair in missing:
        if pair not in covered:
            candidates = [{name: drawing.choice(axes[name]) for name in axes} | dict(pair) for _ in range(8)]
            new = [set(itertools.combinations(call.items(), 2)) - covered for call in candidates]
            call, added = max(zip(candidates, new, strict=True), key=lambda entry: len(entry[1]))
            covered |= added
            yield call


def drawn(seed: int, count: int = 1000) -> Iterator[Call]:
    drawing = random.Random(seed)
    for _ in range(count):
        axes = drawing.choice((NORM, NORM, ACTIVATION))
        yield {name: drawing.choice(values) for name, values in axes.items()}


_WAYS: dict[str, Callable[[int], Iterable[list[Variant]]]] = {
    "heaviest": lambda seed: heaviest(),
    "activations": lambda seed: map(at_width, activations()),
    "pairs": lambda seed: map(at_width, itertools.chain(pairs(NORM, seed), pairs(ACTIVATION, seed))),
    "random": lambda seed: map(at_width, drawn(seed)),
}


def chosen(ways: Iterable[str], seed: int, only: str = "", sample: int | None = None) -> list[Variant]:
    """Each variant once; those whose name matches `only`; of them a sample."""
    found: dict[tuple[Any, ...], Variant] = {}
    for way in ways:
        for variant in itertools.chain.from_iterable(_WAYS[way](seed)):
            if re.search(only, f"{variant.kernel} {variant.mode} {variant.dtype}"):
                found.setdefault(variant.compiled_as, variant)
    variants = list(found.values())
    if sample is None or sample >= len(variants):
        return variants
    return random.Random(seed).sample(variants, sample)


MARGIN = 16  # registers


def near(variants: Iterable[Variant], figures_of_one: Path) -> list[Variant]:
    """Those that came near a limit, or have no figures, in a file that `--json` wrote."""
    smallest = min(device.shared for device in DEVICES.values())
    spare = {}
    for line in figures_of_one.read_text().splitlines():
        f = json.loads(line)
        device = DEVICES[f["arch"]]
        most = min(255, device.registers // (32 * f["warps"] * f["per_sm"]) // 8 * 8)
        broken = f["failure"] or f["stack"] or (f["shared"] + RESERVED) * f["per_sm"] > smallest
        name = f["kernel"], f["mode"], f["dtype"], f["n"]
        spare[name] = min(spare.get(name, 255), 0 if broken else most - f["registers"])
    return [v for v in variants if spare.get((v.kernel, v.mode, v.dtype, v.n), 0) < MARGIN]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--which", nargs="+", default=list(_WAYS)[:3], choices=_WAYS, help="default: all but random")
    parser.add_argument("--arch", type=int, nargs="+", default=list(DEVICES), choices=DEVICES, help="default: all")
    parser.add_argument("--only", default="", metavar="REGEX", help="kernel, switches and dtypes that match")
    parser.add_argument("--sample", type=int, help="compile so many, drawn from those")
    parser.add_argument("--near", type=Path, metavar="FILE", help="those near a limit in what --json wrote to FILE")
    parser.add_argument("--seed", type=int, default=0, help="of `pairs`, `random` and the sample; default: 0")
    parser.add_argument("--processes", type=int, help="default: one for each core")
    parser.add_argument("--json", type=Path, help="append the figures to this file, a line each, as they come")
    options = parser.parse_args(argv)
    variants = chosen(options.which, options.seed, options.only, options.sample)
    if options.near:
        variants = near(variants, options.near)
    broken, jobs = 0, [(variant, arch) for arch in options.arch for variant in variants]
    for f in in_processes(figures, jobs, options.processes):
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps({"triton": triton.__version__, **asdict(f)}) + "\n")
        for fault in faults(f):
            broken += 1
            print(f"{f.name}: {fault}", file=sys.stderr)
    print(f"{len(jobs)} variants, {broken} faults", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
