"""Keep a result among the committed raw data, from which the README's figures are made.

    python3 -m benchmarks.run --report bench-report        # on a machine that does nothing else
    python3 -m benchmarks.publish.add_result bench-report/benchmark.json # to benchmarks/results/DEVICE/DATE-COMMIT.json
    python3 -m benchmarks.publish.readme                           # README.md follows

Every sample stays, as it was measured; only where the file would exceed 2 MB are times rounded to four digits, and
then its "method" says so. A result that cannot stand as evidence is refused.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.report.files import read_result
from benchmarks.report.stats import AUTOMATIC, Record, busy_text, measured

RESULTS = Path(__file__).resolve().parents[1] / "results"
LARGEST = 2_000_000  # bytes of a file in the repository
TIMES = ("samples", "inclusive")


def refusals(result: Record) -> list[str]:
    """Why the figures are no evidence."""
    reasons = [busy_text(result) or ""]
    reasons += [f"{r['name']}: {r['status'].upper()}" for r in result["cases"] if r["status"] in ("wrong", "failed")]
    reasons += [] if measured(result) else ["no case was measured"]
    # a grid serves the table of automatic choice, in which each shape stands for itself
    if (only := result["method"]["only"]) and result["method"]["level"] != "grid":
        reasons.append(f"only the cases that match {only!r} were measured: figures of some say nothing of all")
    return list(filter(None, reasons))


def unclear_origin(result: Record) -> str | None:
    """Why nobody can tell which code was measured, or None where the commit says it."""
    commit = result["environment"]["commit"]
    if commit is None:
        return "the commit that was measured is unknown"
    return f"the code measured is in no commit ({commit})" if commit.endswith("+changes") else None


def slug(device: str) -> str:
    """NVIDIA H200 -> nvidia-h200; Intel(R) Xeon(R) Processor @ 2.50GHz -> intel-xeon-processor-2.50ghz."""
    plain = re.sub(r"\((r|tm|c)\)", " ", device.lower())
    return re.sub(r"[^a-z0-9.]+", "-", plain).strip("-.") or "unknown"


def place(result: Record, folder: Path) -> Path:
    e = result["environment"]
    asked_for = f"-{forced}" if (forced := provider_asked_for(result)) else ""
    asked_for += "-targets" if of_targets(result) else ""
    asked_for += "" if on_every_core(result) else f"-{threads(result)}"
    return folder / slug(e["device"]) / f"{e['date'][:10]}-{e['commit'] or 'unknown'}{asked_for}.json"


def on_every_core(result: Record) -> bool:
    """Whether the threads of a CPU were as many as its cores, as they are where a user asks for nothing."""
    m = result["method"]
    return result["environment"]["device_type"] != "cpu" or m["threads"] == m["cores"]


def threads(result: Record) -> str:
    n = result["method"]["threads"]
    return f"{n}-thread{'s' * (n != 1)}"


def device_and_threads(result: Record) -> str:
    e = result["environment"]
    return e["device"] + (f", {threads(result).replace('-', ' ')}" if e["device_type"] == "cpu" else "")


def of_targets(result: Record) -> bool:
    return result["method"]["level"] == "targets"


def provider_asked_for(result: Record) -> str | None:
    """None where the choice was automatic, as a user's is."""
    provider = result["method"]["provider"]
    return None if provider == AUTOMATIC else provider


def rounded(result: Record) -> dict[str, Any]:
    """The result with times to four digits, and a word on that."""
    cases = []
    for record in result["cases"]:
        variants = {
            name: variant | {key: [float(f"{t:.4g}") for t in variant[key]] for key in TIMES if key in variant}
            for name, variant in record["variants"].items()
        }
        cases.append(record | {"variants": variants})
    method = result["method"] | {"kept": "samples rounded to four digits"}
    return dict(result) | {"method": method, "cases": cases}


def compact(result: Record) -> str:
    """Without spaces, and one line a case: two files can be compared by eye."""

    def dumps(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    head = dumps({key: value for key, value in result.items() if key != "cases"})
    return head[:-1] + ',"cases":[\n' + ",\n".join(map(dumps, result["cases"])) + "\n]}\n"


def add(result: Record, folder: Path | None = None, force: bool = False) -> Path:
    """Write the result to its place and give that.

    Raises:
        ValueError: it is no evidence; or, without `force`, nobody can tell of which code; or the place is taken.
    """
    reasons, path = refusals(result), place(result, folder or RESULTS)
    if not force:
        reasons += filter(None, [unclear_origin(result)])
        reasons += [f"{path} is there already"] if path.exists() else []
    if reasons:
        raise ValueError("\n".join(reasons))
    text = compact(result)
    if len(text) > LARGEST:
        text = compact(rounded(result))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def newest(folder: Path | None = None, for_targets: bool = False) -> list[tuple[Path, Record]]:
    """The newest kept result of each device, GPUs first; not of a provider asked for, which is no user's choice.

    `run.py --targets` makes the table of targets and other sweeps the README's figures, each the other's where there
    is nothing else of a device. A result on fewer threads than cores counts for the targets alone, beside the others.
    """
    latest: dict[str, tuple[Path, Record]] = {}

    def rank(result: Record) -> tuple[bool, str]:
        return of_targets(result) == for_targets, result["environment"]["date"]

    for path in sorted((folder or RESULTS).glob("*/*.json")):
        result = read_result(path)
        if provider_asked_for(result) or not (for_targets or on_every_core(result)):
            continue
        device = device_and_threads(result)
        if device not in latest or rank(result) >= rank(latest[device][1]):
            latest[device] = path, result
    return sorted(latest.values(), key=lambda found: found[1]["environment"]["device_type"] == "cpu")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a JSON file that run.py wrote")
    parser.add_argument("--force", action="store_true", help="though the commit is unclear or the place is taken")
    arguments = parser.parse_args(argv)
    try:
        path = add(read_result(arguments.result), force=arguments.force)
    except (OSError, ValueError) as error:
        print(f"not kept: {error}", file=sys.stderr)
        return 1
    size = path.stat().st_size
    print(f"{path}: {size / 1e6:.1f} MB")
    if size > LARGEST:
        print(f"that is over {LARGEST / 1e6:g} MB for the repository: measure fewer --baselines", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
