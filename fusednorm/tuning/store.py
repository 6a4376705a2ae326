"""The user's file of one device: written whole or not at all, and merged where several processes measure at once."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..dispatch import crossovers, rules, tuned
from .calls import parse
from .fit import fit
from .measure import Record, beyond

PATIENCE = 30.0  # seconds to wait for another process that writes
FEWEST = 3  # measured shapes of a line, from which on others between and beyond them are decided too


class CannotWrite(Exception):
    """Why a file could not be written, with the remedy."""


def save(device: torch.device, records: Sequence[Record], path: Path | None = None) -> Path:
    """Merge what was measured into the device's file, and let automatic choice read it anew.

    A class that was measured before is replaced. What was measured with other versions or hardware is dropped.

    Raises:
        CannotWrite: the folder or the disk does not take it. The file is as it was.
    """
    path = path or tuned.path_of(device)
    machine = tuned.machine(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            before = {record["name"]: record for record in _kept(path, machine)}
            measured = {record["name"]: record for record in records if "best" in record}
            merged = before | {name: _with_forms(record, before.get(name)) for name, record in measured.items()}
            _replace(path, text(content(device, machine, list(merged.values()))))
    except OSError as fault:
        raise CannotWrite(
            f"{path} cannot be written ({fault.strerror or fault}); set {tuned.FOLDER_VARIABLE} to a folder of yours, "
            "or make room there"
        ) from None
    rules.forget()
    return path


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    import filelock

    try:
        with filelock.FileLock(f"{path}.lock", timeout=PATIENCE):
            yield
    except filelock.Timeout:
        raise OSError(f"another process has held {path}.lock for {PATIENCE:g} s") from None


def _kept(path: Path, machine: Mapping[str, Any]) -> list[Record]:
    """The records of a file of the same machine; none of any other file."""
    try:
        tuned.read(path, dict(machine))
    except (FileNotFoundError, tuned.Unusable):
        return []
    records: list[Record] = json.loads(path.read_text(encoding="utf-8"))["records"]
    return records


def _with_forms(record: Record, before: Record | None) -> Record:
    """A record, with the forms that an earlier run tried where this one did not, and the provider is the same."""
    if before is None or "forms" in record or "forms" not in before or before["best"] != record["best"]:
        return record
    return {**record, "forms": before["forms"]}


def _replace(path: Path, content: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def content(device: torch.device, machine: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """What a file holds."""
    steps, points = summary(records)
    return {
        "format": tuned.FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": dict(machine),
        "key": crossovers.device_key(device),
        "steps": steps,
        "points": points,
        "forms": {place: list(form.numbers) for place, form in faster_forms(records).items()},
        "records": list(records),
    }


def summary(records: Sequence[Record]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(steps by line, points by line) of records; of two dtypes of one size, the one that gains less decides."""
    points: dict[str, dict[tuple[int, int], list[Any]]] = defaultdict(dict)
    for record in records:
        of = parse(record["name"])
        ratio = min((value[0] for value in record["ratios"].values()), default=1.0)
        point = [*of.place, record["best"], round(max(ratio, 1.0), 3), *record["providers"]]
        before = points[of.line].get(of.place)
        if before is None or point[3] < before[3]:
            points[of.line][of.place] = point
    lines = {name: shapes for name, shapes in sorted(speeds(records).items()) if len(shapes) >= FEWEST}
    steps = {name: [list(step) for step in fit(shapes)] for name, shapes in lines.items()}
    return steps, {name: list(found.values()) for name, found in sorted(points.items())}


class Faster(NamedTuple):
    """A form that takes the place of the table's."""

    name: str
    numbers: tuple[int, ...]
    ratio: float  # the table's time over its own, the geometric mean of the classes that tried it


def faster_forms(records: Sequence[Record]) -> dict[str, Faster]:
    """By place, the form that is faster than the table's beyond the spread in a class, and slower in none.

    Rows of a place are of several classes: other numbers of rows, and other operations.
    """
    tried: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.get("forms", {}).get("tried"):
            tried[record["forms"]["place"]].append(record["forms"])
    found = {}
    for place, classes in sorted(tried.items()):
        common = [name for name, entry in classes[0]["tried"].items() if entry["numbers"]]
        common = [name for name in common if all(name in of["tried"] for of in classes)]
        faster = []
        for name in common:
            ratios = [of["tried"][name]["ratio"] for of in classes]
            slower = any(beyond([1 / ratio, 1 / high, 1 / low]) for ratio, low, high in ratios)
            if not slower and any(map(beyond, ratios)):
                mean = math.prod(ratio for ratio, *_ in ratios) ** (1 / len(ratios))
                faster.append(Faster(name, tuple(classes[0]["tried"][name]["numbers"]), mean))
        if faster:
            found[place] = max(faster, key=lambda form: form.ratio)
    return found


def speeds(records: Sequence[Record]) -> dict[str, dict[tuple[int, int], dict[str, float]]]:
    """By line and place, the fastest provider's time over that of each; of two dtypes of one size, the worse."""
    found: dict[str, dict[tuple[int, int], dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        of = parse(record["name"])
        known = found[of.line][of.place]
        for name in record["providers"]:
            speed = 1.0 / _time(record, name)
            known[name] = min(known.get(name, speed), speed)
    return found


def _time(record: Record, name: str) -> float:
    """Of a provider, over the fastest one's; a difference within the spread is none."""
    ratio = record["ratios"].get(name)
    return 1.0 if ratio is None or ratio[1] <= 1.0 else float(ratio[0])


def text(made: Mapping[str, Any]) -> str:
    """JSON with a line of steps, a line of points and a record a row."""

    def rows(value: Any) -> str:
        if isinstance(value, dict):
            return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
        if isinstance(value, list):
            return "[\n" + ",\n".join(f"  {json.dumps(v)}" for v in value) + "\n ]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {rows(value)}" for name, value in made.items()) + "\n}\n"
