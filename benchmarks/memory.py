"""A training step by every way to save memory or bits: time, and what the forward keeps for its backward.

    python3 -m benchmarks.memory --report DIR
    python3 -m benchmarks.memory --bytes benchmarks/results/memory.json  # counts the bytes anew, and times nothing

The model is two encoder layers, width 512, feed-forward 2048, 8 heads, dropout 0.1, on (8, 256, 512): `torch.nn`'s and
ours. A step is forward, backward and an update by AdamW. What is kept are distinct storages, without the input and the
parameters. Writes memory.json and memory.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import fusednorm
from benchmarks.measure.kept import parts_of_ours, parts_of_torch
from benchmarks.measure.machine import environment
from benchmarks.measure.turns import in_turns
from benchmarks.report.files import read_result, replace, write_pair
from benchmarks.report.table import table
from fusednorm._saved_bytes import saved_bytes

BATCH, LENGTH, WIDTH, LAYERS = 8, 256, 512, 2


class Way(NamedTuple):
    """One way to train."""

    name: str
    ours: bool
    recompute: tuple[str, ...] = ()
    dtype: torch.dtype | None = None  # of autocast
    checkpoints: bool = False  # each layer computed again in the backward
    parts: int = 1  # of a batch, whose gradients are accumulated
    scaler: bool = False


def ways() -> list[Way]:
    both = [
        way
        for ours, library in ((False, "torch.nn"), (True, "fusednorm"))
        for way in (
            Way(f"{library}, float32", ours),
            Way(f"{library}, autocast to bfloat16", ours, dtype=torch.bfloat16),
            Way(f"{library}, autocast to float16 with a GradScaler", ours, dtype=torch.float16, scaler=True),
            Way(f"{library}, activation checkpointing", ours, checkpoints=True),
            Way(f"{library}, gradients of 4 parts accumulated", ours, parts=4),
        )
    ]
    for names in (("norms",), ("norms", "activation"), ("norms", "activation", "attention")):
        both.append(Way(f"fusednorm, recompute={', '.join(names)}", True, names))
    both.append(
        Way(
            "fusednorm, autocast to bfloat16, recompute=norms, activation",
            True,
            ("norms", "activation"),
            torch.bfloat16,
        )
    )
    return both


def layers_of(way: Way) -> nn.ModuleList:
    torch.manual_seed(0)
    options: dict[str, Any] = {"recompute": way.recompute} if way.ours else {}
    kind = fusednorm.TransformerEncoderLayer if way.ours else nn.TransformerEncoderLayer
    made = (kind(WIDTH, 8, 4 * WIDTH, 0.1, "gelu", batch_first=True, norm_first=True, **options) for _ in range(LAYERS))
    return nn.ModuleList(made)


class Training:
    """A model with its step."""

    def __init__(self, way: Way) -> None:
        self.way, self.layers = way, layers_of(way)
        self.optimizer = torch.optim.AdamW(self.layers.parameters(), 1e-4)
        self.scaler = torch.amp.GradScaler("cpu", enabled=way.scaler)
        self.x = torch.randn(BATCH, LENGTH, WIDTH)

    def loss(self, x: Tensor) -> Tensor:
        precision: Any = contextlib.nullcontext()
        if self.way.dtype is not None:
            precision = torch.autocast("cpu", self.way.dtype)
        with precision:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False) if self.way.checkpoints else layer(x)
        return x.float().square().mean()

    def step(self) -> None:
        for part in self.x.chunk(self.way.parts):
            self.scaler.scale(self.loss(part) / self.way.parts).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def kept(self) -> int:
        part = self.x.chunk(self.way.parts)[0]
        return saved_bytes((part, *self.layers.parameters()), lambda: self.loss(part))

    def kept_parts(self) -> dict[str, int] | None:
        """What is kept by the part that keeps it, of a plain step in float32."""
        if self.way.dtype is not None or self.way.checkpoints or self.way.parts > 1:
            return None
        if self.way.ours:
            return parts_of_ours(self.layers, BATCH, LENGTH)
        return parts_of_torch(self.layers, (self.x, *self.layers.parameters()), lambda: self.loss(self.x))

    def bytes(self) -> dict[str, Any]:
        parts = self.kept_parts()
        return {"kept_bytes": self.kept()} | ({} if parts is None else {"kept_parts": parts})


def interleaved(trainings: list[Training], rounds: int) -> list[list[float]]:
    """Seconds of the steps of each, but of the first; one step with a scaler, which takes a CPU half a minute."""
    for training in tqdm(trainings, "first steps", leave=False, disable=None):
        training.step()
    found: dict[int, list[float]] = {}
    for scaler, count in ((False, rounds), (True, 1)):
        chosen = [i for i, training in enumerate(trainings) if training.way.scaler is scaler]
        found |= zip(chosen, in_turns([trainings[i].step for i in chosen], count, "steps"), strict=True)
    return [found[i] for i in range(len(trainings))]


def renewed(result: dict[str, Any], trainings: list[Training]) -> dict[str, Any]:
    """A result with its bytes counted anew, and its times as they are."""
    if [case["name"] for case in result["cases"]] != [training.way.name for training in trainings]:
        raise ValueError("the result has other ways to train")
    for case, training in zip(result["cases"], trainings):
        case |= training.bytes()
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="folder for memory.json and memory.md")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each way")
    parser.add_argument("--bytes", type=Path, metavar="JSON", help="count the bytes of this result anew")
    args = parser.parse_args(argv)
    trainings = [Training(way) for way in ways()]
    if args.bytes:
        replace(args.bytes, json.dumps(renewed(read_result(args.bytes), trainings), indent=1) + "\n")
        return 0
    kept = [training.bytes() for training in trainings]
    times = interleaved(trainings, args.rounds)
    cases = [
        {"name": t.way.name, "seconds": statistics.median(s), **k, "samples": s}
        for t, k, s in zip(trainings, kept, times)
    ]
    first = cases[0]
    rows = [
        (
            *(c["name"], f"{1e3 * c['seconds']:.0f}", f"{first['seconds'] / c['seconds']:.2f}"),
            *(f"{c['kept_bytes'] / 2**20:.0f}", f"{c['kept_bytes'] / first['kept_bytes']:.2f}"),
        )
        for c in cases
    ]
    machine, threads = environment(torch.device("cpu")), torch.get_num_threads()
    text = "\n".join(
        [
            "# A training step: time and kept memory",
            "",
            f"Written by `python3 -m benchmarks.memory`: do not edit. {LAYERS} encoder layers, width {WIDTH}, batch",
            f"{BATCH}, {LENGTH} tokens, dropout 0.1. Times are medians of interleaved steps; float16, which a CPU",
            "emulates, has one step. Kept is what a forward keeps for its backward. Speed and share compare",
            "with the first row.",
            "",
            f"Machine: {machine['cpu']}, {threads} threads.",
            "",
            table(["way", "step, ms", "speed", "kept, MiB", "share"], rows),
            "",
        ]
    )
    raw = {"environment": machine, "threads": threads, "cases": cases}
    write_pair(args.report, "memory", raw, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
