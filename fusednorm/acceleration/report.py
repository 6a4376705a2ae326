"""What ``accelerate`` did, what it left, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

TITLES = {
    "norm": "norms",
    "modulation": "scales and shifts of norms",
    "residual": "sums with the norm after them",
    "feed_forward": "activations of linear layers",
    "attention": "attention",
    "layer": "layers of torch.nn",
}
MOST_ROWS = 60

# notes below the table
COMPILED = (
    "Under torch.compile, norms, sums and activations run torch's own operations: the compiler fuses them itself."
)
LINEARS = "linear layers compute by oneDNN, which was measured to be faster than torch's choice on this processor."
WITHOUT_FLOAT64 = "The model does not run in float64: the example's results were compared with those before alone."
WEIGHTS = "Fused attention returns no weights: output_attentions=True gives None for each layer, as with sdpa."


class Entry(NamedTuple):
    """One thing that ``accelerate`` saw.

    Attributes:
        path: of the module, as ``model.get_submodule`` takes it; "" is the model.
        kind: "norm", "modulation", "residual", "feed_forward", "attention" or "layer".
        what: the class, or the source.
        into: what it became; "" where it was left.
        reason: why it was left; "" where it was not.
    """

    path: str
    kind: str
    what: str
    into: str = ""
    reason: str = ""

    @property
    def fused(self) -> bool:
        return not self.reason


class Saving(NamedTuple):
    """What one fused sum saves in one forward of `example`, by counting the tensors that operators read and write.

    Attributes:
        path: of the norm.
        launches: how many operators fewer.
        bytes: how much less memory traffic.
    """

    path: str
    launches: int
    bytes: int


class Report:
    """What :func:`fusednorm.accelerate` did. ``print(report)`` shows a table.

    Attributes:
        entries: every :class:`Entry`.
        savings: for each fused sum that `example` reached, a :class:`Saving`.
        notes: what holds for the whole model.
        dry_run: whether nothing was changed.

    Example:
        >>> report = fusednorm.accelerate(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)))
        >>> [entry.path for entry in report.fused]
        ['1']
    """

    def __init__(self, model: str, dry_run: bool) -> None:
        self.model, self.dry_run = model, dry_run
        self.entries: list[Entry] = []
        self.savings: list[Saving] = []
        self.notes: list[str] = []
        self._sources: dict[str, dict[str, str]] = {}

    @property
    def fused(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.fused]

    @property
    def left(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.fused]

    def source(self, path: str) -> str:
        """The rewritten methods of a module.

        Raises:
            KeyError: no method of this module was rewritten; the message names those that were.
        """
        if path not in self._sources:
            known = ", ".join(map(repr, self._sources)) or "none"
            raise KeyError(f"path: no method of {path!r} was rewritten; rewritten: {known}")
        return "\n\n".join(self._sources[path].values())

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report as lists, dicts, strings and numbers."""
        return {
            "model": self.model,
            "dry_run": self.dry_run,
            "entries": [{**entry._asdict(), "fused": entry.fused} for entry in self.entries],
            "savings": [saving._asdict() for saving in self.savings],
            "notes": list(self.notes),
            "sources": {path: dict(methods) for path, methods in self._sources.items()},
        }

    def __repr__(self) -> str:
        return f"<Report on {self.model}: {len(self.fused)} fused, {len(self.left)} left>"

    def __str__(self) -> str:
        verb = "would be fused" if self.dry_run else "fused"
        lines = [f"{self.model}: {len(self.fused)} {verb}, {len(self.left)} left as they are"]
        if not self.entries:
            return lines[0] + "\nNothing here can be fused: no norm, residual sum, activation or attention was found."
        rows = [("what", "fused", "left")]
        for kind, title in TITLES.items():
            mine = [entry for entry in self.entries if entry.kind == kind]
            if mine:
                fused = sum(entry.fused for entry in mine)
                rows.append((title, str(fused), str(len(mine) - fused)))
        lines += ["", *_table(rows)]
        if self.fused:
            lines += ["", "n is how many are alike: `*` in a path stands for any number."]
            rows = [("module", "what", "into")]
            rows += [(_digits(e.path) or "(the model)", _short(e.what), e.into) for e in self.fused]
            lines += ["", *_table(_counted(rows))]
        if self.left:
            rows = [("module", "left as it is", "why")]
            rows += [(_digits(e.path) or "(the model)", _short(e.what), e.reason) for e in self.left]
            lines += ["", *_table(_counted(rows))]
        if self.savings:
            launches, size = sum(s.launches for s in self.savings), sum(s.bytes for s in self.savings)
            lines += [
                "",
                f"One forward of the example takes {launches} launches and {_bytes(size)} of memory traffic less,",
            ]
            lines.append("counting what each operator reads and writes.")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])


def _bytes(size: int) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size} {unit}"
        size = round(size / 1024)
    return f"{size} GiB"


def _digits(path: str) -> str:
    """Layers of one kind share a row: ``layers.3.norm`` is ``layers.*.norm``."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 48 else text[:45] + "..."


def _counted(rows: list[tuple[str, str, str]]) -> list[tuple[str, ...]]:
    head, *others = rows
    counts = Counter(others)
    shown = [(str(count), *row) for row, count in counts.items()]
    more = len(shown) - MOST_ROWS
    if more > 0:
        shown = [*shown[:MOST_ROWS], ("", f"... {more} more: report.entries has all", "", "")]
    return [("n", *head), *shown]


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
