"""``fusednorm info``, ``explain``, ``tune``, ``bench``, ``doctor``: what runs here, why, how fast, how right."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import fusednorm

from . import _arguments, dispatch, doctor
from .dispatch import fastpath, tuned
from .dispatch.rules import OPERATIONS
from .tuning import cli as tuning

ATTENTION, VARLEN = "scaled_dot_product_attention", "varlen_attention"
FUNCTIONS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "bias_act_dropout", ATTENTION, VARLEN)
_SHORT = {"attention": ATTENTION, "varlen": VARLEN}
_SHAPES = {ATTENTION: [2, 8, 512, 64], VARLEN: [1024, 8, 64]}
_SHAPE = [4096, 1024]
# what an option is for; all others are for every function
_TAKES = {
    "dropout_p": FUNCTIONS[2:],
    "activation": ("bias_act_dropout",),
    "bias": ("layer_norm", "add_layer_norm", "add_rms_norm", "bias_act_dropout"),
    "causal": (ATTENTION, VARLEN),
    "key_mask": (ATTENTION,),
    "window": (ATTENTION, VARLEN),
}
_VARIABLES = ("OMP_NUM_THREADS", "TRITON_INTERPRET")  # of others, which change what runs
_ENVIRONMENT = """environment:
  FUSEDNORM_PROVIDER=NAME   the provider outside of any use_provider block; torch: torch's own operators
  FUSEDNORM_FASTPATH=0      leave out the C++ fast path of small calls
  FUSEDNORM_TUNED=0         leave out what `fusednorm tune` measured
  FUSEDNORM_CACHE_DIR=DIR   where `fusednorm tune` keeps it
  FUSEDNORM_AUTOTUNE=1      measure each class of calls when it is first called
  TRITON_INTERPRET=1        run Triton's kernels on CPU tensors, slowly, to test them
"""


def info() -> str:
    """Versions, devices, and each provider with the reason where it cannot run."""
    lines = [
        f"fusednorm  {fusednorm.__version__} in {Path(fusednorm.__file__).parent}",
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch      {torch.__version__}",
        f"triton     {_triton_version()}",
    ]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"devices    cpu ({torch.get_num_threads()} threads)" + "".join(f", {name}" for name in gpus))
    lines.append("providers  (best first)")
    for name in dispatch.PROVIDERS:
        reason = dispatch.unavailable_reason(name)
        built = getattr(dispatch.get(name)[0], "build", None)
        ready = "ready" if built is None or reason is not None else f"ready, {built()}"
        lines.append(f"  {name:<10} " + (ready if reason is None else f"not here: {reason}"))
    reason = fastpath.load()[1]
    lines.append(
        "fast path  "
        + (
            f"not here: {reason}"
            if reason
            else "ready: norms, activations and attention on the CPU, small norms and attention on a GPU"
        )
    )
    named = [name for name in sorted(os.environ) if name.startswith("FUSEDNORM_") or name in _VARIABLES]
    variables = [f"variables  {' '.join(f'{name}={os.environ[name]}' for name in named)}"] if named else []
    return "\n".join([*lines, *_tuned(), *variables])


def _tuned() -> list[str]:
    """What `fusednorm tune` measured, for each device."""
    lines: list[str] = []
    for device in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        found = tuned.file(torch.device(device))
        said = f"not here for {device}; type `fusednorm tune`"
        if found is not None:
            forms = sum(map(len, found.forms.values()))
            count = f"{len(found.points)} classes of calls" + (f" and {forms} forms of kernels" if forms else "")
            said = f"{count} on {device}, {found.date[:10]}, {found.path}"
        lines.append(f"{'' if lines else 'tuned':<10} {said}")
    return lines


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    import triton

    return triton.__version__


def explain(options: argparse.Namespace) -> str:
    """Make the call that the options describe, and say how it is served."""
    name, shape = options.function, options.shape
    function = getattr(fusednorm, name)
    x = torch.randn(shape, device=options.device).to(options.dtype).requires_grad_(options.grad)
    given = {"dropout_p": options.dropout_p, "activation": options.activation, "is_causal": options.causal}
    if options.window is not None:
        given["window"] = (options.window, options.window)
    keywords: dict[str, Any] = {key: value for key, value in given.items() if value}
    if name == ATTENTION:
        if options.key_mask:
            keywords["key_mask"] = torch.arange(shape[-2], device=x.device).expand(*shape[:1], -1) < shape[-2] - 1
        return fusednorm.explain(function, x, x, x, **keywords)
    if name == VARLEN:  # two sequences
        bounds = torch.tensor([0, shape[0] // 2, shape[0]], dtype=torch.int32, device=x.device)
        longest = shape[0] - shape[0] // 2
        return fusednorm.explain(function, x, x, x, bounds, bounds, longest, longest, **keywords)
    bias = x.new_zeros(shape[-1:]) if options.bias else None
    if name == "bias_act_dropout":
        return fusednorm.explain(function, x, bias, **keywords)
    adds = name.startswith("add_")
    if options.bias:
        keywords["x_bias" if adds else "bias"] = bias
    return fusednorm.explain(function, *((x, x) if adds else (x,)), shape[-1:], **keywords)


def _wrong(options: argparse.Namespace) -> str:
    """Which option the function does not have, or nothing."""
    for option, functions in _TAKES.items():
        if getattr(options, option) and options.function not in functions:
            other = f"add_{options.function}"
            those = other if other in functions else ", ".join(functions)
            flag = option.replace("_", "-")
            return f"--{flag}: {options.function} has no {option.removesuffix('_p')}; {those} has"
    if options.function == VARLEN and len(options.shape) != 3:
        return f"--shape: {VARLEN} takes the sizes of (total, heads, head_dim), as 1024x8x64"
    return ""


def _doctor(device: str | None) -> int:
    try:
        findings = doctor.doctor(device)
    except KeyboardInterrupt:
        print("fusednorm: doctor was stopped", file=sys.stderr)
        return 130  # as a shell says of SIGINT
    print(doctor.page(findings, info()))
    return int(any(finding.outcome == "FAILED" for finding in findings))


def main(arguments: list[str] | None = None) -> int:
    """Run a command; its exit status."""
    form: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": _ENVIRONMENT}
    parser = argparse.ArgumentParser(prog="fusednorm", description=__doc__, **form)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, providers")
    text = "which provider serves a call, and why"
    command = commands.add_parser("explain", help=text, description=text, **form)
    command.add_argument(
        "function", type=_arguments.one_of(FUNCTIONS, _SHORT), metavar="FUNCTION", help=", ".join(FUNCTIONS)
    )
    command.add_argument(
        "--shape",
        type=_arguments.sizes,
        help="sizes joined by x (default: 4096x1024; of attention 2x8x512x64, packed 1024x8x64)",
    )
    command.add_argument(
        "--dtype", type=_arguments.dtype, default="float32", help="float32, bf16, fp16 or fp64 (default: %(default)s)"
    )
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--dropout-p", type=float, default=0.0, help="for the functions that have dropout")
    command.add_argument("--activation", choices=OPERATIONS, help="of bias_act_dropout (default: relu)")
    command.add_argument(
        "--bias", action=argparse.BooleanOptionalAction, help="with a bias (bias_act_dropout has one unless --no-bias)"
    )
    command.add_argument("--causal", action="store_true", help="for attention")
    command.add_argument("--key-mask", action="store_true", help="for attention: the last key of each sample is hidden")
    command.add_argument("--window", type=int, metavar="N", help="for attention: N keys to the left and to the right")
    command.add_argument("--grad", action="store_true", help="x requires a gradient")
    tuning.add_to(commands, form)
    text = "check each provider against float64, the fast path, torch.compile and memory; in under two minutes"
    command = commands.add_parser("doctor", help=text, description=text, **form)
    command.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    if options.command == "doctor":
        try:
            torch.device(options.device or "cpu")
        except RuntimeError as fault:
            parser.error(f"--device: {str(fault).splitlines()[0]}")
        return _doctor(options.device)
    if options.command in ("tune", "bench"):
        try:
            return tuning.run(options)
        except ValueError as fault:
            parser.error(str(fault))
    if options.shape is None:
        options.shape = _SHAPES.get(options.function, _SHAPE)
    wrong = _wrong(options)
    if wrong:
        parser.error(wrong)
    if options.bias is None:
        options.bias = options.function == "bias_act_dropout"
    try:
        print(explain(options))
    except (RuntimeError, ValueError, TypeError, AssertionError) as fault:  # torch built without CUDA asserts
        parser.error(str(fault).splitlines()[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
