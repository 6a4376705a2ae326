"""The committed pages of figures. A page is written only of kernels that keep to the gate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def conclude(what: str, broken: Sequence[str], page: str | None = None, text: str = "") -> int:
    """Say what broke the gate, write `text` to a page of FOLDER if nothing did, and give the exit status."""
    print(f"{what}, {len(broken)} faults", *broken, sep="\n", file=sys.stderr)
    if page is not None and broken:
        print(f"{page} is not written: it has figures of kernels without faults alone", file=sys.stderr)
    elif page is not None:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / page).write_text(text, encoding="utf-8")
    return 1 if broken else 0
