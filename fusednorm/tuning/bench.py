"""``bench``: automatic choice beside torch's own operators, over a few shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from statistics import median

import torch

from ..dispatch import use_provider
from .calls import build
from .load import BackgroundLoad, warning
from .measure import paired, prior
from .run import LEVELS, chosen_device, planned, with_progress
from .table import aligned
from .timers import timer_for


def bench(
    *,
    device: torch.device | str | None = None,
    quick: bool = False,
    only: Iterable[str] | str | None = None,
    progress: bool | None = None,
) -> str:
    """A table: microseconds of automatic choice and of torch's own operators, in turns, with host time.

    Classes with dropout are left out, because torch's operators draw another mask.
    """
    chosen = chosen_device(device)
    level = "quick" if quick else "default"
    timer, load = timer_for(chosen), BackgroundLoad()
    cells = [["class", "served by", "time, us", "torch, us", "times as fast", "95 % interval"]]
    classes = [of for of in planned(chosen, level, only, None) if not of.draws_mask]

    def around(name: str) -> contextlib.AbstractContextManager[object]:
        return use_provider("torch") if name == "torch" else contextlib.nullcontext()

    for of in with_progress(classes, len(classes), progress, "bench"):
        call = build(of, chosen)
        found = timer.measure({"automatic": call.__call__, "torch": call.__call__}, LEVELS[level][0], around)
        ours, torchs = (found[name].get("inclusive") or found[name]["samples"] for name in ("automatic", "torch"))
        ratio, low, high = paired(torchs, ours)
        times = (f"{1e6 * median(samples):.1f}" for samples in (ours, torchs))
        cells.append([of.name, prior(of, chosen), *times, f"{ratio:.2f}", f"{low:.2f} to {high:.2f}"])
    lines = [f"fusednorm beside torch's own operators on {chosen}", "", *aligned(cells)]
    noisy = warning(load.share())
    return "\n".join(lines + (["", noisy] if noisy else []))
