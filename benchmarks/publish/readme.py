"""Write the README's figures from the committed raw data: nobody types them.

python3 -m benchmarks.publish.readme            # README.md
python3 -m benchmarks.publish.readme --check    # exit status 1 where it does not follow the data
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import DIRECTION_TITLES
from benchmarks.publish import add_result
from benchmarks.report.files import renew
from benchmarks.report.pages import table
from benchmarks.report.stats import NO_KERNEL, Group, Record, groups, losses, measured, no_kernel, ratio

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
NOTE = "<!-- written by benchmarks/publish/readme.py from benchmarks/results: do not edit -->"
NO_GPU = """No GPU figures exist yet: no result of a GPU is among the raw data. With one, these commands make them:

- `python -m benchmarks.run --report bench-report` measures,
- `python -m benchmarks.publish.add_result bench-report/benchmark.json` puts the raw data where they are committed,
- `python -m benchmarks.publish.readme` writes the figures here."""
LEGEND = (
    "Eager's time over ours, above 1 we are faster: geometric mean over the sizes [worst to best], and the median "
    "share of the roofline (a device copy of the bytes that must move); the newest result of each device."
)


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def facts(result: Record) -> str:
    """Device, driver and versions."""
    e = result["environment"]
    driver = (result["method"].get("clocks before") or {}).get("driver_version")
    versions = [f"driver {driver}" if driver else "", f"CUDA {e['cuda']}" if e.get("cuda") else ""]
    versions += [f"torch {e['torch']}", f"triton {e['triton']}" if e["triton"] else "", f"Python {e['python']}"]
    threads = f"{result['method']['threads']} threads" if e["device_type"] == "cpu" else ""
    return ", ".join(filter(None, [f"**{e['device']}**", threads, *versions]))


def cell(group: Group | None) -> str:
    if group is None:
        return ""
    share = "" if group.fraction is None else f", {group.fraction:.0%}"
    return f"{group.mean:.2f} [{min(group.ratios):.2f} to {max(group.ratios):.2f}]{share}"


def figures(result: Record) -> str:
    """Operations and directions down, dtypes across."""
    found = {(g.op, g.direction, g.dtype): g for g in groups(result)}
    dtypes = list(dict.fromkeys(dtype for _, _, dtype in found))
    rows = [
        [f"`{op}`, {DIRECTION_TITLES[direction]}", *(cell(found.get((op, direction, dtype))) for dtype in dtypes)]
        for op, direction in dict.fromkeys((op, direction) for op, direction, _ in found)
    ]
    return table(["", *dtypes], rows)


def where_we_lose(result: Record) -> str:
    found = losses(result)
    baselines = {name for r in measured(result) for name in r["variants"] if name != "fused"}
    compared = sum(
        ratio(r, name, key) is not None
        for r in measured(result)
        for name in baselines
        for key in ("samples", "inclusive")
    )
    if not found:
        return f"Where we lose: in none of {compared} comparisons, beyond the spread."
    record, baseline, what, value = found[0]
    return (
        f"Where we lose: in {len(found)} of {compared} comparisons, beyond the spread. Worst: `{record['name']}`, "
        f"{1 / value[0]:.2f} times as long as {baseline} ({what})."
    )


def section(path: Path, result: Record, root: Path) -> str:
    e, m = result["environment"], result["method"]
    where = path.relative_to(root).as_posix()
    cases = f"{len(measured(result))} cases of the {m['level']} sweep, {len(result['left_out'])} left out"
    origin = f"{facts(result)}; {e['date'][:10]}, commit `{e['commit']}`; {cases}, [raw data]({where})."
    origin += f" {NO_KERNEL}" if no_kernel(measured(result)) else ""
    return "\n\n".join([wrapped(origin), figures(result), wrapped(where_we_lose(result))])


def block(kept: Sequence[tuple[Path, Record]], root: Path = README.parent) -> str:
    """What stands between the two marks."""
    parts = [NOTE]
    if all(result["environment"]["device_type"] == "cpu" for _, result in kept):
        parts.append(NO_GPU)
    if kept:
        parts.append(wrapped(LEGEND))
    parts += [section(path, result, root) for path, result in kept]
    return "\n\n".join(parts)


def replaced(text: str, new: str) -> str:
    """The text with another block between the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{BEGIN} and {END} are not both there")
    return f"{before}{begin}\n{new}\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if there is a difference")
    arguments = parser.parse_args(argv)
    text = replaced(README.read_text(encoding="utf-8"), block(add_result.newest()))
    return renew(README, text, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
