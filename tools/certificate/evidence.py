"""What the committed record of a run says of each cell."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.certificate.cells import KINDS, OPERATORS, PROPERTIES, PROVIDERS, REASONS, reasons_of

DATA = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
RECORDS = ("certificate.json", "certificate-gpu.json")  # the second one is written on a machine with a GPU
STRENGTH = tuple(KINDS)


class Key(NamedTuple):
    op: str
    provider: str
    property: str


class Cell(NamedTuple):
    """What there is for a cell: for each kind the test with most cases that passed, a test that waits for a GPU, why
    every other test was skipped, and the reasons of the table."""

    proofs: Mapping[str, str]  # kind: test
    waiting: str | None
    skipped: str | None
    reasons: Sequence[str]

    @property
    def strongest(self) -> str | None:
        return next((kind for kind in STRENGTH if kind in self.proofs), None)

    @property
    def reason(self) -> str | None:
        """Why nothing is proved; None where something is, or a test waits for a GPU."""
        if self.proofs or self.waiting:
            return None
        return self.reasons[0] if self.reasons else self.skipped


def records() -> list[dict[str, Any]]:
    """Of the runs that are committed."""
    return [json.loads((DATA / name).read_text(encoding="utf-8")) for name in RECORDS if (DATA / name).exists()]


def dumped(record: Mapping[str, Any]) -> str:
    """JSON with a line for each entry, for a change of one test to be a change of few lines."""
    head = ",\n".join(f"{json.dumps(name)}: {json.dumps(record[name])}" for name in ("environment", "passed", "failed"))
    tests = [
        f"{json.dumps(test)}: [\n" + ",\n".join(map(json.dumps, entries)) + "\n]"
        for test, entries in sorted(record["tests"].items())
    ]
    return f'{{\n{head},\n"tests": {{\n' + ",\n".join(tests) + "\n}\n}\n"


def merged(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The entries of each test, of all runs."""
    tests: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        for test, entries in run["tests"].items():
            tests[test] += entries
    return dict(sorted(tests.items()))


def keys() -> Iterator[Key]:
    for op in OPERATORS:
        for provider in PROVIDERS:
            for name in PROPERTIES:
                yield Key(op, provider, name)


def cells(tests: Mapping[str, list[dict[str, Any]]]) -> dict[Key, Cell]:
    cases: dict[Key, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    skips: dict[Key, Counter[str]] = defaultdict(Counter)
    waiting: dict[Key, str] = {}
    for test, entries in tests.items():
        for entry in entries:
            key = Key(entry["op"], entry["provider"], entry["property"])
            if entry["passed"]:
                cases[key][entry["on"]][test] += entry["passed"]
            elif entry["on"] == "GPU":
                waiting[key] = test
            else:
                skips[key].update(entry["skipped"])
    return {
        key: Cell(
            {kind: _most(cases[key][kind]) for kind in STRENGTH if cases[key][kind]},
            None if cases[key]["GPU"] else waiting.get(key),
            _said(skips[key]) if skips[key] else None,
            reasons_of(*key),
        )
        for key in keys()
    }


def _said(skips: Counter[str]) -> str:
    """The most frequent; that a provider does not take the form of one test says less than any other reason."""
    own = Counter({said: n for said, n in skips.items() if not said.startswith("provider ")})
    return _most(own or skips)


def _most(counted: Counter[str]) -> str:
    """The most frequent; of several the first by name."""
    return min(counted, key=lambda name: (-counted[name], name))


def faults(found: Mapping[Key, Cell]) -> list[str]:
    """Cells that nothing explains, and reasons that are not needed, or are too many, for a cell."""
    said = []
    for key, cell in found.items():
        where = f"{key.op} by {key.provider}, {key.property}"
        if cell.reasons and (cell.proofs or cell.waiting or cell.skipped):
            said.append(f"{where}: there is a test, and a reason why there is none")
        if len(cell.reasons) > 1:
            said.append(f"{where}: {len(cell.reasons)} reasons")
        if not (cell.proofs or cell.waiting or cell.reason):
            said.append(f"{where}: neither a test nor a reason")
    used = {reason for cell in found.values() for reason in cell.reasons}
    return said + [f"no cell has the reason {r.text!r}" for r in REASONS if r.text not in used]


def dtypes(tests: Mapping[str, list[dict[str, Any]]]) -> dict[tuple[str, str], list[str]]:
    """By operator and provider: those in which forward and backward were computed."""
    of: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for entries in tests.values():
        for entry in entries:
            if entry["passed"] and entry["on"] not in ("stand-in", "compiled"):
                of[entry["op"], entry["provider"], entry["property"]] |= {*entry["dtypes"]}
    names = ("float64", "float32", "bfloat16", "float16")
    return {
        (op, provider): [n for n in names if n in of[op, provider, "forward"] & of[op, provider, "backward"]]
        for op in OPERATORS
        for provider in PROVIDERS
    }
