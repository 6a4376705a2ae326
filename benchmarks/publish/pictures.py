"""Draw the pictures of docs/: attention's masks, and what a training step keeps for its backward.

    python3 -m benchmarks.publish.pictures                # all of them into docs/images
    python3 -m benchmarks.publish.pictures --only memory  # or the names of masks

The squares of a mask are the weights that `scaled_dot_product_attention` gives: with a unit matrix as value, its output
is the matrix of weights. The bytes are those of benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure.kept import PARTS
from benchmarks.report.files import read_result
from fusednorm import scaled_dot_product_attention, varlen_attention

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
MEMORY = ROOT / "benchmarks" / "results" / "memory.json"
INK, HIDDEN, EDGE = "#24323d", "#eef1f3", "#ffffff"
COLOURS = ("#2f6690", "#e07a3f", "#7a9e7e", "#b8c0c8")  # of PARTS
SIDE = 0.27  # of a square, in inches


class Panel(NamedTuple):
    """One mask: the weights of (queries, keys), under the arguments that make them."""

    title: str
    weights: Tensor
    rows: str = "query"
    columns: str = "key"


def weights(queries: int, keys: int, heads: int = 1, query: Tensor | None = None, **arguments: Any) -> Tensor:
    """(batch, heads, queries, keys), of equal logits unless a query is given."""
    batch = len(arguments["key_mask"]) if "key_mask" in arguments else 1
    if query is None:
        query = torch.zeros(batch, heads, queries, keys)
    unit = torch.eye(keys).expand(batch, heads, keys, keys)
    return scaled_dot_product_attention(query, unit, unit, scale=1.0, **arguments)


def full() -> list[Panel]:
    return [Panel("no mask", weights(6, 6)[0, 0])]


def causal() -> list[Panel]:
    return [Panel("is_causal=True", weights(6, 6, is_causal=True)[0, 0])]


def alignment() -> list[Panel]:
    """Fewer queries than keys, as in generation with a cache."""
    return [
        Panel(f'is_causal=True\ncausal_align="{align}"', weights(3, 6, is_causal=True, causal_align=align)[0, 0])
        for align in ("upper_left", "lower_right")
    ]


def window() -> list[Panel]:
    return [Panel(f"window={sides}", weights(6, 6, window=sides)[0, 0]) for sides in ((2, 0), (2, 1), (2, None))]


def padding() -> list[Panel]:
    """A batch of two, of 6 and of 4 keys."""
    lengths = torch.tensor([6, 4])
    found = weights(6, 6, key_mask=torch.arange(6) < lengths[:, None])
    return [Panel(f"key_mask, sample of {n}", of_sample[0]) for n, of_sample in zip(lengths.tolist(), found)]


def bias() -> list[Panel]:
    """ALiBi: a penalty for distance, with a slope for each head."""
    slopes = torch.tensor([0.5, 0.125])
    distance = torch.arange(8)[:, None] - torch.arange(8)
    found = weights(8, 8, heads=2, attn_mask=-slopes[:, None, None] * distance.abs(), is_causal=True)
    return [Panel(f"ALiBi, slope {slope:g}", of_head) for slope, of_head in zip(slopes.tolist(), found[0])]


def softcap() -> list[Panel]:
    """Logits of up to 8, and the same within (-2, 2)."""
    logits = 8 - 3.0 * (torch.arange(6)[:, None] - torch.arange(6)).abs()
    return [Panel(f"softcap={cap}", weights(6, 6, query=logits[None, None], softcap=cap)[0, 0]) for cap in (0.0, 2.0)]


def packed() -> list[Panel]:
    """Three sequences, of 3, 2 and 4 positions, one after another."""
    lengths = torch.tensor([3, 2, 4])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    total, longest = int(lengths.sum()), int(lengths.max())
    query, unit = torch.zeros(total, 1, total), torch.eye(total)[:, None]
    found = [
        varlen_attention(query, unit, unit, bounds, bounds, longest, longest, is_causal=causal)
        for causal in (False, True)
    ]
    titles = "varlen_attention", "varlen_attention\nis_causal=True"
    return [Panel(title, weight[:, 0]) for title, weight in zip(titles, found)]


def grouped() -> list[Panel]:
    """Which head's keys a query's head reads: each head's value says its number."""
    query, key = torch.zeros(1, 6, 1, 2), torch.zeros(1, 2, 3, 2)
    value = torch.eye(2)[:, None].expand(1, 2, 3, 2)
    found = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return [Panel("enable_gqa=True", found[0, :, 0], "query's head", "key's head")]


MASKS: Mapping[str, Callable[[], list[Panel]]] = {
    made.__name__: made for made in (full, causal, alignment, window, padding, bias, softcap, packed, grouped)
}


def draw_mask(panels: Sequence[Panel], path: Path) -> None:
    """A square for each query and key: the darker, the more weight; hidden keys are grey."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    shades = LinearSegmentedColormap.from_list("weights", ["#c9dcec", "#2f6690", "#0b2a43"])
    rows = max(len(panel.weights) for panel in panels)
    widths = [max(SIDE * panel.weights.shape[1], 1.6) for panel in panels]
    height, below = SIDE * rows, 0.1
    above = 0.32 + 0.16 * max(panel.title.count("\n") + 1 for panel in panels)
    figure = Figure(figsize=(sum(widths) + 0.75 * len(panels), height + above + below))
    total, left = figure.get_size_inches(), 0.05
    for panel, width in zip(panels, widths):
        high, wide = (SIDE * size for size in panel.weights.shape)
        left += 0.45
        box = (left / total[0], (below + height - high) / total[1], wide / total[0], high / total[1])
        axes = figure.add_axes(box)
        for i, row in enumerate(panel.weights.tolist()):
            for j, weight in enumerate(row):
                colour = shades(weight**0.5) if weight else HIDDEN
                axes.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, edgecolor=EDGE, linewidth=1.6))
        axes.set(xlim=(0, panel.weights.shape[1]), ylim=(len(panel.weights), 0), xticks=[], yticks=[])
        axes.set_ylabel(f"{panel.rows} →", fontsize=8, color=INK, rotation=270, labelpad=11)
        axes.set_xlabel(f"{panel.columns} →", fontsize=8, color=INK, labelpad=4)
        axes.xaxis.set_label_position("top")
        axes.spines[:].set_visible(False)
        title = {"fontsize": 8.5, "color": INK, "family": "monospace", "ha": "left", "va": "bottom", "linespacing": 1.2}
        figure.text(left / total[0], (below + height + 0.24) / total[1], panel.title, **title)
        left += width + 0.3
    figure.savefig(path, dpi=110, facecolor="white")


def memory(result: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Bytes by part, of each way to train whose parts are counted."""
    return {case["name"]: case["kept_parts"] for case in result["cases"] if "kept_parts" in case}


def draw_memory(result: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    shown = memory(result)
    names = [name.replace(", recompute=", "\nrecompute ").removesuffix(", float32") for name in shown]
    figure = Figure(figsize=(9, 0.62 * len(names) + 1.25), layout="constrained")
    axes = figure.add_subplot()
    before = [0.0] * len(names)
    for part, colour in zip(PARTS, COLOURS):
        sizes = [parts.get(part, 0) / 2**20 for parts in shown.values()]
        bars = axes.barh(names, sizes, 0.62, before, label=part, color=colour, edgecolor=EDGE, linewidth=1)
        texts = [f"{size:.0f}" if size >= 10 else "" for size in sizes]
        axes.bar_label(bars, texts, label_type="center", fontsize=9, color="white")
        before = [start + size for start, size in zip(before, sizes)]
    for row, total in enumerate(before):
        axes.text(total + 3, row, f"{total:.0f} MiB", va="center", fontsize=10, color=INK, weight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(before))
    axes.set_xlabel("kept by the forward of two encoder layers for their backward, MiB", color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False, colors=INK, labelsize=10)
    axes.legend(loc="lower right", frameon=False, fontsize=10, labelcolor=INK)
    figure.savefig(path, dpi=130, facecolor="white")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*MASKS, "memory"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--folder", type=Path, default=IMAGES)
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        if name == "memory":
            draw_memory(read_result(MEMORY), arguments.folder / "memory.png")
        else:
            draw_mask(MASKS[name](), arguments.folder / f"mask-{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
