"""What a run of ``tune`` found, as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from .calls import parse
from .measure import Record, beyond
from .store import faster_forms

if TYPE_CHECKING:
    from .run import Result

MOST_ROWS = 30


def changed(records: Sequence[Record]) -> list[tuple[Record, float]]:
    """Records whose fastest provider is another than automatic choice's, with how many times as fast it is."""
    found = []
    for record in records:
        if "best" in record and record["best"] != record["prior"]:
            ratio = record["ratios"].get(record["prior"])
            found.append((record, float(ratio[0]) if ratio else float("nan")))
    return sorted(found, key=lambda pair: -_saved(pair[0]))


def _saved(record: Record) -> float:
    """Microseconds a call."""
    before = record["providers"].get(record["prior"])
    return float(before["median"] - record["providers"][record["best"]]["median"]) if before else 0.0


def summary_text(result: Result) -> str:
    """A table of what changes, what was refused, and where it is kept."""
    measured = [record for record in result.records if "best" in record]
    rows = changed(measured)
    lines = [f"{len(measured)} classes of calls were measured on {result.device} in {result.seconds:.0f} s."]
    if result.stopped:
        lines[0] += f" The run stopped early: {result.stopped}."
    if rows:
        lines += ["", f"Automatic choice changes for {len(rows)} of them:", ""]
        cells = [["class", "before", "now", "times as fast", "saved a call"]]
        for record, ratio in rows[:MOST_ROWS]:
            cells.append([record["name"], record["prior"], record["best"], f"{ratio:.2f}", f"{_saved(record):.1f} us"])
        lines += aligned(cells)
        if len(rows) > MOST_ROWS:
            lines.append(f"... and {len(rows) - MOST_ROWS} more, in the file")
        lines += ["", layer_text(measured)]
    else:
        lines += ["", "Automatic choice stays as it is: nothing else was faster beyond the spread."]
    forms = faster_forms(measured)
    if forms:
        lines += ["", "Launch configurations that change:", ""]
        cells = [["kernel", "now", "times as fast"]]
        cells += [[place, form.name, f"{form.ratio:.2f}"] for place, form in forms.items()]
        lines += aligned(cells)
    wrong = [(r["name"], who, why) for r in result.records for who, why in _rejected(r).items() if not _refusal(why)]
    if wrong:
        lines += ["", "Not timed:", *(f"  {name}: {who or 'the class'}: {why}" for name, who, why in wrong[:MOST_ROWS])]
        if len(wrong) > MOST_ROWS:
            lines.append(f"  ... and {len(wrong) - MOST_ROWS} more")
    lines += ["", f"Kept in {result.path}" if result.path else "Nothing was kept."]
    return "\n".join(lines)


def _rejected(record: Record) -> dict[str, str]:
    """Providers and forms."""
    return record["rejected"] | record.get("forms", {}).get("rejected", {})


def _refusal(why: str) -> bool:
    """Whether a provider said beforehand that it cannot take a call: nobody needs to read that."""
    return "cannot run" in why


def layer_text(records: Sequence[Record]) -> str:
    """What a training step of the measured calls saves, each class counted once."""
    both = [record for record in records if parse(record["name"]).needs_grad]
    before = after = 0.0
    for record in both:
        now = record["providers"][record["best"]]["median"]
        then = record["providers"].get(record["prior"])
        if then is None or (record["prior"] in record["ratios"] and not beyond(record["ratios"][record["prior"]])):
            then = {"median": now}
        before, after = before + then["median"], after + now
    if not both or not after:
        return "No class with gradients was measured."
    return (
        f"One call of each of the {len(both)} classes with gradients took {before / 1e3:.2f} ms and takes "
        f"{after / 1e3:.2f} ms, {before / after:.2f} times as fast."
    )


def aligned(cells: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines of a table; the columns `right` end in one line, as numbers do."""
    columns = [[*column] for column in zip(*cells, strict=True)]
    for i, column in enumerate(columns):
        width = max(map(len, column))
        columns[i] = [cell.rjust(width) if i in right else cell.ljust(width) for cell in column]
    return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
