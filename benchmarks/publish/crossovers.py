"""From raw results to the table that automatic choice goes by.

    python3 -m benchmarks.run --grid --provider triton --json T.json    # each provider forced in turn,
    python3 -m benchmarks.run --grid --provider cuda --json C.json      # on the same device
    python3 -m benchmarks.publish.crossovers T.json C.json                   # what would change
    python3 -m benchmarks.publish.crossovers T.json C.json --write           # fusednorm/dispatch/measured/*.json

For each operation, element size, shape and direction (`forward` for calls without gradients, `both` for those with) it
names the provider whose time, host included, is the shortest. `torch` stands for torch's own operators, but for
dropout, where they draw another mask.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import OPS
from benchmarks.report import pages as report
from benchmarks.report.files import read_result
from benchmarks.report.stats import LOSS, Record, measured, no_kernel, ratio
from fusednorm.dispatch import PROVIDERS
from fusednorm.dispatch import crossovers as choice

Key = tuple[str, int, int]  # operation, element size and direction; rows, columns
DIRECTIONS = ("forward", "both")  # what a call is asked for; no call is a backward alone


def device_key(result: Record) -> str:
    """As `fusednorm.dispatch.crossovers.device_key` names the device."""
    environment = result["environment"]
    if environment["device_type"] == "cpu":
        if not environment.get("shortcut"):
            return "cpu_without_shortcut"
        return "cpu_amd" if environment.get("vendor") == "amd" else "cpu"
    if environment["device_type"] != "cuda":
        return environment["device_type"]
    return "sm_" + environment["capability"].replace(".", "")


def speeds(results: Sequence[Record]) -> dict[Key, dict[str, float]]:
    """Eager's time over that of each provider; 1 for torch's own operators."""
    found: dict[Key, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        for record in measured(result):
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


def agreed(value: tuple[float, float, float, float]) -> float:
    """The ratio that the median of the pairs and the fastest samples both reach, on whichever side of 1; 1 if on two.

    A stumble of the machine that lasts for a case (a thread that was given no core) is in the median alone.
    """
    middle, fastest = value[0], value[3]
    if min(middle, fastest) > 1.0:
        return min(middle, fastest)
    return max(middle, fastest) if max(middle, fastest) < 1.0 else 1.0


def decide(providers: Mapping[str, float]) -> tuple[str, float]:
    """The fastest, and how many times faster than the next; torch's own operators only where they clearly are."""
    order = list(PROVIDERS)

    def rank(name: str) -> tuple[float, int]:
        return (providers[name] * (LOSS if name == "torch" else 1.0), -order.index(name))

    first, *others = sorted(providers, key=rank, reverse=True)
    return first, providers[first] / max(providers[name] for name in others) if others else 1.0


def table(results: Sequence[Record], sources: Sequence[str]) -> dict[str, Any]:
    devices = {(device_key(r), r["environment"]["device"]) for r in results}
    if len(devices) != 1:
        raise ValueError(f"results of several devices: {', '.join(sorted(device for _, device in devices))}")
    shapes: dict[str, list[list[Any]]] = defaultdict(list)
    for (name, rows, columns), providers in sorted(speeds(results).items()):
        provider, times = decide(providers)
        shapes[name].append([rows, columns, provider, round(times, 2)])
    return {"device": devices.pop()[1], "source": ", ".join(sources), "shapes": dict(shapes)}


def text(made: Mapping[str, Any]) -> str:
    """JSON with a shape a line."""
    lines = [
        f'  "device": {json.dumps(made["device"])},',
        f'  "source": {json.dumps(made["source"])},',
        '  "shapes": {',
    ]
    groups = []
    for name, entries in made["shapes"].items():
        body = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
        groups.append(f"    {json.dumps(name)}: [\n{body}\n    ]")
    return "{\n" + "\n".join(lines) + "\n" + ",\n".join(groups) + "\n  }\n}\n"


def changes(made: Mapping[str, Any], path: Path) -> str:
    """A table of the shapes whose provider is another than before."""
    before = read_result(path)["shapes"] if path.exists() else {}
    rows = []
    for name, entries in made["shapes"].items():
        old = {(r, c): provider for r, c, provider, _ in before.get(name, [])}
        for r, c, provider, times in entries:
            if old.get((r, c)) != provider:
                rows.append([name, f"{r}x{c}", old.get((r, c), "-"), provider, f"{times:.2f}"])
    head = ["operation/bytes/direction", "rows x columns", "before", "now", "times as fast as the next"]
    return report.table(head, rows) if rows else "No shape changes its provider."


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
    if not made["shapes"]:
        print("no provider of ours was measured in these results: nothing to choose between", file=sys.stderr)
        return 1
    path = choice.FOLDER / f"{device_key(results[0])}.json"
    print(changes(made, path))
    if options.write:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text(made), encoding="utf-8")
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
