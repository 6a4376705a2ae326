"""The process that measures: a provider that crashes or hangs takes this one with it, and not the user's.

``python -m fusednorm.tuning.worker PLAN REPORTS`` reads its plan from one file and reports into the other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..providers.forms import WITH_FORMS
from .calls import CallClass, parse
from .conditions import steady_machine
from .forms import kernel_of
from .measure import Record, first_line, measured, measured_forms, too_large
from .supervise import reporter
from .timers import timer_for

FORMS = "forms of "  # before a class's name: its forms are a case of their own


def work(
    classes: Sequence[CallClass],
    device: torch.device,
    seconds: float,
    put: Callable[[str, Any], None],
    lost: Mapping[tuple[str, str], str],
    deadline: float = float("inf"),
    done: Collection[str] = (),
    winners: Mapping[str, str] | None = None,
) -> None:
    """Measure classes one by one, and report each; stop at `deadline`, a value of ``time.time()``.

    On a GPU the forms of the winners' kernels come last, those of the largest tensors first.

    Args:
        lost: (class, provider or form) that took an earlier process with them, and how.
        done: names of cases that an earlier process reported.
        winners: the fastest providers that it found, by class.
    """
    timer = timer_for(device)
    best = dict(winners or {})

    def report(record: Record) -> None:
        if "best" in record:
            best[record["name"]] = record["best"]
        put("case", record)

    for of in classes:
        if of.name in done:
            continue
        if time.time() > deadline:
            put("stopped", "time was up")
            return
        gone = {provider: why for (name, provider), why in lost.items() if name == of.name and provider}
        if (of.name, "") in lost:
            put("case", {"name": of.name, "rejected": {"": lost[of.name, ""]}, "providers": {}})
            continue
        said = too_large(of, device)
        if said:
            put("case", {"name": of.name, "rejected": {"": said}, "providers": {}})
            continue
        try:
            for kind, content in measured(of, device, timer, seconds, gone):
                if kind == "trying":
                    put("trying", [of.name, content])
                else:
                    report(content)
        except (RuntimeError, MemoryError) as fault:  # too large for this machine, or a device that is gone
            said = first_line(fault)
            if device.type == "cuda" and not _answers(device):
                put("lost", said)
                return
            put("case", {"name": of.name, "rejected": {"": said}, "providers": {}})
    if device.type == "cuda":
        _forms(classes, device, timer, seconds, put, lost, deadline, done, best)


def _forms(
    classes: Sequence[CallClass],
    device: torch.device,
    timer: Any,
    seconds: float,
    put: Callable[[str, Any], None],
    lost: Mapping[tuple[str, str], str],
    deadline: float,
    done: Collection[str],
    best: Mapping[str, str],
) -> None:
    todo = [of for of in classes if best.get(of.name) in WITH_FORMS and kernel_of(of) and FORMS + of.name not in done]
    put("more", len(todo))
    for of in sorted(todo, key=lambda of: of.elements, reverse=True):
        provider, case = best[of.name], {"name": FORMS + of.name, "of": of.name}
        gone = {form: why for (name, form), why in lost.items() if name == of.name}
        whole = f"{provider} forms"  # while they are timed
        if whole in gone:
            put("case", {**case, "forms": {"rejected": {whole: gone[whole]}, "tried": {}}})
            continue
        try:
            for kind, content in measured_forms(of, device, provider, timer, seconds, gone):
                if kind == "record":
                    put("case", {**case, "forms": content})
                elif time.time() > deadline:
                    put("stopped", "time was up before all forms were tried")
                    return
                else:
                    put("trying", [of.name, content])
        except (RuntimeError, MemoryError) as fault:
            said = first_line(fault)
            if not _answers(device):
                put("lost", said)
                return
            put("case", {**case, "forms": {"rejected": {whole: said}, "tried": {}}})


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
    classes = [parse(name) for name in plan["classes"]]
    with steady_machine(plan["threads"]):
        work(classes, device, plan["seconds"], put, lost, plan["deadline"], set(plan["done"]), plan["winners"])
    put("end", None)


def main(plan_file: str, reports: str) -> None:
    follow(json.loads(Path(plan_file).read_text(encoding="utf-8")), Path(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
