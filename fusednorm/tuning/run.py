"""``tune``: measures classes of calls in a process of their own, and keeps what was found."""

from __future__ import annotations

import difflib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..dispatch import tuned
from . import store
from .calls import FAMILIES, CallClass, grid
from .load import BUSY, BackgroundLoad
from .measure import Record
from .shapes import RecordedShapes
from .supervise import POLL, Child, Supervised
from .table import summary_text

LEVELS = {"quick": (0.05, 55.0), "default": (0.15, 220.0)}  # seconds a class, and in all
PATIENCE = 60.0  # for one provider in one class; the first has the imports and compiles kernels


class TooNoisy(RuntimeError):
    """Other processes took too much of the machine for times to mean anything."""


class Result(NamedTuple):
    """What a run of :func:`tune` measured."""

    device: torch.device
    path: Path | None  # None: nothing was kept
    records: list[Record]
    seconds: float
    load: float | None  # the share of the cores' time that other processes took
    stopped: str = ""  # why not every class was measured, or not every form tried

    def __str__(self) -> str:
        return summary_text(self)


def tune(
    shapes: RecordedShapes | None = None,
    *,
    device: torch.device | str | None = None,
    quick: bool = False,
    only: Iterable[str] | str | None = None,
    write: bool = True,
    progress: bool | None = None,
) -> Result:
    """Measure which provider serves calls fastest on this machine, and let automatic choice go by it from now on.

    Every provider that can serve a class of calls is compared with float64, then timed, in turns with the others. Host
    time is included, because a user waits for it. A provider is taken in place of automatic choice's only beyond the
    spread of the samples. On a GPU the launch configurations of the fastest provider's norm kernels come last, as far
    as there is time. What was found is kept in a file of the user's cache folder, one for each device (and number
    of threads), and is used by every process that starts later.

    Args:
        shapes: the calls to measure, from :func:`recording_shapes`; a grid of shapes if not given.
        device: what to measure on; a GPU if there is one, else the CPU.
        quick: fewer shapes and samples: under a minute, in place of four.
        only: names out of "norms", "activation" and "attention".
        write: keep the file. If False, nothing changes.
        progress: show a progress bar; None: if standard error is a terminal.

    Returns:
        A :class:`Result`. ``print(result)`` shows what changes, and by how much.

    Raises:
        ValueError: a name or a device is unknown, or no calls were recorded.
        TooNoisy: other processes took over a tenth of the cores' time. Nothing is kept.
        OSError: the file cannot be written; the message names the remedy.

    Example:
        >>> with fusednorm.recording_shapes() as shapes:  # doctest: +SKIP
        ...     train_step(model, batch)
        >>> print(fusednorm.tune(shapes))  # doctest: +SKIP
    """
    chosen = chosen_device(device)
    level = "quick" if quick else "default"
    seconds, limit = LEVELS[level]
    classes = planned(chosen, level, only, shapes)
    return measure_and_keep(classes, chosen, seconds, limit, write, progress, _start_worker)


def planned(
    device: torch.device, level: str, only: Iterable[str] | str | None, shapes: RecordedShapes | None
) -> list[CallClass]:
    """The classes that a run measures.

    Raises:
        ValueError: a name is unknown, or no calls were recorded.
    """
    names = tuple(FAMILIES) if only is None else (only,) if isinstance(only, str) else tuple(only)
    for name in names:
        if name not in FAMILIES:
            near = difflib.get_close_matches(str(name), FAMILIES, 1)
            guess = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(map(repr, FAMILIES))}"
            raise ValueError(f"only: {name!r} is unknown{guess}")
    if shapes is None:
        return grid(device.type, level, names)
    operations = {operation for name in names for operation in FAMILIES[name]}
    found = [of for of in shapes.classes(device) if of.operation in operations]
    if not found:
        raise ValueError(
            f"shapes: no call on {device} was recorded; make calls of fusednorm inside the recording_shapes() block"
        )
    return found


def chosen_device(given: torch.device | str | None) -> torch.device:
    device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected the CPU or a CUDA GPU, got {device}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: {device} is not here: torch sees no GPU")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"device: {device} is not here: torch sees {torch.cuda.device_count()} GPUs")
    return device


Plan = dict[str, Any]
Start = Callable[[Plan, Supervised, Path], Child]


def _start_worker(plan: Plan, of: Supervised, folder: Path) -> Child:
    file = folder / "plan.json"
    file.write_text(json.dumps(plan), encoding="utf-8")
    command = [sys.executable, "-m", "fusednorm.tuning.worker", str(file), str(of.reports)]
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = os.pathsep.join(map(os.path.abspath, (str(Path(__file__).parents[2]), *given)))
    clean = {tuned.SWITCH_VARIABLE: "0", "FUSEDNORM_AUTOTUNE": "0", "FUSEDNORM_PROVIDER": "", "PYTHONPATH": paths}
    with of.output.open("ab") as output:
        # Python imports what lies in the working directory first: let that be a folder of our own
        return Child.of_command(command, output, clean, cwd=folder)


def measure_and_keep(
    classes: Sequence[CallClass],
    device: torch.device,
    seconds: float,
    limit: float,
    write: bool,
    progress: bool | None,
    start: Start,
) -> Result:
    """Measure in a supervised process, and keep what is known when it ends, is interrupted, or time is up."""
    begin, load = time.monotonic(), BackgroundLoad()
    records: list[Record] = []
    stopped = ""
    messages = _messages(classes, device, seconds, limit, start)
    try:
        for kind, content in with_progress(messages, len(classes), progress, "tune"):
            if kind == "case" and "of" in content:
                next(record for record in records if record["name"] == content["of"])["forms"] = content["forms"]
            elif kind == "case":
                records.append(content)
            elif kind == "stopped":
                stopped = content
    except KeyboardInterrupt:  # what was measured is kept
        stopped = "interrupted"
    finally:
        messages.close()
    share = load.share()
    if share is not None and share > BUSY:
        raise TooNoisy(
            f"other processes took {share:.0%} of the cores' time while this was measured (more than {BUSY:.0%}): "
            "nothing is kept, and automatic choice stays as it was. Stop them and run this again"
        )
    path = None
    if write and any("best" in record for record in records):
        try:
            path = store.save(device, records)
        except store.CannotWrite as fault:
            raise OSError(str(fault)) from None
    return Result(device, path, records, time.monotonic() - begin, share, stopped)


def _messages(
    classes: Sequence[CallClass], device: torch.device, seconds: float, limit: float, start: Start
) -> Generator[tuple[str, Any], None, None]:
    deadline = time.time() + limit
    with tempfile.TemporaryDirectory(prefix="fusednorm-tune-") as name:
        folder = Path(name)

        def begin(of: Supervised) -> Child:
            lost = [[*step, why] for step, why in of.lost.items()]
            plan = {
                "classes": [c.name for c in classes],
                "done": of.done,
                "winners": {case["name"]: case["best"] for case in of.cases if "best" in case},
                "lost": lost,
                "device": str(device),
                "seconds": seconds,
                "threads": torch.get_num_threads(),
                "deadline": deadline,
            }
            return start(plan, of, folder)

        watched = Supervised(begin, lambda step: PATIENCE, folder, restarts=20)
        try:
            while watched.running:
                time.sleep(POLL)
                yield from watched.poll()
        finally:
            watched.stop()


T = TypeVar("T")


def with_progress(items: Iterable[T], total: int, progress: bool | None, title: str) -> Iterator[T]:
    """Show a bar that counts classes; messages that end no class do not count."""
    from tqdm import tqdm

    disable = None if progress is None else not progress  # None: tqdm asks whether standard error is a terminal
    with tqdm(total=total, desc=title, unit="class", disable=disable) as bar:
        for item in items:
            yield item
            if isinstance(item, tuple) and item[0] == "more":
                bar.total = bar.n + item[1]
            elif isinstance(item, CallClass) or (isinstance(item, tuple) and item[0] == "case"):
                bar.update()
