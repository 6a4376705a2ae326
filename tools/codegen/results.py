"""The figures of compiled kernels: printed, kept as JSON, or written to a committed page.

A page is written only of kernels that keep to the gate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def parser(description: str | None, page: str) -> argparse.ArgumentParser:
    """A command's, with what `finish` reads."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the figures here instead of a table")
    made.add_argument("--write", action="store_const", const=page, help=f"write the table to benchmarks/results/{page}")
    return made


def finish(
    options: argparse.Namespace, found: Sequence[Any], faults: Callable[[Any], list[str]], table: str, header: str
) -> int:
    """Print the table of the figures found, or write what the options ask for, and give the exit status."""
    if options.json:
        import triton  # nvcc's kernels need none

        kept = {"triton": triton.__version__, "figures": [asdict(figures) for figures in found]}
        options.json.write_text(json.dumps(kept))
    elif not options.write:
        sys.stdout.write(table)
    broken = [f"{figures.name}: {fault}" for figures in found for fault in faults(figures)]
    return conclude(f"{len(found)} variants", broken, options.write, header + table)


def conclude(what: str, broken: Sequence[str], page: str | None = None, text: str = "") -> int:
    """Say what broke the gate, write `text` to a page of FOLDER if nothing did, and give the exit status."""
    print(f"{what}, {len(broken)} faults", *broken, sep="\n", file=sys.stderr)
    if page is not None and broken:
        print(f"{page} is not written: it has figures of kernels without faults alone", file=sys.stderr)
    elif page is not None:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / page).write_text(text, encoding="utf-8")
    return 1 if broken else 0
