"""What the Triton kernels compile to: registers, spills, access widths, instructions. No GPU is needed.

    python3 -m tools.codegen.norms                              # sm_90, bfloat16, every mode: a table
    python3 -m tools.codegen.norms --arch 80 90 100 --layouts aligned odd strided --dtypes all
    python3 -m tools.codegen.norms --write                      # renew benchmarks/results/codegen.md

What is compiled is what a launch would compile: each variant is noted from a real call, as `norm_calls.py` makes them.
Exit status: 0; 1 when a variant breaks the gate (see `faults`), which `tests/tools/test_codegen_norms.py` holds.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import triton

from fusednorm.providers.triton import norm_config as table
from tools.codegen import activations, norm_calls, results
from tools.codegen.compile import DEVICES, Figures, Variant, faults, figures, in_processes

LAYOUTS = {"aligned": "aligned", "odd": "aligned", "strided": "strided_outer"}  # of norm_calls; odd: a column fewer
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_ADAPTIVE = frozenset({"residual", "layer_scale", "own_weight", "own_bias", "own_layer_scale"})
# switches of `norm_calls.NORM`, or of its activations; wide_stream: a float32 residual
MODES = {
    "plain": frozenset[str](),
    "rms": frozenset({"rms"}),
    "add": frozenset({"residual"}),
    "memory_efficient": frozenset({"residual", "memory_efficient"}),
    "dropout": frozenset({"residual", "dropout"}),
    "bias_dropout": frozenset({"residual", "dropout", "x_bias"}),
    "wide_stream": frozenset({"residual", "wide_stream"}),
    "all": frozenset({"residual", "dropout", "x_bias", "layer_scale", "drop_path"}),
    # adaptive: a gate, a scale and a shift for each sample
    "adaptive": _ADAPTIVE,
    "adaptive_rms": _ADAPTIVE | {"rms"},
    "adaptive_whole": _ADAPTIVE | {"one_program"},
    "adaptive_all": _ADAPTIVE | {"dropout", "x_bias", "drop_path"},
    **activations.MODES,
}
_MAX_WIDTH = 40960  # past the widest row that any configuration holds in registers


# --- what is compiled ---


def _call(mode: str, dtype: str, layout: str, backward: bool) -> norm_calls.Call:
    words = MODES[mode]
    given = {"residual_dtype": torch.float32} if "wide_stream" in words else {}
    return norm_calls.whole(words, backward=backward, dtype=DTYPES[dtype], layout=LAYOUTS[layout], **given)


def note(n: int, mode: str, dtype: str, layout: str, backward: bool) -> list[Variant]:
    """The variants that a call on rows of n columns launches, with their accesses by the byte model."""
    named = {"mode": mode if layout == "aligned" else f"{mode} {layout}", "dtype": dtype, "n": n}
    found = [v._replace(**named) for v in norm_calls.note(_call(mode, dtype, layout, backward), n)]
    if layout != "aligned":
        return found
    itemsize = DTYPES[dtype].itemsize
    modelled = [_accesses(v.kernel, MODES[mode], v.config, itemsize) for v in found]
    return [v._replace(loads=loads, stores=stores) for v, (loads, stores) in zip(found, modelled)]


def _affine(words: Collection[str]) -> int:
    """Weight, and bias where there is one."""
    return 1 + ("rms" not in words or "own_bias" in words)


def _accumulators(words: Collection[str]) -> int:
    return _affine(words) + ("x_bias" in words) + ("layer_scale" in words)


def _accesses(kernel: str, words: Collection[str], config: table.Config, itemsize: int) -> tuple[int, int]:
    """16-byte loads and stores of one thread by the byte model: each operand once, each result once.

    Forward reads x, the residual and the parameters it has, writes normed and, with a residual, z; the wide form reads
    z (or x) again. Backward reads dnormed, what was saved, the weight, the residual's cotangent, the bias if normed was
    saved, and for layer_scale also x, x_bias and the scale; it writes dx, dresidual where that is another tensor, and
    once in its life its float32 partials, or gradients of a sample whose rows it has (16 bytes at a time where a row
    takes all lanes; else what a warp has summed).
    """
    elements = config.block_m * config.block_n * max(config.chunks, 1) // (32 * config.warps)
    vectors, sums = max(elements * itemsize // 16, 1), elements * max(itemsize, 4) // 16
    named = ("layer_scale", "residual", "memory_efficient", "x_bias")
    scaled, add, normed, shifted = (word in words for word in named)
    separate = scaled or "dropout" in words
    stream = vectors  # of the residual stream's dtype
    if "wide_stream" in words:
        stream, separate = elements * 4 // 16, True
    if kernel == "sum_partials":
        return sums, 0
    if kernel.startswith(activations.STEM):
        return activations.accesses(kernel, config, itemsize)
    if kernel.endswith("sums"):
        return vectors * (2 + normed) + stream, 0
    if "fwd" in kernel:
        parameters = _affine(words) + shifted + scaled
        again = (stream if add else vectors) * kernel.endswith("wide")
        return vectors * (1 + parameters) + stream * add + again, vectors + stream * add
    # a row over all lanes: each lane then has the sums of its own columns, to be written 16 bytes at a time
    whole = config.block_n * itemsize // 16 >= 32 * config.warps
    written = sums * _accumulators(words)
    if "one_program" in words:
        written = sums * shifted + vectors * (_affine(words) + scaled)
    partials = written // config.block_m if whole else 0
    return vectors * (2 + normed + scaled * (2 + shifted)) + stream * (1 + add), vectors + stream * separate + partials


def _widths(mode: str, dtype: str, layout: str, backward: bool) -> Iterator[int]:
    """A width for every configuration that the table can choose in a mode."""
    if mode in activations.MODES:
        yield from activations.WIDTHS
        return
    asked: list[Any] = []
    norm_calls.note(_call(mode, dtype, layout, backward), 64, asked)
    choose, (args, named), _ = asked[0]
    seen = set()
    for n in (64, 128, *range(256, _MAX_WIDTH, 256)):
        config = choose(n, *args, **dict(named))
        if config not in seen:
            seen.add(config)
            yield n


def variants(modes: Iterable[str], dtypes: Iterable[str], layouts: Iterable[str]) -> list[Variant]:
    """Every configuration of the table, forward and backward; each compiled once."""
    found: dict[tuple[Any, ...], Variant] = {}
    for mode, dtype, layout, backward in itertools.product(modes, dtypes, layouts, (False, True)):
        for n in _widths(mode, dtype, layout, backward):
            for v in note(n - (layout == "odd"), mode, dtype, layout, backward):
                found.setdefault(v.compiled_as, v)
    return list(found.values())


# --- reporting ---


def markdown(results: Sequence[Figures]) -> str:
    lines = [
        "| kernel | mode | dtype | N | tile | warps | sm | registers | spilled | instr./element "
        "| 128-bit loads (model) | 128-bit stores (model) |",
        "|---|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for f in results:
        lines.append(
            f"| {f.kernel} | {f.mode} | {f.dtype} | {f.n} | {f.tile} | {f.warps} | {f.arch} | {f.registers} "
            f"| {f.stack} | {f.per_element} | {f.loads} ({f.model_loads}) | {f.stores} ({f.model_stores}) |"
        )
    return "\n".join(lines) + "\n"


_HEADER = f"""# What the Triton kernels compile to

Triton {triton.__version__}, ahead of time; `python3 -m tools.codegen.norms --write` renews this file.

128-bit loads and stores are those of one thread in the binary, beside what the byte model asks for: every operand once,
every result once. Spilled: bytes of local memory. Instructions an element are static: a loop counts once, set-up, final
sums and the write of the partials are included, so the longest tiles say most. The mode `dropout` minus `add` is the
price of Philox: one call for four elements.

"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = results.parser(__doc__, "codegen.md")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=DEVICES, help="default: 90")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=[*DTYPES, "all"])
    parser.add_argument("--layouts", nargs="+", default=["aligned"], choices=LAYOUTS)
    options = parser.parse_args(argv)
    dtypes = list(DTYPES) if "all" in options.dtypes else options.dtypes
    chosen = variants(options.modes, dtypes, options.layouts)
    found = list(in_processes(figures, [(variant, arch) for arch in options.arch for variant in chosen]))
    return results.finish(options, found, faults, markdown(found), _HEADER)


if __name__ == "__main__":
    sys.exit(main())
