"""What tune.py measured, as tables: the table's form, the best one, and where another is faster beyond the spread.

python3 -m tools.tune.report tune.json    # from raw data
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.cases import DIRECTION_TITLES
from benchmarks.report.files import read_result
from benchmarks.report.stats import Record, measured, ratio, ratio_text, seconds_text, verdict
from benchmarks.report.table import table

LEGEND = (
    "Forms of cuda: c vectors a thread, t threads of a block for one row, r rows a block, k blocks of a cluster, p "
    "blocks that visit the rows. Of triton: tiles x [rows, columns], w warps, p programs a "
    "multiprocessor. Of copy: the time of a device copy of as many bytes over the form's. Ratio: the table's time over "
    "the best form's, [..] its 95% interval."
)


class Choice(NamedTuple):
    """A provider's forms at one case. `best` is the fastest by the median of its samples, the table's own included."""

    record: Record
    provider: str
    table: str  # the variant
    table_form: str
    best: str | None
    faster: str | None  # the fastest of those that are faster than the table's beyond the spread
    tried: int
    wrong: int
    failed: int

    def against_table(self, name: str) -> tuple[float, ...] | None:
        """The table's time over that of a form."""
        return paired(self.record, name, self.table)

    def form(self, name: str) -> str:
        return "the table's" if name == self.table else name.removeprefix(f"{self.provider} ")


def paired(record: Record, name: str, over: str) -> tuple[float, float, float, float] | None:
    """The time of `over` divided by that of `name`, round by round."""
    variants = record["variants"]
    if name not in variants or over not in variants:
        return None
    return ratio({"variants": {"fused": variants[name], "eager": variants[over]}})


def choices(result: Record) -> Iterator[Choice]:
    for record in result["cases"]:
        for provider, names in record["tried"].items():
            own, times = names[0], {n: median(v["samples"]) for n, v in record["variants"].items() if n in names}
            ordered = sorted(times, key=times.__getitem__)
            pairs = {name: paired(record, name, own) for name in ordered if name != own}
            faster = [name for name, pair in pairs.items() if pair is not None and verdict(pair) == "faster"]
            statuses = Counter(r["status"] for n, r in record["rejected"].items() if n in names)
            yield Choice(
                *(record, provider, own, record["tables"][provider]),
                *(ordered[0] if ordered else None, faster[0] if faster else None),
                *(len(names), statuses["wrong"], statuses["failed"]),
            )


def share(record: Record, name: str | None) -> str:
    """Of the copy's bandwidth."""
    pair = None if name is None else paired(record, name, "copy")
    return "-" if pair is None else f"{pair[0]:.1%}"


def _row(c: Choice) -> list[str]:
    width, ratios = str(c.record["shape"][-1]), None if c.best in (None, c.table) else c.against_table(c.best)
    best = "-" if c.best is None else c.form(c.best)
    row = [width, c.provider, c.table_form, share(c.record, c.table), best, share(c.record, c.best), ratio_text(ratios)]
    return [*row, str(c.tried), str(c.wrong), str(c.failed), share(c.record, "eager")]


def tables(result: Record) -> str:
    head = ["width", "provider", "table's form", "of copy", "best form", "of copy", "ratio"]
    head += ["tried", "wrong", "failed", "eager, of copy"]
    groups: dict[tuple[str, str, str], list[list[str]]] = {}
    for c in choices(result):
        groups.setdefault((c.record["op"], c.record["direction"], c.record["dtype"]), []).append(_row(c))
    return "\n\n".join(
        f"{op}, {DIRECTION_TITLES[direction]}, {dtype}\n\n{table(head, rows)}"
        for (op, direction, dtype), rows in groups.items()
    )


def faster_text(result: Record) -> str:
    rows = []
    for c in choices(result):
        if c.faster is not None:
            times = " -> ".join(
                seconds_text(median(c.record["variants"][name]["samples"])) for name in (c.table, c.faster)
            )
            row = [c.record["name"], c.provider, c.form(c.faster), c.table_form, ratio_text(c.against_table(c.faster))]
            rows.append([*row, times])
    title = "Where another form than the table's is faster beyond the spread"
    if not rows:
        return f"{title}: nowhere in this run."
    head = ["case", "provider", "faster form", "table's form", "table's time / its time", "time"]
    return f"{title}\n\n{table(head, rows)}"


def rejected_text(result: Record) -> str:
    """The wrong ones each, the others by what they said."""
    wrong, failed = [], dict[str, list[str]]()
    for record in result["cases"]:
        if record["status"] != "measured":
            failed.setdefault(record["detail"] or "no form was right", []).append(record["name"])
        for name, r in record["rejected"].items():
            where = f"{record['name']} {name}"
            if r["status"] == "wrong":
                wrong.append(f"WRONG: {where}: {r['detail']}")
            else:
                failed.setdefault(r["detail"], []).append(where)
    lines = [f"failed, {len(names)} times, first {names[0]}: {said}" for said, names in failed.items()]
    return "\n".join(textwrap.fill(line, 120, subsequent_indent="  ") for line in [*wrong, *lines])


def left_out_text(result: Record) -> str:
    counts = Counter(result["left_out"].values())
    return "\n".join(f"Left out, {reason}: {count} cases." for reason, count in counts.items())


def headline(result: Record) -> str:
    e, m = result["environment"], result["method"]
    absent = [f"{name} is not tried: {reason}" for name, reason in result["absent"].items() if reason is not None]
    lines = [
        f"{e['device']}; torch {e['torch']}, triton {e['triton'] or 'absent'}; commit {e['commit']}, {e['date']}; "
        f"{len(measured(result))} cases in {m['seconds']:.0f} s",
        *absent,
        LEGEND,
    ]
    return "\n".join(textwrap.fill(line, 120) for line in lines)


def text(result: Record) -> str:
    parts = [headline(result), tables(result), faster_text(result), rejected_text(result), left_out_text(result)]
    return "\n\n".join(filter(None, parts))


def all_right(result: Record) -> bool:
    """Something was measured, and nothing was wrong."""
    wrong = any(r["status"] == "wrong" for record in result["cases"] for r in record["rejected"].values())
    return bool(measured(result)) and not wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a JSON file that tune.norms wrote")
    print(text(read_result(parser.parse_args(argv).result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
