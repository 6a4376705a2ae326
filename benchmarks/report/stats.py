"""What the records of a run amount to, figure by figure, and how figures are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any

from benchmarks.cases import OPS
from benchmarks.measure import median_interval
from fusednorm.tuning import load as measure_load

LOSS = 0.98  # a ratio whose whole interval lies below counts as a loss; nearer to 1 is no difference
BELIEVABLE = 2.0  # a cache may beat the copy of the same bytes; by more, the copy or the matmul was disturbed
AUTOMATIC = "automatic choice"  # of the provider
PLAIN = "torch's own operators"  # how `fusednorm.explain` begins where no kernel of ours serves a call
NO_KERNEL = (
    "No kernel of ours ran here: torch's own operators served every call, so this compares torch with torch and shows "
    "that automatic choice costs nothing but microseconds a call (and its reproducible mask under dropout); "
    "`--provider reference` or a GPU shows the fused ops."
)
Record = Mapping[str, Any]


def ratio(record: Record, baseline: str = "eager", key: str = "samples") -> tuple[float, float, float, float] | None:
    """Baseline's time over ours; above 1 we are faster: median of the pairs, its interval, that of the fastest samples.

    What else runs on the machine only adds time, so a difference counts only where the fastest samples show it too.
    """
    ours, theirs = (record["variants"].get(name, {}).get(key) for name in ("fused", baseline))
    if not ours or not theirs:
        return None
    pairs = [b / a for a, b in zip(ours, theirs)]
    return (median(pairs), *median_interval(pairs), min(theirs) / min(ours))


def measured(result: Record) -> list[Record]:
    return [record for record in result["cases"] if record["status"] == "measured"]


def roofline_fraction(record: Record, variant: str = "fused") -> float:
    return record["roofline_seconds"] / median(record["variants"][variant]["samples"])


def believable(record: Record, variant: str = "fused") -> bool:
    return roofline_fraction(record, variant) <= BELIEVABLE


def fraction_text(record: Record, variant: str = "fused") -> str:
    mark = "" if believable(record, variant) else " (not believable)"
    return f"{roofline_fraction(record, variant):.0%}{mark}"


@dataclass(frozen=True)
class Group:
    """The measured cases of one operation, direction and dtype: eager's time over ours, shares of the roofline."""

    op: str
    direction: str
    dtype: str
    cases: int
    ratios: Sequence[float]
    fractions: Sequence[float]  # the believable ones

    @property
    def mean(self) -> float:
        return geometric_mean(self.ratios)

    @property
    def fraction(self) -> float | None:
        return median(self.fractions) if self.fractions else None


def directions_and_dtypes(result: Record) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["direction"], r["dtype"]) for r in result["cases"]))


def groups(result: Record) -> list[Group]:
    found = []
    for op in OPS:
        for direction, dtype in directions_and_dtypes(result):
            chosen = [r for r in measured(result) if (r["op"], r["direction"], r["dtype"]) == (op, direction, dtype)]
            ratios = [value[0] for r in chosen if (value := ratio(r)) is not None]
            if ratios:
                fractions = [roofline_fraction(r) for r in chosen if believable(r)]
                found.append(Group(op, direction, dtype, len(chosen), ratios, fractions))
    return found


def groups_by_key(result: Record) -> dict[tuple[str, str, str], Group]:
    """By operation, direction and dtype."""
    return {(g.op, g.direction, g.dtype): g for g in groups(result)}


def verdict(value: tuple[float, ...]) -> str:
    """What a ratio says: a difference is one that the whole interval and the fastest samples show."""
    if max(value[2:]) < LOSS:
        return "slower"
    return "faster" if min(value[1], value[3]) > 1 / LOSS else "equal within the spread"


def losses(result: Record) -> list[tuple[Record, str, str, tuple[float, ...]]]:
    """(record, baseline, which time, ratio) of every measured loss, worst first."""
    found = []
    for record in measured(result):
        for baseline in record["variants"]:
            for key, what in (("samples", result["method"]["timer"]), ("inclusive", "host included, L2 warm")):
                value = None if baseline == "fused" else ratio(record, baseline, key)
                if value is not None and verdict(value) == "slower":
                    found.append((record, baseline, what, value))
    return sorted(found, key=lambda loss: loss[3][0])


def no_kernel(records: Sequence[Record]) -> bool:
    """Whether torch's own operators stood on both sides of every comparison."""
    return bool(records) and all(r["how"].startswith(PLAIN) for r in records)


def served(records: Iterable[Record]) -> str:
    """Who served "fused", and how, in a few words."""
    counts = Counter((r["provider"], r["how"]) for r in records)
    parts = []
    for (provider, how), count in counts.most_common():
        what, _, why = how.partition(": ")
        parts.append(f"{provider}, {what}" + (f" ({why})" if why else ""))
        parts[-1] += f" in {count} cases" if len(counts) > 1 else ""
    return "; ".join(parts)


def busy(result: Record) -> bool:
    return busy_text(result) is not None


def busy_text(result: Record) -> str | None:
    """A warning where other processes took much of the CPU that was measured; a GPU's figures do not hang on it."""
    on_cpu = result["environment"]["device_type"] == "cpu"
    return measure_load.warning(result["method"].get("others")) if on_cpu else None


# --- how figures are written ---


def seconds_text(value: float) -> str:
    unit, factor = ("s", 1.0) if value >= 1 else ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    return f"{value * factor:.3g} {unit}" if value < 1000 else f"{value:.0f} s"


def bytes_text(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"


def ratio_text(value: tuple[float, ...] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"
