"""What was measured on this very machine: by ``autotune`` in this process, or by ``fusednorm tune`` in the user's file.

A file holds one device's measurements, for one number of threads on a CPU:

- ``machine``: versions and hardware. Where one of them is another now, the whole file is left out, with a warning.
- ``steps``: lines of steps as in `crossovers.py`, fitted to the measured shapes.
  A provider is ``torch/cudnn`` where one kernel of torch's attention was the fastest.
- ``points``: by the same lines, `[rows, columns, provider, ratio]` of shapes that were measured one by one.
- ``forms``: launch configurations of norm kernels that take the place of a provider's own, as in `tuned_forms.py`.

This process's measurements come first, then the file's points, then its steps.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._once import first_time
from ..providers.cuda import library as cuda
from ..providers.forms import WITH_FORMS, Place
from ..providers.triton.config import Form, form_of
from . import crossovers, fastpath, registry, tuned_forms

FORMAT = 2
FOLDER_VARIABLE, SWITCH_VARIABLE = "FUSEDNORM_CACHE_DIR", "FUSEDNORM_TUNED"


class Point(NamedTuple):
    """The fastest provider at one shape."""

    provider: str
    ratio: float  # the time of the next best provider over its own
    tried: tuple[str, ...]
    where: str  # for explain(): "in this process", or the file and its date


class Tuned(NamedTuple):
    """One file."""

    path: Path
    date: str
    steps: dict[str, list[crossovers.Step]]
    points: dict[tuple[str, int, int], Point]  # by line, rows and columns
    forms: tuned_forms.Forms  # by provider


# (device, line, rows, columns) -> the fastest; what autotune measured
process: dict[tuple[str, str, int, int], Point] = {}
# Set by autotune: measures a class of calls that nothing is known of; None where it must not. Its last argument is
# (queries, keys) of attention.
measure: Callable[[torch.device, str, int, int, tuple[int, int] | None], Point | None] | None = None


def line(operation: str, itemsize: int, needs_grad: bool) -> str:
    return f"{operation}/{itemsize}/{'both' if needs_grad else 'forward'}"


def folder() -> Path:
    """Where files are kept: FUSEDNORM_CACHE_DIR, or the user's own cache folder."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("fusednorm", appauthor=False))


def device_name(device: torch.device) -> str:
    """The hardware's name, as its maker gives it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return cpu_name()


@functools.cache
def cpu_name() -> str:
    try:
        for entry in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if entry.startswith("model name"):
                return entry.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"


def path_of(device: torch.device) -> Path:
    """The file of a device; on a CPU the number of threads is part of its name."""
    name = device_name(device)
    if device.type != "cuda":
        name += f" {torch.get_num_threads()} threads"
    return folder() / f"{re.sub(r'[^a-z0-9.]+', '-', f'{device.type} {name}'.lower()).strip('-')}.json"


def machine(device: torch.device) -> dict[str, Any]:
    """What a measurement depends on beside the code of a call. All of it must be alike for a file to be used."""
    from .. import __version__

    facts: dict[str, Any] = {
        "fusednorm": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": device_name(device),
        "fast_path": fastpath.load()[0] is not None,
    }
    if device.type == "cuda":
        facts |= {
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    else:
        facts |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    get: Any = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if get is None else str(get())


class Unusable(Exception):
    """Why a file is not used."""


def read(path: Path, now: dict[str, Any]) -> Tuned:
    """A file's measurements, if it is whole and of the machine as it is `now`.

    Raises:
        FileNotFoundError: there is none.
        Unusable: it cannot be read, or was measured elsewhere.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as fault:
        raise Unusable(f"it cannot be read ({type(fault).__name__}: {fault})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise Unusable(f"its format is {found!r}, and this version reads {FORMAT}")
    then = content.get("machine")
    if not isinstance(then, dict):
        raise Unusable("it does not say on which machine it was measured")
    for name in sorted({*now, *then}):
        if then.get(name) != now.get(name):
            raise Unusable(f"it was measured with {name} {then.get(name)}, and now it is {now.get(name)}")
    try:
        return _checked(path, content)
    except (ValueError, TypeError, LookupError, AttributeError) as fault:
        raise Unusable(damaged(fault)) from None


def _checked(path: Path, content: dict[str, Any]) -> Tuned:
    date = content["date"]
    if type(date) is not str:
        raise ValueError(f"date: {date!r}")
    steps = {name: crossovers.steps(entries) for name, entries in content["steps"].items()}
    points = {}
    for name, entries in content["points"].items():
        for rows, columns, provider, ratio, *tried in entries:
            if not (type(rows) is type(columns) is int and type(provider) is str and math.isfinite(ratio)):
                raise ValueError(f"points: {name}: {[rows, columns, provider, ratio]}")
            points[name, rows, columns] = Point(provider, float(ratio), tuple(map(str, tried)), "")
    names = {step.provider for line in steps.values() for step in line} | {p.provider for p in points.values()}
    unknown = sorted(name for name in names if name.partition("/")[0] not in registry.PROVIDERS)
    if unknown:
        raise ValueError(f"unknown providers {unknown}")
    return Tuned(path, date, steps, points, tuned_forms.read(content["forms"]))


_files: dict[tuple[str, int | None, int], Tuned | None] = {}
_refused: set[Path] = set()  # files with forms that the CUDA library does not take


def file(device: torch.device) -> Tuned | None:
    """The user's file of a device, read once; None where there is none that can be used."""
    key = device.type, device.index, 0 if device.type == "cuda" else torch.get_num_threads()
    try:
        found = _files[key]
    except KeyError:
        found = _files[key] = _load(device)
    return None if found is None or found.path in _refused else found


def _load(device: torch.device) -> Tuned | None:
    if os.environ.get(SWITCH_VARIABLE) == "0":
        return None
    try:
        path = path_of(device)
        if not path.exists():
            return None
        return read(path, machine(device))
    except FileNotFoundError:
        return None
    except Unusable as fault:
        _warn(path, fault)
    except Exception as fault:  # no home folder, no permission to look: automatic choice goes on without the file
        if first_time("no tuned file"):
            warnings.warn(
                f"no file of `fusednorm tune` can be looked for ({type(fault).__name__}: {fault}). Set "
                f"{FOLDER_VARIABLE} to a folder, or {SWITCH_VARIABLE}=0 to end this warning.",
                RuntimeWarning,
                stacklevel=2,
            )
    return None


def _warn(path: Path, fault: object) -> None:
    if first_time(path):
        warnings.warn(
            f"{path} is not used: {fault}. What the package ships decides instead. Type `fusednorm tune` to "
            f"measure anew, or set {SWITCH_VARIABLE}=0 to end this warning.",
            RuntimeWarning,
            stacklevel=3,
        )


def damaged(fault: Exception) -> str:
    return f"it is damaged ({type(fault).__name__}: {fault})"


def find(
    device: torch.device, name: str, rows: int, columns: int, lengths: tuple[int, int] | None = None
) -> tuple[str, str] | None:
    """(the fastest provider, why) at a shape, by what was measured on this machine; None: nothing was."""
    key = str(device), name, rows, columns
    point = process.get(key)
    found = file(device)
    if point is None and found is not None:
        point = found.points.get((name, rows, columns))
        if point is not None:
            point = point._replace(where=f"on {found.date[:10]} ({found.path})")
    if point is None and measure is not None and (found is None or name not in found.steps):
        point = measure(device, name, rows, columns, lengths)
    if point is not None:
        others = ", ".join(other for other in point.tried if other != point.provider)
        beside = f", {point.ratio:.2f} times as fast as the next of {others}," if others else ""
        return point.provider, f"{point.provider} was measured fastest{beside} at {rows} x {columns} {point.where}"
    if found is None or name not in found.steps:
        return None
    step = crossovers.decisive(found.steps[name], rows, columns)[0]
    why = f"{step.provider} was measured fastest near {rows} x {columns} on {found.date[:10]} ({found.path})"
    return step.provider, why


def providers(device: torch.device, operation: str) -> set[str]:
    """Those that a measurement on this machine prefers somewhere, for an operation on a device."""
    start = f"{operation}/"
    names = {p.provider for (d, name, *_), p in process.items() if d == str(device) and name.startswith(start)}
    found = file(device)
    if found is not None:
        names |= {step.provider for name, steps in found.steps.items() if name.startswith(start) for step in steps}
        names |= {point.provider for (name, *_), point in found.points.items() if name.startswith(start)}
    return names


# --- launch configurations ---


def _forms(provider: str, index: int) -> tuple[Tuned | None, dict[Place, tuple[int, ...]]]:
    """The file of a GPU, or of the CPU where kernels are emulated (-1), and a provider's forms in it."""
    found = file(torch.device("cuda", index) if index >= 0 else torch.device("cpu"))
    return found, {} if found is None else found.forms[provider]


def triton_forms(index: int) -> dict[Place, Form]:
    return {place: form_of(numbers) for place, numbers in _forms("triton", index)[1].items()}


def keep_in_cuda(indices: list[int]) -> bool:
    """Give the CUDA library the forms of these GPUs; whether it refused a file, which is damaged then, and left out."""
    by_file: dict[Path, list[int]] = {}
    for index in indices:
        found, forms = _forms("cuda", index if cuda.EMULATED is None else -1)
        if found is not None:
            by_file.setdefault(found.path, []).extend(tuned_forms.packed(index, forms))
    if _kept(by_file) is None:
        return False
    faults = {path: fault for path, packed in by_file.items() if (fault := _kept({path: packed})) is not None}
    _kept({path: packed for path, packed in by_file.items() if path not in faults})
    for path, why in faults.items():
        _refused.add(path)
        _warn(path, damaged(why))
    return bool(faults)


def _kept(by_file: Mapping[Path, Sequence[int]]) -> RuntimeError | None:
    """Why the CUDA library refuses all of these forms, or None: it has them, and no others."""
    try:
        cuda.ops.keep([*itertools.chain(*by_file.values())])
    except RuntimeError as fault:
        return fault
    return None


def form_note(provider: str, x: torch.Tensor, places: Sequence[Place]) -> str:
    """For explain(): whether the user's file has forms for such rows, under whatever load."""
    if provider not in WITH_FORMS:
        return ""
    found, forms = _forms(provider, x.get_device())
    if found is None or not any(form._replace(load=0) in places for form in forms):
        return ""
    return f"; forms are kept for {places[0].columns} columns ({found.path})"


def forget() -> None:
    """Read the files again when they are next asked for."""
    _refused.clear()
    _files.clear()
    prepare_anew()


def prepare_anew() -> None:
    """Let providers that are loaded launch by the files as they are now."""
    forget_planned()
    cuda.take_forms()


def forget_planned() -> None:
    """Let Triton plan its launches by the files as they are now."""
    if "triton" in registry._modules:
        registry.get("triton")[0].forget_variants()
