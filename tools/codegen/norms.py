"""What the Triton kernels compile to: registers, spills, access widths, instructions. No GPU is needed.

    python3 -m tools.codegen.norms                              # sm_90, bfloat16, every mode: a table
    python3 -m tools.codegen.norms --arch 80 90 100 --layouts aligned odd strided --dtypes all
    python3 -m tools.codegen.norms --write                      # renew benchmarks/results/codegen.md

What is compiled is what a launch would compile: each variant is noted from a real call of the provider whose launch is
replaced. Exit status: 0; 1 when a variant breaks the gate (see `faults`), which `tests/tools/test_codegen_norms.py`
holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from fusednorm._dtypes import compute_dtype
from fusednorm._options import NormGradOptions, NormInputs, NormOptions, NormSaved
from fusednorm.providers.triton import launch as triton_launch
from fusednorm.providers.triton import norm as triton_norm
from fusednorm.providers.triton import norm_config as table
from fusednorm.providers.triton.config import PARTIALS
from tools.codegen import activations
from tools.codegen.compile import DEVICES, Figures, Variant, compile_all, faults
from tools.codegen.results import conclude

ARCHITECTURES = (80, 90, 100)
LAYOUTS = ("aligned", "odd", "strided")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
MODES = {
    "plain": frozenset[str](),
    "rms": frozenset({"rms"}),
    "add": frozenset({"residual"}),
    "memory_efficient": frozenset({"residual", "from_normed"}),
    "dropout": frozenset({"residual", "dropout"}),
    "bias_dropout": frozenset({"residual", "dropout", "x_bias"}),
    "wide_stream": frozenset({"residual", "wide_stream"}),
    "all": frozenset({"residual", "dropout", "x_bias", "layer_scale", "drop_path"}),
    **activations.MODES,
}
_MAX_WIDTH = 40960  # past the widest row that any configuration holds in registers


# --- noting what a call launches ---


def _rows(n: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "strided":  # two row strides and a column stride
        return torch.zeros(4, 8, 2 * n, dtype=dtype).transpose(0, 1)[..., ::2]
    return torch.zeros(64, n, dtype=dtype)


def _call(n: int, words: frozenset[str], dtype: torch.dtype, layout: str, backward: bool) -> None:
    if _activates(words):
        activations.call(_rows(n, dtype, layout), words, backward)
        return
    x, vector, seed = _rows(n, dtype, layout), torch.ones(n, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    stream = torch.float32 if "wide_stream" in words else dtype
    z = _rows(n, stream, layout)
    rms, add = "rms" in words, "residual" in words
    bias = None if rms else vector
    x_bias = vector if "x_bias" in words else None
    scale = vector if "layer_scale" in words else None
    seed_or_none = seed if "dropout" in words else None
    p, path_p = 0.1 * ("dropout" in words), 0.1 * ("drop_path" in words)
    if not backward:
        inputs = NormInputs(x, z if add else None, vector, bias, x_bias, scale, seed_or_none)
        triton_norm.add_layer_norm_fwd(inputs, NormOptions(1, 1e-5, p, path_p, dtype, stream, rms, False, add))
        return
    stats = torch.zeros(1 if rms else 2, x.shape[:-1].numel(), dtype=compute_dtype(dtype, stream))
    mask = [True, "dropout" in words or stream != dtype, True, not rms, "x_bias" in words, "layer_scale" in words]
    saved = NormSaved(z, stats, vector, bias, x if scale is not None else None, x_bias, scale, seed_or_none)
    options = NormGradOptions(1, p, path_p, dtype, stream, rms, False, "from_normed" in words)
    triton_norm.add_layer_norm_bwd(x, z if add else None, saved, options, mask)


def _activates(words: frozenset[str]) -> bool:
    return not words.isdisjoint(activations.ACTIVATIONS)


def note(n: int, mode: str, dtype: str, layout: str, backward: bool) -> list[Variant]:
    """The variants that a call on rows of n columns launches."""
    noted: list[Variant] = []
    words = MODES[mode]

    def launch(self: triton_launch.Variant, grid: Any, pointers: Any, numbers: Any) -> None:
        kernel = self.function.__name__.strip("_").removesuffix("_kernel")
        config = _config(kernel, n, words, DTYPES[dtype], layout)
        dtypes = tuple(None if t is None else t.dtype for t in pointers)
        accesses = _accesses(kernel, words, config, DTYPES[dtype].itemsize) if layout == "aligned" else (None, None)
        compiled_as = (dtypes, self.constants, self.warps, self.registers, self.aligned)
        noted.append(Variant(kernel, mode, layout, dtype, n, *compiled_as, config, *accesses))

    original, triton_launch.Variant.launch = triton_launch.Variant.launch, launch  # type: ignore[method-assign]
    try:
        _call(n, words, DTYPES[dtype], layout, backward)
    finally:
        triton_launch.Variant.launch = original  # type: ignore[method-assign]
    return noted


def _accumulators(words: Collection[str]) -> int:
    return 2 - ("rms" in words) + ("x_bias" in words) + ("layer_scale" in words)


def _config(kernel: str, n: int, words: Collection[str], dtype: torch.dtype, layout: str) -> table.Config:
    if kernel.endswith("bwd_sums"):
        return table.SUMS_FLOAT64 if dtype == torch.float64 else table.SUMS
    if kernel == "sum_partials":
        return PARTIALS
    small = layout != "aligned" or dtype == torch.float64
    if kernel.startswith(activations.STEM):
        return activations.config(kernel, n, small, dtype == torch.float64, layout == "strided")
    wide_rows = dtype.itemsize > 2 or "wide_stream" in words
    if "fwd" in kernel:
        return table.forward(n, "dropout" in words, wide_rows, small)
    weight_class = table.load(
        _accumulators(words), "dropout" in words, "layer_scale" in words, wide_rows, "from_normed" in words
    )
    return table.backward(n, weight_class, small, two_strides=layout == "strided")


def _accesses(kernel: str, words: Collection[str], config: table.Config, itemsize: int) -> tuple[int, int]:
    """16-byte loads and stores of one thread by the byte model: each operand once, each result once.

    Forward reads x, the residual and the parameters it has, writes normed and, with a residual, z; the wide form reads
    z (or x) again. Backward reads dnormed, what was saved, the weight, the residual's cotangent, the bias if normed was
    saved, and for layer_scale also x, x_bias and the scale; it writes dx, dresidual where that is another tensor, and
    once in its life its float32 partials (16 bytes at a time where a row takes all lanes; else what a warp has summed).
    """
    elements = config.block_m * config.block_n * max(config.chunks, 1) // (32 * config.warps)
    vectors, sums = max(elements * itemsize // 16, 1), elements * max(itemsize, 4) // 16
    scaled, add, normed, separate = (word in words for word in ("layer_scale", "residual", "from_normed", "dropout"))
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
        parameters = 2 - ("rms" in words) + ("x_bias" in words) + scaled
        again = (stream if add else vectors) * kernel.endswith("wide")
        return vectors * (1 + parameters) + stream * add + again, vectors + stream * add
    # a row over all lanes: each lane then has the sums of its own columns, to be written 16 bytes at a time
    whole = config.block_n * itemsize // 16 >= 32 * config.warps
    partials = sums // config.block_m * _accumulators(words) if whole else 0
    return vectors * (2 + normed + 3 * scaled) + stream * (1 + add), vectors + stream * separate + partials


def _widths(mode: str, dtype: str, layout: str, backward: bool) -> Iterator[int]:
    """A width for every configuration that the table can choose in a mode."""
    if _activates(MODES[mode]):
        yield from activations.WIDTHS
        return
    seen = set()
    for n in (64, 128, *range(256, _MAX_WIDTH, 256)):
        kernel = "add_layer_norm_bwd" if backward else "add_layer_norm_fwd"
        config = _config(kernel, n, MODES[mode], DTYPES[dtype], layout)
        if config not in seen:
            seen.add(config)
            yield n


def variants(modes: Iterable[str], dtypes: Iterable[str], layouts: Iterable[str]) -> list[Variant]:
    """Every configuration of the table, forward and backward; each compiled once."""
    found: dict[tuple[Any, ...], Variant] = {}
    for mode, dtype, layout in ((m, d, la) for m in modes for d in dtypes for la in layouts):
        for backward in (False, True):
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=DEVICES, help="default: 90")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=[*DTYPES, "all"])
    parser.add_argument("--layouts", nargs="+", default=["aligned"], choices=LAYOUTS)
    parser.add_argument("--json", type=Path, help="write the figures here instead of a table")
    parser.add_argument("--write", action="store_true", help="renew benchmarks/results/codegen.md")
    options = parser.parse_args(argv)
    dtypes = list(DTYPES) if "all" in options.dtypes else options.dtypes
    chosen = variants(options.modes, dtypes, options.layouts)
    results = list(compile_all([(variant, arch) for arch in options.arch for variant in chosen]))
    page, text = None, ""
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "figures": [asdict(f) for f in results]}))
    elif options.write:
        page, text = "codegen.md", _HEADER + markdown(results)
    else:
        sys.stdout.write(markdown(results))
    broken = [f"{f.name}: {fault}" for f in results for fault in faults(f)]
    return conclude(f"{len(results)} variants", broken, page, text)


if __name__ == "__main__":
    sys.exit(main())
