"""Which property of which operator is proved for which provider: runs the marked tests and writes docs/certificate.md.

python -m tools.certificate              # runs the tests, in three minutes of two cores, writes the record and the page
python -m tools.certificate --page       # writes the page from the committed records
python -m tools.certificate --missing    # prints cells that have neither a test nor a reason
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine
from tools.certificate import evidence, page

ROOT = Path(__file__).resolve().parents[2]
SELECTED = "certifies and not slow"


def marked_files() -> list[str]:
    """Collecting the others would only take time."""
    files = [path for path in (ROOT / "tests").rglob("*.py") if "certifies" in path.read_text(encoding="utf-8")]
    users = [path for path in (ROOT / "tests").rglob("test_*.py") if "proves(" in path.read_text(encoding="utf-8")]
    return sorted({str(path.relative_to(ROOT)) for path in (*files, *users) if path.name.startswith("test_")})


def record(*arguments: str, jobs: int = 0) -> dict[str, Any]:
    """What the marked tests show, without the environment. Their output goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "certificate.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.certificate.plugin", "--certificate", str(path)]
        command += ["-p", "no:cacheprovider", "-m", SELECTED, *(["-n", str(jobs)] if jobs else []), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        run = subprocess.run([*command, *marked_files()], cwd=ROOT, env=environment, stdout=sys.stderr)
        if run.returncode:
            raise SystemExit(f"pytest ended with {run.returncode}: nothing is written")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


def environment() -> dict[str, str]:
    facts = machine.environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {name: str(facts[name]) for name in ("device", "python", "torch", "triton")} | {"date": facts["date"][:10]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--page", action="store_true", help="run nothing: write the page from the committed records")
    how.add_argument("--missing", action="store_true", help="run nothing: print what the committed records lack")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes that run tests (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if not (options.page or options.missing):
        found = record(jobs=options.jobs)
        found["environment"] = environment()
        path = evidence.DATA / evidence.RECORDS[torch.cuda.is_available()]
        path.write_text(evidence.dumped(found), encoding="utf-8")
    records = evidence.records()
    faults = evidence.faults(evidence.cells(evidence.merged(records)))
    print(*faults, sep="\n", file=sys.stdout if options.missing else sys.stderr)
    if not options.missing:
        page.PAGE.write_text(page.page(records), encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
