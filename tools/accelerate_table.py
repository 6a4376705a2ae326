"""What fusednorm.accelerate fuses in the models of tests/helpers/model_zoo.py, and what it leaves and why.

python -m tools.accelerate_table                                         # prints the page
python -m tools.accelerate_table --models BERT Llama
python -m tools.accelerate_table --write docs/accelerated-models.md      # in ten seconds of one core
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fusednorm
from tests.helpers.model_zoo import models

KINDS = {
    "norm": "norms",
    "modulation": "modulations",
    "residual": "sums",
    "feed_forward": "activations",
    "attention": "attention",
    "layer": "layers",
}
HEADER = """<!-- written by `python -m tools.accelerate_table --write docs/accelerated-models.md`: do not edit -->

# Accelerated models

What `fusednorm.accelerate` does with models of {versions}.
Each is a small one of its kind, with random weights. Tests compare its outputs, gradients and generated tokens with the
untouched model's.

## What is fused

A cell is the number fused, and after it the number seen where some are left. Sums are those of residuals, each fused
with the norm after it. Modulations are scales and shifts of norms, a vector for each sample. Layers are those of
`torch.nn`, swapped whole.

"""
LEFT = """
## What is left, and why

Nothing is left of: {complete}.

| model | number | kind | what | why |
|---|--:|---|---|---|
"""


def counted(entries: Sequence[Any], kind: str) -> str:
    """Fused / seen, or one number where these are equal."""
    seen = [entry for entry in entries if entry.kind == kind]
    fused = sum(entry.fused for entry in seen)
    return "" if not seen else str(fused) if fused == len(seen) else f"{fused} / {len(seen)}"


def row(name: str, report: Any) -> str:
    return "| " + " | ".join([name, *(counted(report.entries, kind) for kind in KINDS)]) + " |\n"


def left(name: str, report: Any) -> list[str]:
    """Rows of what was left of one model: equal reasons once, with their number."""
    reasons = Counter((entry.kind, entry.what, entry.reason) for entry in report.left)
    return [
        f"| {name} | {number} | {kind.replace('_', ' ')} | `{what}` | {reason} |\n"
        for (kind, what, reason), number in sorted(reasons.items())
    ]


def page(names: Sequence[str]) -> str:
    zoo = models()
    reports = {name: fusednorm.accelerate(zoo[name].build()) for name in names}
    head = "| model | " + " | ".join(KINDS.values()) + " |\n" + "|---" + "|--:" * len(KINDS) + "|\n"
    rows = "".join(row(name, report) for name, report in reports.items())
    reasons = "".join(row for name, report in reports.items() for row in left(name, report))
    complete = "; ".join(name for name, report in reports.items() if not report.left)
    return HEADER.format(versions=versions()) + head + rows + LEFT.format(complete=complete) + reasons


def versions() -> str:
    """Of the packages whose models these are."""
    from importlib.metadata import version

    found = [f"{name} {version(name)}" for name in ("transformers", "timm", "diffusers")]
    return f"{', '.join(found)} and torch {torch.__version__.partition('+')[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(models()), choices=list(models()), metavar="MODEL")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page here instead of printing it")
    options = parser.parse_args(arguments)
    missing = [name for name in ("transformers", "timm", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    text = page(options.models)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
