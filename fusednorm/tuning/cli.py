"""The commands ``fusednorm tune`` and ``fusednorm bench``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .bench import bench
from .calls import FAMILIES
from .run import TooNoisy, planned, tune
from .shapes import RecordedShapes, recording_shapes


def add_to(commands: Any, form: dict[str, Any]) -> None:
    """Add both commands to a parser's."""
    text = "measure on this machine which provider serves calls fastest, and keep it for automatic choice"
    command = commands.add_parser("tune", help=text, description=text, **form)
    _common(command)
    command.add_argument(
        "--model",
        metavar="FILE.py:FUNCTION",
        help="measure exactly the calls that FUNCTION() makes, a training step for example",
    )
    command.add_argument("--dry-run", action="store_true", help="measure, and keep nothing")
    command.add_argument("--list", action="store_true", help="print the classes of calls, and stop")
    text = "time automatic choice beside torch's own operators, over a few shapes"
    _common(commands.add_parser("bench", help=text, description=text, **form))


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    command.add_argument("--quick", action="store_true", help="in under a minute, fewer shapes and samples")
    command.add_argument("--only", choices=tuple(FAMILIES), action="append", help="may be given more than once")


def run(options: argparse.Namespace) -> int:
    """Run one of the commands; the exit status.

    Raises:
        ValueError: an argument is wrong.
    """
    if options.command == "bench":
        print(bench(device=options.device, quick=options.quick, only=options.only))
        return 0
    shapes = None if options.model is None else _recorded(options.model)
    if options.list:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        level = "quick" if options.quick else "default"
        print(*(of.name for of in planned(device, level, options.only, shapes)), sep="\n")
        return 0
    given = {"device": options.device, "quick": options.quick, "only": options.only, "write": not options.dry_run}
    try:
        result = tune(shapes, **given)
    except (TooNoisy, OSError) as fault:
        print(f"fusednorm tune: {fault}", file=sys.stderr)
        return 1
    print(result)
    return 130 if result.stopped == "interrupted" else 0


def _recorded(given: str) -> RecordedShapes:
    """The calls that a user's function makes."""
    function = _function(given)
    with recording_shapes() as shapes:
        function()
    if not len(shapes):
        raise ValueError(f"--model: {given} made no call of fusednorm whose cost is measured")
    return shapes


def _function(given: str) -> Callable[[], Any]:
    name, _, wanted = given.rpartition(":")
    path = Path(name)
    if not name or not wanted or path.suffix != ".py":
        raise ValueError(f"--model: expected FILE.py:FUNCTION, got {given!r}")
    if not path.is_file():
        raise ValueError(f"--model: there is no file {name}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    function = getattr(module, wanted, None)
    if not callable(function):
        raise ValueError(f"--model: {name} has no function {wanted}")
    return function
