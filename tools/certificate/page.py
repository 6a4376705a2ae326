"""docs/certificate.md, from the committed record of a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.certificate import evidence
from tools.certificate.cells import FAMILIES, KINDS, NEVER_RUN, NOT_APPLICABLE, PROPERTIES, PROVIDERS
from tools.certificate.evidence import Cell, Key

PAGE = Path(__file__).resolve().parents[2] / "docs" / "certificate.md"
SHORT = {"float64": "64", "float32": "32", "bfloat16": "b16", "float16": "16"}
HEADER = """<!-- written by `make certificate` from benchmarks/results/certificate.json: do not edit -->

# What is proved, and by which test

A cell says on what an operator was tested with a provider. It links to a test that passed.
The number finds the test's name [below](#tests). Skipped tests prove nothing.
[Which code runs](providers.md) says which provider runs on your device.

{runs}
Renew the page with `make certificate`. On a machine with a GPU, the same tests run on the GPU.

"""
RUN = (
    "Run of {date} on {device}, Python {python}, torch {torch}, Triton {triton}: "
    "{passed} cases passed, {failed} failed."
)
NOTES = """- `modulation` is `add_layer_norm` with `gate`, `scale` and `shift`.
- *dtypes* has the types in which forward and backward were computed: float64, float32, bfloat16 and float16.
- In a double backward, the provider's kernels run forward and backward. Torch's operators differentiate that.

"""


class Links:
    """Tests by number, in the order of their names."""

    def __init__(self, tests: Mapping[str, Any]) -> None:
        self.numbers = {test: n for n, test in enumerate(tests, start=1)}

    def to(self, symbol: str, test: str) -> str:
        path, name = test.split("::")[0], test.split("::")[-1]
        return f'[{symbol}{self.numbers[test]}](../{path} "{name}")'


class Letters:
    """Reasons by letter, in the order in which the cells name them."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def to(self, reason: str) -> str:
        return self.of.setdefault(reason, chr(ord("a") + len(self.of)))


def state(cell: Cell) -> str:
    """What a cell is counted as: its strongest kind, else why it has none."""
    return cell.strongest or ("never run" if cell.waiting else "not applicable")


def text(cell: Cell, links: Links, letters: Letters) -> str:
    if cell.reason is not None:
        return f"{NOT_APPLICABLE[0]}{letters.to(cell.reason)}"
    shown = [links.to(KINDS[kind][0], test) for kind, test in cell.proofs.items()]
    return " ".join(shown + ([links.to(NEVER_RUN[0], cell.waiting)] if cell.waiting else []))


def totals(cells: Mapping[Key, Cell]) -> str:
    """How many cells of each provider are proved, each counted by its strongest kind."""
    columns = {
        "on a GPU": ("GPU",),
        "on a CPU": ("CPU",),
        "in the interpreter or emulation": ("interpreter", "emulation"),
        "by torch's operators": ("formulas",),
        "launched on a stand-in, or compiled": ("stand-in", "compiled"),
        "needs a GPU, never run": ("never run",),
        "does not apply, or is not offered": ("not applicable",),
    }
    counted = {
        provider: Counter(state(c) for key, c in cells.items() if key.provider == provider) for provider in PROVIDERS
    }
    counted["all"] = Counter(map(state, cells.values()))
    lines = [f"| provider | {' | '.join(columns)} | cells |\n", "|---" + "|--:" * (len(columns) + 1) + "|\n"]
    for name, found in counted.items():
        figures = [sum(found[kind] for kind in kinds) for kinds in columns.values()]
        assert sum(figures) == found.total(), name
        lines.append(f"| {name} | {' | '.join(map(str, figures))} | {found.total()} |\n")
    return "".join(lines) + "\n"


def legend() -> str:
    symbols = [f"- **{symbol}**: {said}.\n" for symbol, said in (*KINDS.values(), NEVER_RUN, NOT_APPLICABLE)]
    meanings = [f"- *{name}*: {said}.\n" for name, said in PROPERTIES.items()]
    head = "What a passing test of a column shows, where its letter is not S or P:"
    return f"## How to read it\n\n{''.join(symbols)}{NOTES}{head}\n\n{''.join(meanings)}\n"


def tables(found: Mapping[str, Any], cells: Mapping[Key, Cell], links: Links, letters: Letters) -> str:
    dtypes, parts = evidence.dtypes(found), []
    for family, ops in FAMILIES.items():
        head = f"| operator | provider | dtypes | {' | '.join(PROPERTIES)} |\n"
        rows, alike = [], []
        for op in ops:
            for provider in PROVIDERS:
                row = [cells[Key(op, provider, name)] for name in PROPERTIES]
                if row[0].reason is not None and len({cell.reason for cell in row}) == 1:
                    alike.append(f"`{op}` by `{provider}`, all columns: {row[0].reason}\n")
                    continue
                shown = " | ".join(text(cell, links, letters) for cell in row)
                known = " ".join(SHORT[dtype] for dtype in dtypes[op, provider])
                rows.append(f"| `{op}` | `{provider}` | {known or 'bool'} | {shown} |\n")
        rule = "|---" * 3 + "|:-:" * len(PROPERTIES) + "|\n"
        parts.append(f"## {family}\n\n{head}{rule}{''.join(rows)}\n{''.join(alike)}" + ("\n" if alike else ""))
    return "".join(parts)


def reasons(letters: Letters) -> str:
    lines = [f"- **{letter}**: {reason[0].upper()}{reason[1:].rstrip('.')}.\n" for reason, letter in letters.of.items()]
    return f"## Why a cell has no test\n\n{''.join(lines)}\n"


def tests(found: Mapping[str, Any], links: Links) -> str:
    """Every marked test with its number and how many cases of it passed."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for test in links.numbers:
        path, _, name = test.partition("::")
        # a case that proves several properties has an entry for each
        passed = max(sum(e["passed"] for e in found[test] if e["property"] == p) for p in PROPERTIES)
        by_file[path].append(f"{links.numbers[test]} `{name.rpartition('::')[2]}` ({passed})")
    lines = [f"- [{path.removeprefix('tests/')}](../{path}): {', '.join(names)}\n" for path, names in by_file.items()]
    return f"## Tests\n\nIn brackets: how many cases passed.\n\n{''.join(lines)}"


def page(records: Sequence[Mapping[str, Any]]) -> str:
    found = evidence.merged(records)
    cells, links, letters = evidence.cells(found), Links(found), Letters()
    runs = "\n".join(
        RUN.format(**record["environment"], passed=record["passed"], failed=len(record["failed"])) for record in records
    )
    body = tables(found, cells, links, letters)
    return HEADER.format(runs=runs) + totals(cells) + legend() + body + reasons(letters) + tests(found, links)
