"""From raw results to the table that automatic choice goes by.

    python3 -m benchmarks.run --grid --provider triton --json T.json    # each provider forced in turn,
    python3 -m benchmarks.run --grid --provider cuda --json C.json      # on the same device
    python3 -m benchmarks.publish.crossovers T.json C.json                   # what would change
    python3 -m benchmarks.publish.crossovers T.json C.json --write           # fusednorm/dispatch/measured/*.json

Times include the host's. `torch` stands for torch's own operators. They are no choice for dropout: their mask differs.

The table has a line for each operation, element size and direction: `forward` for calls without gradients, `both` for
those with. A line is a list of steps `[columns, elements, provider]`. The last step with at most the columns and the
elements of a call decides. At most two widths have steps: all rows, or narrow and wide ones.

A line is the shortest list that loses at most 5 % at each measured shape, or else the one that exceeds 5 % least. A
step begins at the geometric mean of two measured sizes. Shapes at which the machine was disturbed do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import OPS
from benchmarks.report import table as report_table
from benchmarks.report.files import read_result
from benchmarks.report.stats import LOSS, Record, measured, no_kernel, ratio
from fusednorm.dispatch import PROVIDERS
from fusednorm.dispatch import crossovers as choice

Key = tuple[str, int, int]  # operation, element size and direction; rows, columns
Shapes = Mapping[tuple[int, int], Mapping[str, float]]  # eager's time over that of each provider, by rows and columns
TOLERATED = 0.05  # what a provider may lose for the sake of fewer steps
STUMBLE = 4.0  # where eager takes over four times as long as at a larger shape, the machine was disturbed
REFUSED = 100.0  # the loss where a provider was not measured
DIRECTIONS = ("forward", "both")  # what a call is asked for; no call is a backward alone


def device_key(result: Record) -> str:
    """As `fusednorm.dispatch.crossovers.device_key` names the device."""
    environment = result["environment"]
    if environment["device_type"] == "cpu":
        if not environment.get("shortcut"):
            return "cpu_without_fastpath"
        return "cpu_amd" if environment.get("vendor") == "amd" else "cpu"
    if environment["device_type"] != "cuda":
        return environment["device_type"]
    return "sm_" + environment["capability"].replace(".", "")


def speeds(results: Sequence[Record]) -> dict[Key, dict[str, float]]:
    """Eager's time over that of each provider; 1 for torch's own operators."""
    found: dict[Key, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        for record in without_stumbles(measured(result)):
            if OPS[record["op"]].family in ("attention", "layer"):  # chosen by what a call means
                continue
            rows, columns = record["shape"]
            itemsize, direction = getattr(torch, record["dtype"]).itemsize, record["direction"]
            value = ratio(record, key="inclusive") or ratio(record)
            if value is None or no_kernel([record]) or direction not in DIRECTIONS:
                continue
            key = (f"{record['op']}/{itemsize}/{direction}", rows, columns)
            known = found[key][record["provider"]].get(record["dtype"], agreed(value))
            found[key][record["provider"]][record["dtype"]] = min(known, agreed(value))
    speed: dict[Key, dict[str, float]] = {}
    for key, providers in found.items():
        every = {dtype for dtypes in providers.values() for dtype in dtypes}  # of one size: the worse of them counts
        speed[key] = {name: min(d.values()) for name, d in providers.items() if set(d) == every}
        if not OPS[key[0].split("/")[0]].draws_mask:
            speed[key]["torch"] = 1.0
    return {key: providers for key, providers in speed.items() if providers}


def without_stumbles(records: Sequence[Record]) -> list[Record]:
    """The records whose shape took eager no longer than STUMBLE times as long as a larger one."""

    def time(record: Record) -> float:
        eager = record["variants"].get("eager", {})
        return min(eager.get("inclusive") or eager.get("samples") or [math.inf])

    def alike(record: Record) -> tuple[str, str, str]:
        return record["op"], record["dtype"], record["direction"]

    known: dict[tuple[str, str, str], list[tuple[Sequence[int], float]]] = defaultdict(list)
    for record in records:
        known[alike(record)].append((record["shape"], time(record)))

    def shortest(record: Record) -> float:
        return min(t for shape, t in known[alike(record)] if all(a <= b for a, b in zip(record["shape"], shape)))

    return [record for record in records if time(record) <= STUMBLE * shortest(record)]


def agreed(value: tuple[float, float, float, float]) -> float:
    """The ratio that the median of the pairs and the fastest samples both reach, on whichever side of 1; 1 if on two.

    A stumble of the machine that lasts for a case (a thread that was given no core) is in the median alone.
    """
    middle, fastest = value[0], value[3]
    if min(middle, fastest) > 1.0:
        return min(middle, fastest)
    return max(middle, fastest) if max(middle, fastest) < 1.0 else 1.0


class Line(NamedTuple):
    cost: tuple[int, int, int]  # losses beyond TOLERATED, in 1/10000; the number of steps; all losses
    steps: list[choice.Step]

    def then(self, other: Line) -> Line:
        (a, b, c), (d, e, f) = self.cost, other.cost
        return Line((a + d, b + e, c + f), [*self.steps, *other.steps])


def cost(line: Line) -> tuple[int, int, int]:
    return line.cost


def loss(speed: Mapping[str, float], provider: str) -> float:
    """0.06 where a provider takes 1.06 times as long as the fastest."""
    return max(speed.values()) / speed[provider] - 1 if provider in speed else REFUSED


def fit(shapes: Shapes) -> list[choice.Step]:
    """The cheapest line: one for all rows, or one for narrow and wide rows apart."""
    lines = [fit_width(shapes, 1)]
    for below, width in pairwise(sorted({columns for _, columns in shapes})):
        narrow = {shape: speed for shape, speed in shapes.items() if shape[1] < width}
        wide = {shape: speed for shape, speed in shapes.items() if shape[1] >= width}
        lines.append(fit_width(narrow, 1).then(fit_width(wide, halfway(below, width))))
    return min(lines, key=cost).steps


def fit_width(shapes: Shapes, columns: int) -> Line:
    """The cheapest steps. From the smallest size on, it extends the cheapest that end in each provider."""
    sizes = sorted({rows * columns for rows, columns in shapes})
    names = [name for name in PROVIDERS if any(name in speed for speed in shapes.values())]
    ends = {"": Line((0, 0, 0), [])}
    for below, size in zip([0, *sizes], sizes):
        before, ends = ends, {}
        for name in names:
            losses = [loss(speed, name) for (r, c), speed in shapes.items() if r * c == size]
            beyond = sum(round(1e4 * max(0.0, value - TOLERATED)) for value in losses)
            # torch's own operators only where they clearly are faster
            every = sum(round(1e4 * (value + (1 / LOSS - 1 if name == "torch" else 0.0))) for value in losses)
            same = Line((beyond, 0, every), [])
            step = Line((beyond, 1, every), [choice.Step(columns, halfway(below, size), name)])
            ends[name] = min((line.then(same if name == last else step) for last, line in before.items()), key=cost)
    return min(ends.values(), key=cost)


def halfway(below: int, size: int) -> int:
    """The geometric mean of two measured sizes; 1 below the smallest."""
    return max(1, round(math.sqrt(below * size)))


def table(results: Sequence[Record], sources: Sequence[str]) -> dict[str, Any]:
    devices = {(device_key(r), r["environment"]["device"]) for r in results}
    if len(devices) != 1:
        raise ValueError(f"results of several devices: {', '.join(sorted(device for _, device in devices))}")
    lines: dict[str, dict[tuple[int, int], dict[str, float]]] = defaultdict(dict)
    for (name, rows, columns), speed in speeds(results).items():
        lines[name][rows, columns] = speed
    steps = {name: fit(shapes) for name, shapes in sorted(lines.items())}
    losses = [
        loss(speed, choice.decisive(steps[name], *shape)[0].provider)
        for name, shapes in lines.items()
        for shape, speed in shapes.items()
    ]
    worst = math.ceil(1e3 * max(losses, default=0.0)) / 1e3
    return {"device": devices.pop()[1], "source": ", ".join(sources), "worst_loss": worst, "steps": steps}


def text(made: Mapping[str, Any]) -> str:
    """JSON with an operation, element size and direction a line."""
    head = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in made.items() if name != "steps")
    body = ",\n".join(f"    {json.dumps(name)}: {json.dumps(steps)}" for name, steps in made["steps"].items())
    return f'{{\n{head},\n  "steps": {{\n{body}\n  }}\n}}\n'


def changes(made: Mapping[str, Any], path: Path) -> str:
    """A table of the lines that differ from those before."""
    before = read_result(path).get("steps", {}) if path.exists() else {}
    now = json.loads(text(made))["steps"]
    rows = [[name, str(before.get(name, "-")), str(steps)] for name, steps in now.items() if before.get(name) != steps]
    head = ["operation/bytes/direction", "columns, elements, provider before", "now"]
    return report_table.table(head, rows) if rows else "No step changes."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="raw results of one device")
    parser.add_argument("--write", action="store_true", help="renew the table in the package")
    options = parser.parse_args(argv)
    root = Path(__file__).resolve().parents[2]
    try:
        results = [read_result(path) for path in options.results]
        sources = [
            p.resolve().relative_to(root).as_posix() if root in p.resolve().parents else p.name for p in options.results
        ]
        made = table(results, sources)
    except (OSError, ValueError, KeyError) as error:
        parser.error(str(error))
    if not made["steps"]:
        print("no provider of ours was measured in these results: nothing to choose between", file=sys.stderr)
        return 1
    path = choice.FOLDER / f"{device_key(results[0])}.json"
    print(changes(made, path))
    print(f"Worst loss at a measured shape: {made['worst_loss']:.1%}")
    if options.write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text(made), encoding="utf-8")
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
