"""The commands ``fusednorm tune`` and ``fusednorm bench``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import _arguments
from .bench import SECONDS, bench
from .calls import FAMILIES, OPERATION_NAMES
from .run import TooNoisy, planned, tune
from .shapes import RecordedShapes, recording_shapes

OPERATORS = (*OPERATION_NAMES, *FAMILIES)
SHORT = {"scaled_dot_product_attention": "attention", "bias_act_dropout": "bias_gelu_dropout"}


def add_to(commands: Any, form: dict[str, Any]) -> None:
    """Add both commands to a parser's."""
    text = "measure on this machine which provider serves calls fastest, and keep it for automatic choice"
    command = commands.add_parser("tune", help=text, description=text, **form)
    _device(command)
    command.add_argument("--quick", action="store_true", help="in under a minute, fewer shapes and samples")
    command.add_argument("--only", choices=tuple(FAMILIES), action="append", help="may be given more than once")
    command.add_argument(
        "--model",
        metavar="FILE.py:FUNCTION",
        help="measure exactly the calls that FUNCTION() makes, a training step for example",
    )
    command.add_argument("--dry-run", action="store_true", help="measure, and keep nothing")
    command.add_argument("--list", action="store_true", help="print the classes of calls, and stop")
    text = "check calls against float64, then time them beside eager PyTorch; in about a minute"
    command = commands.add_parser("bench", help=text, description=text, **form)
    command.add_argument(
        "operators",
        nargs="*",
        type=_arguments.one_of(OPERATORS, SHORT),
        metavar="OPERATOR",
        help=f"{', '.join(OPERATORS)} (default: a few typical ones)",
    )
    command.add_argument(
        "--shape",
        type=_arguments.sizes,
        action="append",
        help="sizes joined by x: rows x columns as 4096x1024, of attention batch x heads x length x head_dim; "
        "may be given more than once (default: two typical ones)",
    )
    command.add_argument(
        "--dtype",
        type=_arguments.dtype,
        action="append",
        help="float32, bf16, fp16 or fp64; may be given more than once (default: float32, on a GPU bfloat16)",
    )
    _device(command)
    command.add_argument(
        "--seconds", type=_arguments.seconds, default=SECONDS, help="in all, about (default: %(default)g)"
    )
    command.add_argument("--json", action="store_true", help="print JSON in place of the table")


def _device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")


def run(options: argparse.Namespace) -> int:
    """Run one of the commands; the exit status.

    Raises:
        ValueError: an argument is wrong.
    """
    if options.command == "bench":
        return _bench(options)
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


def _bench(options: argparse.Namespace) -> int:
    """1 where a result was wrong, or a case could not be timed."""
    given = options.operators, options.shape or (), options.dtype or ()
    found = bench(*given, device=_known(options.device), seconds=options.seconds)
    print(json.dumps(found.record(), indent=2) if options.json else found)
    return 130 if found.stopped else int(bool(found.faults))


def _known(device: str | None) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except RuntimeError as fault:
        raise ValueError(f"--device: {str(fault).splitlines()[0]}") from None


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
