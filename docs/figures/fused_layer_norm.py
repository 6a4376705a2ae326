"""The program, the tables and the pictures of docs/fused-layer-norm.md.

    python docs/figures/fused_layer_norm.py          # print the program
    python docs/figures/fused_layer_norm.py --draw   # run it; renew docs/images and the two tables of the page

Each picture has the numbers that it was drawn from as JSON in the PNG's text "Description".
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a file, from any folder

from benchmarks.publish import add_result, readme  # noqa: E402
from benchmarks.report.files import renew  # noqa: E402
from benchmarks.report.stats import Record, groups_by_key, measured, ratio, seconds_text  # noqa: E402
from benchmarks.report.table import table  # noqa: E402
from docs.figures import page as pages  # noqa: E402

PAGE = ROOT / "docs" / "fused-layer-norm.md"
IMAGES = ROOT / "docs" / "images"
NOTE = "<!-- written by docs/figures/fused_layer_norm.py: do not edit -->"
MIB = 1 << 20
READ, WRITTEN, INK, FAINT = "#3b7dbd", "#f0a13a", "#222222", "#d9d9d9"
PROGRAMS = ("#3b7dbd", "#f0a13a", "#4fa36b", "#b8609e")  # a colour for each
ADD, EPILOGUE, DTYPE = "add_layer_norm", "bias_dropout_add_layer_norm", "float32"

Passes = Mapping[str, tuple[int, int]]


# --- tables ---


def total(passes: Passes) -> int:
    return sum(map(sum, passes.values()))


def ways(program: ModuleType) -> dict[tuple[str, str], Passes]:
    """(direction, who): the passes."""
    found: dict[tuple[str, str], Passes] = {}
    for direction, eager in (("forward", program.FORWARD), ("backward", program.BACKWARD)):
        found[direction, "eager"] = eager
        found[direction, "fused"] = {"one pass": program.FLOOR[direction]}
    return found


def passes_text(program: ModuleType) -> str:
    both = {who: sum(total(p) for (_, other), p in ways(program).items() if other == who) for who in ("eager", "fused")}
    return (
        f"{NOTE}\n\nEager moves {both['eager'] / MIB:.0f} MiB, the floor is {both['fused'] / MIB:.0f} MiB: eager moves "
        f"{both['eager'] / both['fused']:.2f} times the bytes."
    )


def bytes_ratios(program: ModuleType) -> dict[str, float]:
    """Eager's bytes over the floor, forward and backward, by operation."""
    epilogue = sum(total(passes) for (_, who), passes in ways(program).items() if who == "eager")
    steps = [program.FORWARD[name] for name in ("add residual", "LayerNorm")]
    steps += [program.BACKWARD[name] for name in ("LayerNorm", "add gradients")]
    floor = sum(map(sum, program.FLOOR.values()))
    # of a bare sum the gradients of both terms are one tensor
    return {EPILOGUE: epilogue / floor, ADD: sum(map(sum, steps)) / (floor - program.T)}


def speed_table(result: Record, program: ModuleType) -> str:
    """The norm after the residual add, forward and backward, in the committed raw data of a device."""
    rows = []
    for record in measured(result):
        if (record["op"], record["direction"], record["dtype"]) != (ADD, "both", DTYPE):
            continue
        ours, eager = (median(record["variants"][name]["samples"]) for name in ("fused", "eager"))
        times = [seconds_text(t) for t in (record["roofline_seconds"], ours, eager)]
        rows.append([record["size"], f"{record['bytes'] / MIB:.2f}", *times, f"{ratio(record)[0]:.2f}"])
    rows.sort(key=lambda row: float(row[1]))
    head = ["rows x columns", "MiB of the floor", "copy", "fused", "eager", "eager / fused"]
    where = f"{readme.short_name(result)}, {result['method']['threads']} threads, {result['environment']['date'][:10]}"
    words = [f"{where}: `{ADD}`, forward and backward, {DTYPE}."]
    for operation, of_bytes in sorted(bytes_ratios(program).items()):
        mean = groups_by_key(result)[operation, "both", DTYPE].mean
        moved = f"Eager's `{operation}` moves {of_bytes:.2f} times the bytes"
        words.append(f"{moved}, and takes {mean:.2f} times as long, on average.")
    return "\n\n".join([NOTE, table(head, rows), readme.wrapped(" ".join(words))])


def measured_on_a_cpu() -> Record:
    """What the page's words about dropout are of."""
    return next(result for _, result in add_result.newest() if result["environment"]["device_type"] == "cpu")


def with_tables(text: str, program: ModuleType) -> str:
    text = readme.replaced(text, passes_text(program), "passes")
    return readme.replaced(text, speed_table(measured_on_a_cpu(), program), "speed")


# --- pictures ---


def save(figure: Any, path: Path, numbers: Any) -> None:
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Description": json.dumps(numbers)})


def passes_numbers(program: ModuleType) -> list[Any]:
    return [[*way, [[name, *moved] for name, moved in passes.items()]] for way, passes in ways(program).items()]


def draw_passes(program: ModuleType, path: Path) -> None:
    """A bar for each direction and way, a box for each pass: bytes read, then bytes written."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    centred = {"ha": "center", "va": "center", "fontsize": 12}
    places = dict(zip(ways(program), (0.0, 1.15, 2.75, 3.9)))
    for way, passes in ways(program).items():
        y, at = places[way], 0.0
        for name, moved in passes.items():
            start = at
            for amount, colour, ink in zip(moved, (READ, WRITTEN), ("white", INK)):
                width = amount / MIB
                if width:
                    axes.barh(y, width, 0.55, at, color=colour, edgecolor="white", linewidth=0.8)
                    axes.text(at + width / 2, y, f"{width:.0f}", color=ink, fontweight="bold", **centred)
                at += width
            axes.barh(y, at - start, 0.55, start, fill=False, edgecolor=INK, linewidth=1.6)
            label = name.replace(" ", "\n") if at - start < 20 else name
            axes.text((start + at) / 2, y - 0.33, label, ha="center", va="bottom", fontsize=11.5, color=INK)
        count = f"{len(passes)} passes" if len(passes) > 1 else "1 pass"
        label = f"{total(passes) / MIB:.0f} MiB, {count}"
        axes.text(at + 2, y, label, va="center", fontsize=12, color=INK, fontweight="bold")
    axes.set_yticks(list(places.values()), [f"{direction}\n{who}" for direction, who in places], fontsize=12.5)
    axes.tick_params(length=0)
    axes.set_ylim(4.35, -0.75)
    axes.set_xlim(0, max(total(passes) for passes in ways(program).values()) / MIB * 1.28)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title("residual + dropout(x + bias), then LayerNorm: MiB moved through memory", fontsize=14, color=INK)
    patches = [Patch(color=READ, label="read"), Patch(color=WRITTEN, label="written")]
    axes.legend(handles=patches, loc="center right", bbox_to_anchor=(1, 0.66), fontsize=12.5, frameon=False)
    size = f"{program.M} x {program.N} float32. Each box is one operator."
    axes.set_xlabel(size, fontsize=11.5, color=INK)
    save(figure, path, passes_numbers(program))


def draw_partial_sums(path: Path, rows: int = 10, columns: int = 8) -> None:
    """Rows coloured by the program that has them, their partial sums, and the finished sum."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch, Rectangle

    count = len(PROGRAMS)
    owner = {row: p for p in range(count) for row in range(p, rows, count)}
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.add_subplot()

    def cells(x: float, y: float, colours: Sequence[str]) -> None:
        for i, colour in enumerate(colours):
            for j in range(columns):
                axes.add_patch(Rectangle((x + j, y + i), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.2))

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        style = {"arrowstyle": "-|>", "mutation_scale": 16, "color": INK, "linewidth": 1.4}
        axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))

    middle = (rows - count) / 2
    second, third = columns + 7.5, 2 * columns + 12.5
    cells(0, 0, [PROGRAMS[owner[row]] for row in range(rows)])
    cells(second, middle, PROGRAMS)
    cells(third, rows / 2 - 0.5, [FAINT])
    for row in range(rows):
        axes.text(-0.3, row + 0.5, f"row {row}", ha="right", va="center", fontsize=11, color=INK)
    for p in range(count):
        axes.text(second - 0.3, middle + p + 0.5, f"program {p}", ha="right", va="center", fontsize=11, color=INK)
    arrow((columns + 0.4, rows / 2), (second - 4.4, rows / 2))
    arrow((second + columns + 0.4, rows / 2), (third - 0.4, rows / 2))
    heads = ("M rows of dy x̂", "P rows of partial sums", "dw")
    for x, head in zip((0, second, third), heads):
        axes.text(x + columns / 2, -0.6, head, ha="center", va="bottom", fontsize=13, fontweight="bold", color=INK)
    notes = (
        "A program has whole rows.\nIts means stay inside it.",
        "Each program adds up\nits rows in registers.",
        "Another kernel adds these\nrows, always in one order.",
    )
    for x, note in zip((0, second, third), notes):
        axes.text(x + columns / 2, rows + 0.5, note, ha="center", va="top", fontsize=11.5, color=INK)
    axes.set_xlim(-3.2, third + columns + 1.4)
    axes.set_ylim(rows + 2.4, -1.8)
    axes.set_axis_off()
    save(figure, path, owner)


def variance_numbers(program: ModuleType) -> dict[str, list[float]]:
    offsets = [10 ** (k / 4) for k in range(17)]
    formulas = program.two_passes, program.difference
    errors = {f.__name__: [program.variance_error(f, o) for o in offsets] for f in formulas}
    return {"offset": offsets} | errors


def draw_variance(program: ModuleType, path: Path) -> None:
    from matplotlib.figure import Figure

    numbers = variance_numbers(program)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.add_subplot()
    lines = (("difference", "mean(x²) - mean(x)²", WRITTEN, "s"), ("two_passes", "mean((x - mean)²)", READ, "o"))
    for name, label, colour, marker in lines:
        axes.loglog(numbers["offset"], numbers[name], color=colour, marker=marker, linewidth=2, label=label)
    axes.axhline(1.0, color=INK, linewidth=1, linestyle="--")
    axes.text(1.0, 1.3, "no digit is right", fontsize=11.5, va="bottom", color=INK)
    axes.set_xlabel("mean of a row, in standard deviations", fontsize=12)
    axes.set_ylabel("relative error of the variance", fontsize=12)
    axes.set_title("Two formulas of the variance in float32: the worst of 256 rows of 1024 numbers", fontsize=13)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=12, frameon=False)
    save(figure, path, numbers)


def draw(program: ModuleType, folder: Path) -> None:
    draw_passes(program, folder / "passes.png")
    draw_partial_sums(folder / "partial-sums.png")
    draw_variance(program, folder / "variance-error.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="renew the pictures and tables")
    if not parser.parse_args(argv).draw:
        print(pages.program(PAGE), end="")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        program = pages.load(PAGE, Path(folder))
        draw(program, IMAGES)
        return renew(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), program), check=False)


if __name__ == "__main__":
    sys.exit(main())
