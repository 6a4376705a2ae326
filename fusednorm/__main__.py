"""``python -m fusednorm info`` and ``python -m fusednorm explain FUNCTION``: what runs here, and why."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from pathlib import Path

import torch

import fusednorm
from fusednorm import _checks, _shortcut, providers
from fusednorm.providers.choice import OPERATIONS

ATTENTION = "scaled_dot_product_attention"
FUNCTIONS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "bias_act_dropout", ATTENTION)
_WITHOUT_DROPOUT = FUNCTIONS[:2]
_SHAPE, _ATTENTION_SHAPE = [4096, 1024], [2, 8, 512, 64]


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
    for name in providers.PROVIDERS:
        reason = providers.unavailable_reason(name)
        built = getattr(providers.get(name)[0], "build", None)
        ready = "ready" if built is None or reason is not None else f"ready, {built()}"
        lines.append(f"  {name:<10} " + (ready if reason is None else f"not here: {reason}"))
    reason = _shortcut.load()[1]
    lines.append(
        "shortcut   "
        + (
            f"not here: {reason}"
            if reason
            else "ready: norms, activations and attention on the CPU, small norms on a GPU, in one C++ call"
        )
    )
    return "\n".join(lines)


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    import triton

    return triton.__version__


def explain(options: argparse.Namespace) -> str:
    """Make the call that the options describe, and say how it is served."""
    x = torch.randn(options.shape, device=options.device).to(options.dtype).requires_grad_(options.grad)
    function = getattr(fusednorm, options.function)
    if options.function == ATTENTION:
        return fusednorm.explain(function, x, x, x, is_causal=options.causal, dropout_p=options.dropout_p)
    args = (x, x) if options.function.startswith("add_") else (x,)
    given = {"dropout_p": options.dropout_p, "activation": options.activation}
    keywords = {name: value for name, value in given.items() if value}
    # what normalizes takes the last size, bias_act_dropout a bias of that size
    last = x.new_zeros(options.shape[-1:]) if function is fusednorm.bias_act_dropout else options.shape[-1:]
    return fusednorm.explain(function, *args, last, **keywords)


def _shape(text: str) -> list[int]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes joined by x, as in 4096x1024")
    return [int(size) for size in sizes]


def _dtype(text: str) -> torch.dtype:
    names = {str(dtype).removeprefix("torch."): dtype for dtype in _checks.FLOAT_DTYPES}
    if text not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
    return names[text]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fusednorm", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, providers")
    command = commands.add_parser("explain", help="which provider serves a call, and why")
    command.add_argument("function", choices=FUNCTIONS)
    command.add_argument("--shape", type=_shape, help="sizes joined by x (default: 4096x1024; of attention 2x8x512x64)")
    command.add_argument("--dtype", type=_dtype, default="float32", help="%(default)s by default")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--dropout-p", type=float, default=0.0, help="for the functions that have dropout")
    command.add_argument("--activation", choices=OPERATIONS, help="of bias_act_dropout (default: relu)")
    command.add_argument("--causal", action="store_true", help="for attention")
    command.add_argument("--grad", action="store_true", help="x requires a gradient")
    options = parser.parse_args(arguments)
    if options.command == "explain" and options.shape is None:
        options.shape = _ATTENTION_SHAPE if options.function == ATTENTION else _SHAPE
    if options.command == "explain" and options.causal and options.function != ATTENTION:
        parser.error(f"--causal: {options.function} has no mask; {ATTENTION} has")
    if options.command == "explain" and options.activation and options.function != "bias_act_dropout":
        parser.error(f"--activation: {options.function} has none; bias_act_dropout has")
    if options.command == "explain" and options.dropout_p and options.function in _WITHOUT_DROPOUT:
        parser.error(f"--dropout-p: {options.function} has no dropout; add_{options.function} has")
    if options.command == "info":
        print(info())
        return
    try:
        print(explain(options))
    except (RuntimeError, ValueError, AssertionError) as fault:  # torch built without CUDA asserts
        parser.error(str(fault).splitlines()[0])


if __name__ == "__main__":
    main()
