"""The process that measures: a provider that crashes or hangs takes this one with it, and not the user's.

``python -m fusednorm.tuning.worker PLAN REPORTS`` reads its plan from one file and reports into the other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .calls import CallClass, parse
from .conditions import steady_machine
from .load import available_memory
from .measure import measured
from .supervise import reporter
from .timers import timer_for

TENSORS = 12  # of the input's size, that the inputs, results and gradients of a call come to at most


def work(
    classes: Sequence[CallClass],
    device: torch.device,
    seconds: float,
    put: Callable[[str, Any], None],
    lost: Mapping[tuple[str, str], str],
    deadline: float = float("inf"),
) -> None:
    """Measure classes one by one, and report each; stop at `deadline`, a value of ``time.time()``.

    Args:
        lost: (class, provider) that took an earlier process with them, and how.
    """
    timer = timer_for(device)
    for of in classes:
        if time.time() > deadline:
            put("stopped", "time was up")
            return
        gone = {provider: why for (name, provider), why in lost.items() if name == of.name and provider}
        if (of.name, "") in lost:
            put("case", {"name": of.name, "rejected": {"": lost[of.name, ""]}, "providers": {}})
            continue
        free, needed = available_memory(device), TENSORS * of.elements * of.torch_dtype.itemsize
        if free is not None and needed > 0.8 * free:
            said = f"takes about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free"
            put("case", {"name": of.name, "rejected": {"": said}, "providers": {}})
            continue
        try:
            for kind, content in measured(of, device, timer, seconds, gone):
                if kind == "trying":
                    put("trying", [of.name, content])
                else:
                    put("case", content)
        except (RuntimeError, MemoryError) as fault:  # too large for this machine, or a device that is gone
            said = f"{type(fault).__name__}: {fault}".splitlines()[0][:200]
            if device.type == "cuda" and not _answers(device):
                put("lost", said)
                return
            put("case", {"name": of.name, "rejected": {"": said}, "providers": {}})


def _answers(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device)
    except RuntimeError:
        return False
    return True


def follow(plan: Mapping[str, Any], reports: Path) -> None:
    """Do what a plan says, and report it."""
    put = reporter(reports)
    device = torch.device(plan["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    lost = {(name, provider): why for name, provider, why in plan["lost"]}
    done = set(plan["done"])
    classes = [parse(name) for name in plan["classes"] if name not in done]
    with steady_machine(plan["threads"]):
        work(classes, device, plan["seconds"], put, lost, plan["deadline"])
    put("end", None)


def main(plan_file: str, reports: str) -> None:
    follow(json.loads(Path(plan_file).read_text(encoding="utf-8")), Path(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
