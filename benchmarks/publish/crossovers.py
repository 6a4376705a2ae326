"""From raw results to the table that automatic choice goes by.

    python3 -m benchmarks.run --grid --provider triton --json T.json    # each provider forced in turn,
    python3 -m benchmarks.run --grid --provider cuda --json C.json      # on the same device
    fusednorm tune                                                           # or all in one, without a sweep
    python3 -m benchmarks.publish.crossovers ~/.cache/fusednorm/cpu-NAME.json
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
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import OPS
from benchmarks.report import table as report_table
from benchmarks.report.files import read_result
from benchmarks.report.stats import Record, measured, no_kernel, ratio
from fusednorm.dispatch import crossovers as choice
from fusednorm.tuning import store
from fusednorm.tuning.calls import parse
from fusednorm.tuning.fit import Shapes, fit, loss

Key = tuple[str, int, int]  # operation, element size and direction; rows, columns
STUMBLE = 4.0  # where eager takes over four times as long as at a larger shape, the machine was disturbed
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


def is_tuned(result: Record) -> bool:
    """Whether a file is one of `fusednorm tune`."""
    return "records" in result and "machine" in result


def tuned_table(result: Record, source: str) -> dict[str, Any]:
    """The table of a device from a file of `fusednorm tune`, by the steps that it fitted for itself."""
    return finished(store.speeds(records_of(result)), result["machine"]["device"], source)


def records_of(result: Record) -> list[Record]:
    """Of a file of `fusednorm tune`, all but attention, whose rules look at more than a line has."""
    return [record for record in result["records"] if not parse(record["name"]).is_attention]


def speeds(results: Sequence[Record]) -> dict[Key, dict[str, float]]:
    """Eager's time over that of each provider; 1 for torch's own operators."""
    found: dict[Key, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        for record in without_stumbles(measured(result)):
            if OPS[record["op"]].family in ("attention", "layer", "adaptive"):  # chosen by what a call means
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


def table(results: Sequence[Record], sources: Sequence[str]) -> dict[str, Any]:
    devices = {(device_key(r), r["environment"]["device"]) for r in results}
    if len(devices) != 1:
        raise ValueError(f"results of several devices: {', '.join(sorted(device for _, device in devices))}")
    lines: dict[str, dict[tuple[int, int], dict[str, float]]] = defaultdict(dict)
    for (name, rows, columns), speed in speeds(results).items():
        lines[name][rows, columns] = speed
    return finished(lines, devices.pop()[1], ", ".join(sources))


def finished(lines: Mapping[str, Shapes], device: str, source: str) -> dict[str, Any]:
    """The content of a table, with its largest loss at a measured shape."""
    steps = {name: fit(shapes) for name, shapes in sorted(lines.items())}
    losses = [
        loss(speed, choice.decisive(steps[name], *shape)[0].provider)
        for name, shapes in lines.items()
        for shape, speed in shapes.items()
    ]
    worst = math.ceil(1e3 * max(losses, default=0.0)) / 1e3
    return {"device": device, "source": source, "worst_loss": worst, "steps": steps}


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
        kinds = {*map(is_tuned, results)}
        if kinds == {True}:
            if len(results) > 1:
                raise ValueError("expected one file of `fusednorm tune`: it merges what is measured on a device")
            made, key = tuned_table(results[0], sources[0]), results[0]["key"]
        elif True in kinds:
            raise ValueError("a file of `fusednorm tune` beside results of benchmarks.run")
        else:
            made, key = table(results, sources), device_key(results[0])
    except (OSError, ValueError, KeyError) as error:
        parser.error(str(error))
    if not made["steps"]:
        print("no provider of ours was measured in these results: nothing to choose between", file=sys.stderr)
        return 1
    path = choice.FOLDER / f"{key}.json"
    print(changes(made, path))
    print(f"Worst loss at a measured shape: {made['worst_loss']:.1%}")
    if options.write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text(made), encoding="utf-8")
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
