"""Errors of attention's gradient dK in bfloat16 where it cancels: ours, torch's fused and unfused operators.

    python3 -m benchmarks.attention_gradients          # measures on the CPU, in seconds, and writes the table
    python3 -m benchmarks.attention_gradients --check  # exit status 1 where docs/attention.md does not follow the data

Head dim 256, 128 queries and keys. An error is the largest difference from float64's dK, in percent of its largest
element, over five draws. Writes benchmarks/results/attention_gradients.json and the table of docs/attention.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as torchs

import fusednorm
from benchmarks.measure.machine import environment
from benchmarks.publish.readme import NOTE, replaced
from benchmarks.report.files import read_result, renew, replace
from benchmarks.report.table import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "attention.md"
RESULT = Path(__file__).resolve().parent / "results" / "attention_gradients.json"
LENGTH, DIM, DRAWS = 128, 256, 5
NAMES = ("ours", "torch's fused operator", "torch's unfused operator")


class Case(NamedTuple):
    """What makes dP - delta cancel."""

    name: str
    deviation: float = 1.0  # of the logits
    mean: float = 0.0  # of the values
    causal: bool = False
    query_is_key: bool = False


CASES = (
    Case("1, normal"),
    Case("30, normal", 30.0),
    Case("30, normal, causal", 30.0, causal=True),
    Case("30, normal plus 4", 30.0, 4.0),
    Case("query equal to key, normal", query_is_key=True),
)


def errors(case: Case, seed: int) -> dict[str, float]:
    """Percent of the largest element of dK, by each way."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value, dout = torch.randn(4, 1, 1, LENGTH, DIM, generator=generator, dtype=torch.float64).unbind()
    query = key if case.query_is_key else query * case.deviation
    operands = [t.to(torch.bfloat16) for t in (query, key, value + case.mean, dout)]

    def gradient(attention: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        q, k, v, dy = (t.to(dtype) for t in operands)
        k.requires_grad_()
        return torch.autograd.grad(attention(q, k, v, is_causal=case.causal), k, dy)[0].double()

    with sdpa_kernel(SDPBackend.MATH):
        exact, unfused = gradient(torchs, torch.float64), gradient(torchs, torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = gradient(torchs, torch.bfloat16)
    with fusednorm.use_provider("cpu"):
        ours = gradient(fusednorm.scaled_dot_product_attention, torch.bfloat16)
    largest = exact.abs().max()
    return {name: float(100 * (dk - exact).abs().max() / largest) for name, dk in zip(NAMES, (ours, fused, unfused))}


def measured() -> dict[str, dict[str, float]]:
    found = {}
    for case in CASES:
        draws = [errors(case, seed) for seed in range(DRAWS)]
        found[case.name] = {name: max(draw[name] for draw in draws) for name in NAMES}
    return found


def block(result: Mapping[str, Any]) -> str:
    """What stands between the marks of the page."""
    rows = [[name, *(f"{case[column]:.2f}" for column in NAMES)] for name, case in result["percent"].items()]
    said = (
        f"Largest errors in bfloat16, head dim {DIM}, {LENGTH} queries and keys, in percent of the largest element of "
        f"dK ({result['environment']['cpu']}):"
    )
    note = NOTE.replace("benchmarks/publish/readme.py", "benchmarks/attention_gradients.py")
    return "\n\n".join([note, said, table(["logits' standard deviation, and values", *NAMES], rows)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure and write nothing")
    arguments = parser.parse_args(argv)
    if not arguments.check:
        result = {"environment": environment(torch.device("cpu")), "percent": measured()}
        replace(RESULT, json.dumps(result, indent=1) + "\n")
    text = replaced(PAGE.read_text(encoding="utf-8"), block(read_result(RESULT)), "gradients")
    return renew(PAGE, text, arguments.check)


if __name__ == "__main__":
    sys.exit(main())
