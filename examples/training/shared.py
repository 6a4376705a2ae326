"""What the training jobs share: options, device, determinism, learning rate, progress bar, speed and memory."""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fusednorm
from benchmarks import cases
from examples.language_model.data import MissingPackage
from fusednorm._explain import decisions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_options(parser: argparse.ArgumentParser, small: dict[str, Any]) -> None:
    """The options of every training job."""
    parser.add_argument("--task", metavar="NAME", help="which model to train; each task has options of its own")
    parser.add_argument("--small", action="store_true", help=f"sized for two CPU cores: {small}")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="bfloat16 runs under autocast")
    parser.add_argument("--provider", metavar="NAME", help="force a provider of fusednorm (default: automatic choice)")
    parser.add_argument("--report", metavar="DIR", default="bench-report", help="default bench-report")


def add_sizes(
    parser: argparse.ArgumentParser, names: Iterable[str], kind: type, full: dict[str, Any], small: dict[str, Any]
) -> None:
    """Options whose default depends on --small."""
    for name in names:
        meaning = f"default {full[name]}, small {small[name]}"
        parser.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=meaning)


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, full: dict[str, Any], small: dict[str, Any]
) -> argparse.Namespace:
    """Parse, fill in the sizes, and keep the command that trains through the fused op on any machine."""
    arguments = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    arguments.fused_command = shlex.join(["python3", "examples/train.py", *given, "--provider", "reference"])
    for name, value in (small if arguments.small else full).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def provider_context(name: str | None) -> Any:
    return fusednorm.use_provider(name) if name else nullcontext()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU, {model}"


@contextmanager
def deterministic() -> Iterator[None]:
    """Only deterministic kernels, without the debugging aid that fills new tensors (it would be timed too)."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Parameters stay in float32; with bfloat16 the operators run under torch's autocast."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, dtype=DTYPES[dtype])


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine down to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def progress_bar(items: Iterable[Any], total: int, label: str) -> Any:
    """tqdm where it is installed and stderr is a terminal; otherwise the bare iterable."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc=label, unit="step", leave=False, disable=not sys.stderr.isatty())


def routes(model: nn.Module, *inputs: torch.Tensor) -> list[dict[str, Any]]:
    """Who serves the calls of one forward, how, how many they are, and why not another."""
    made = Counter(route._replace(where="") for route in decisions(model.train(), *inputs))
    return [
        {
            "function": route.call,
            "provider": route.provider,
            "how": route.how,
            "calls": calls,
            "refusals": [f"{who} is not used: {why}" for who, why in route.refusals],
        }
        for route, calls in made.items()
        if route.call[0].islower()  # of functions; modules say whether they are fused
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(
    steps: dict[str, Callable[[int], object]], tokens: int, device: torch.device, pairs: int = 15, warm_up: int = 3
) -> dict[str, dict[str, float]]:
    """Time whole training steps of `tokens` tokens; a step is called with its number.

    The variants alternate step by step, and who goes first alternates too, so that a drift of the machine hits both.
    """
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for pair in range(-warm_up, pairs):
        for variant in list(steps) if pair % 2 else list(reversed(steps)):
            synchronize(device)
            start = time.perf_counter()
            steps[variant](pair + warm_up)
            synchronize(device)
            if pair >= 0:
                seconds[variant].append(time.perf_counter() - start)
    result = {}
    for variant, times in seconds.items():
        quartiles = torch.quantile(torch.tensor(times, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75]).double())
        low, median, high = quartiles.tolist()
        result[variant] = {
            "tokens_per_s": tokens / median,
            "step_ms_median": median * 1e3,
            "step_ms_quartile_1": low * 1e3,
            "step_ms_quartile_3": high * 1e3,
            "steps": len(times),
        }
    return result


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that one forward keeps for its backward: distinct storages, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # held until the storages are counted: an address freed could be another tensor's
    total = sum(kept.values())
    del result
    return total


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Silence what C++ writes to stderr: the profiler announces its start and stop there, and no setting stops it."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def allocated_peak(work: Callable[[], None], device: torch.device) -> int:
    """Largest sum of bytes that torch's allocator had lent out at once during `work`, beyond what it had before.

    CUDA: the caching allocator's own count. CPU: the profiler's record of every allocation; unlike the resident size
    of the process it repeats to the byte.
    """
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    # acc_events: without it torch warns that events of earlier cycles are dropped; there is one cycle.
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    records = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(records, key=lambda record: record.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def environment(
    device: torch.device, route: dict[str, Any], fused_command: str, others: float | None
) -> dict[str, Any]:
    """What the figures of a report hang on."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "fusednorm": fusednorm.__version__,
        "providers": list(fusednorm.available_providers()),
        "device_type": device.type,
        "route": route,
        "fused_command": fused_command,
        "others": others,
    }


def guarded(run: Callable[[argparse.Namespace, torch.device], int], arguments: argparse.Namespace) -> int:
    """Run a job deterministically, on its device, with its provider; say what it refuses and return 2."""
    # cuBLAS reads this when it starts; without it torch refuses deterministic matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        device = choose_device(arguments.device)
        cases.require_provider(arguments.provider)
        with deterministic(), provider_context(arguments.provider):
            return run(arguments, device)
    except (MissingPackage, ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
