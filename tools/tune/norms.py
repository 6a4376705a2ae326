"""Try other forms of the norm kernels than their tables choose, at each width, and see whether one is faster.

    python3 -m tools.tune.norms --json tune.json                # on a GPU: all of bfloat16, then float32
    python3 -m tools.tune.norms --only '^add_.*/backward/bf' --json tune.json --limit 120
    python3 -m tools.tune.norms --compile 90                    # no GPU: fills Triton's cache for sm_90
    python3 -m tools.tune.report tune.json                # the tables again

Every form is checked against float64 at the very shape before it is timed, in turns with the others, with eager and
with a copy of as many bytes; a wrong one gets no time. What a form raises is kept beside it, and one that never returns
or takes the GPU's context with it costs its process, and is left out by the next. The file is written after each case.
Exit status: 0; 1 when a form was wrong, nothing was measured, or no provider here has forms to try.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.measure.machine import clocks, environment
from benchmarks.report.files import make_folder, write_result
from benchmarks.report.table import table
from fusednorm.providers.forms import DIRECTIONS
from fusednorm.tuning.forms import TriedForm
from fusednorm.tuning.supervise import Message, Step, supervised
from tools.tune import cases, forms, report
from tools.tune.compile_ahead import Compiling

OPERATIONS = ("add_layer_norm", "bias_dropout_add_layer_norm", "layer_norm", "rms_norm")  # the most important first
DTYPES = ("bfloat16", "float32")
WIDTHS = (256, 1024, 2048, 4096, 5120, 8192, 16384, 32768, 65536, 131072, 262144)
MOST_BACKWARD = 65536
BYTES = 64 << 20  # of x
CPU_SHAPES = ((6, 256), (6, 1024))  # an emulated or interpreted kernel takes milliseconds a row
SECONDS = 0.1
PATIENCE = 40.0  # what is done without a word, most of all a first start, takes ten
MOST_LOST = 5  # forms of a provider that took their process with them: a start each, and the time is short
COPY, EAGER = "copy", "eager"


def chosen(device_type: str) -> list[Case]:
    found = []
    for dtype in DTYPES:
        row = BYTES // getattr(torch, dtype).itemsize
        shapes = [(row // width, width) for width in WIDTHS] if device_type == "cuda" else CPU_SHAPES
        found += [
            Case(op, shape, dtype, direction)
            for op in OPERATIONS
            for direction in reversed(DIRECTIONS)  # the backward is the more important
            for shape in shapes
            if direction == "forward" or shape[1] <= MOST_BACKWARD
        ]
    return found


# --- one case ---


class DeviceLost(Exception):
    """No call reaches the GPU any more."""


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _refused(error: Exception, device: torch.device) -> dict[str, str]:
    """The entry of a form that raised, if the others can go on."""
    try:
        _wait(device)
    except Exception as fault:
        raise DeviceLost(_message(error)) from fault
    return {"status": "failed", "detail": _message(error)}


def try_form(case: Case, form: TriedForm, device: torch.device) -> tuple[Any, dict[str, str]]:
    """The call to be timed if it gives what float64 does, or why there is none."""
    try:
        inputs = measure.problem(case, device)
        with forms.active(form):
            verdict = measure.check(case, device)
            if not verdict.ok:
                return None, {"status": "wrong", "detail": verdict.detail}
            call = inputs.runner(case.direction, case.operation.fused)
            call()
        _wait(device)
        return call, {}
    except Exception as error:
        return None, _refused(error, device)


def measure_case(
    case: Case, device: torch.device, timer: Any, providers: list[str], seconds: float, lost: Mapping[Step, str]
) -> Iterator[Message]:
    """Announces each step, and ends with the record."""
    record = case.record() | {"status": "failed", "detail": ""}
    record |= {"tables": {}, "tried": {}, "variants": {}, "rejected": {}}
    calls: dict[str, Any] = {}
    contexts: dict[str, Any] = {}
    start = time.monotonic()
    try:
        whole = (case.name, "")
        yield "trying", whole
        if whole in lost:
            raise RuntimeError(lost[whole])
        inputs = measure.problem(case, device)
        for provider in providers:
            record["tables"][provider], tried = forms.forms_tried(case, device, provider)
            record["tried"][provider] = [form.name for form in tried]
            contexts |= {form.name: functools.partial(forms.active, form) for form in tried}
            for form in tried:
                step = (case.name, form.name)
                yield "trying", step
                rejected = {"status": "failed", "detail": lost[step]} if step in lost else {}
                call = None
                if not rejected:
                    call, rejected = try_form(case, form, device)
                if rejected:
                    record["rejected"][form.name] = rejected
                else:
                    calls[form.name] = call
        yield "trying", whole
        if calls:
            calls[EAGER] = inputs.runner(case.direction, case.operation.eager)
            source, target = (torch.zeros(case.bytes_moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
            calls[COPY] = lambda: target.copy_(source)
            record["variants"] = timer.measure(calls, seconds, lambda name: contexts.get(name, nullcontext)())
        record["status"] = "measured" if calls else "no form"
    except DeviceLost as error:
        yield "lost", str(error)
        return
    except Exception as error:  # one case that fails must not cost the others their figures
        try:
            record |= {"variants": {}, **_refused(error, device)}
        except DeviceLost as fault:
            yield "lost", str(fault)
            return
    record["seconds"] = round(time.monotonic() - start, 3)
    yield "case", record


def work(
    plan: list[Case], device_type: str, seconds: float, deadline: float, done: set[str], lost: Mapping[Step, str]
) -> Iterator[Message]:
    """What was measured, message by message; see `supervised`."""
    device = torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    absent = cases.absent(device_type)
    for name in absent:
        losses = sum(form.startswith(f"{name} ") for _, form in lost)
        if losses >= MOST_LOST:
            absent[name] = f"{losses} of its forms took their process with them"
    with measure.steady_machine(None) as machine:
        timer = measure.timer_for(device)
        facts = {"environment": environment(device), "method": {"timer": timer.kind, **machine}}
        yield "facts", facts | {"clocks": clocks(device), "absent": absent}
        providers = [name for name, reason in absent.items() if reason is None]
        if not providers:
            yield "stopped", "no provider of ours has forms to try here"
        for case in plan if providers else []:
            if time.monotonic() > deadline:
                yield "stopped", "time was up"
                break
            if case.name not in done:
                for message in measure_case(case, device, timer, providers, seconds, lost):
                    yield message
                    if message[0] == "lost":
                        return
        measure.forget_problem()


# --- the whole run ---


class Result:
    """What is known so far, as it is written."""

    def __init__(self, plan: list[Case], arguments: argparse.Namespace) -> None:
        self.plan, self.start = plan, time.monotonic()
        self.facts: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.stopped = ""
        self.method = {
            "correctness": "as in run.py, each form at the shape measured, before timing",
            "sampling": f"forms, eager and copy interleaved in random order, {arguments.seconds} s a case; ratios are "
            "paired round by round, [..] is the 95% interval of their median",
            "copy": "a device copy of as many bytes as the byte model says, in the same rounds",
            "forms": "switched between samples, each after two calls that are not timed",
            "only": arguments.only.pattern,
            "limit": arguments.limit if math.isfinite(arguments.limit) else None,
        }

    def known(self) -> dict[str, Any]:
        there, seconds = {record["name"] for record in self.records}, round(time.monotonic() - self.start, 1)
        return {
            "format": 1,
            "kind": "tune",
            "environment": self.facts.get("environment"),
            "method": {**self.facts.get("method", {}), **self.method, "seconds": seconds},
            "clocks": self.facts.get("clocks"),
            "absent": self.facts.get("absent", {}),
            "left_out": {case.name: self.stopped or "cut off" for case in self.plan if case.name not in there},
            "cases": self.records,
        }


def collect(messages: Iterator[Message], result: Result, arguments: argparse.Namespace) -> None:
    """Take what is measured, and keep the file at what is known."""
    compiling = None
    try:
        for kind, content in messages:
            if kind == "facts":
                result.facts = content  # anew from each process
                capability = content["environment"].get("capability")
                if capability and content["absent"]["triton"] is None and arguments.jobs and compiling is None:
                    compiling = Compiling(result.plan, int(capability.replace(".", "")), arguments.jobs)
            elif kind in ("lost", "stopped"):
                result.stopped = content
            elif kind == "case":
                result.records.append(content)
                print(f"[{len(result.records)}/{len(result.plan)}] {content['name']}", file=sys.stderr, flush=True)
            if arguments.json and kind != "trying":
                write_result(arguments.json, result.known())
    except KeyboardInterrupt:  # what was measured is worth its report
        result.stopped = "interrupted"
    finally:
        if compiling is not None:
            compiling.close()


def has_gpu() -> bool:
    """Asked in another process: this one must not have used the GPU when it forks those that do."""
    if torch.version.cuda is None:
        return False
    process = multiprocessing.get_context("fork").Process(target=_tell_gpu)
    process.start()
    process.join()
    return process.exitcode == 0


def _tell_gpu() -> None:
    os._exit(0 if torch.cuda.is_available() else 1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name contains a match (see --list)")
    parser.add_argument("--list", action="store_true", help="print the cases in their order, and stop")
    parser.add_argument("--limit", type=float, metavar="S", default=math.inf, help="take no case after S seconds")
    parser.add_argument(
        "--seconds", type=float, metavar="S", default=SECONDS, help=f"of timing a case; default {SECONDS}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw samples to this file")
    cores = max(1, (os.cpu_count() or 1) - 2)
    parser.add_argument(
        "--jobs", type=int, metavar="N", default=cores, help=f"processes that compile ahead; default {cores}"
    )
    parser.add_argument("--compile", type=int, metavar="ARCH", help="only compile what Triton would launch on sm_ARCH")
    arguments = parser.parse_args(argv)
    try:
        arguments.only = re.compile(arguments.only)
        if arguments.json:
            make_folder(arguments.json.parent)
    except (re.error, OSError) as error:
        parser.error(str(error))
    if arguments.seconds <= 0:
        parser.error(f"--seconds {arguments.seconds}: must be positive")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    planned_for = "cuda" if arguments.compile else arguments.device or ("cuda" if has_gpu() else "cpu")
    plan = [case for case in chosen(planned_for) if arguments.only.search(case.name)]
    if arguments.list:
        print(table(["case", "bytes"], [[case.name, case.bytes_moved] for case in plan]))
        return 0
    if not plan:
        print(f"no case matches {arguments.only.pattern!r}; see --list", file=sys.stderr)
        return 1
    if arguments.compile:
        compiling = Compiling(plan, arguments.compile, max(arguments.jobs, 1))
        failures = compiling.wait()
        print(*failures, f"{len(failures)} of {compiling.count} forms failed to compile", sep="\n")
        return 1 if failures else 0
    if arguments.device == "cuda" and not has_gpu():
        print("--device cuda: torch sees no GPU", file=sys.stderr)
        return 1
    result = Result(plan, arguments)
    todo = functools.partial(work, plan, planned_for, arguments.seconds, result.start + arguments.limit)
    collect(supervised(todo, PATIENCE) if planned_for == "cuda" else todo(set(), {}), result, arguments)
    known = result.known()
    if arguments.json:
        write_result(arguments.json, known)
    if not known["cases"]:
        print(f"nothing was measured: {result.stopped}", file=sys.stderr)
        for provider, reason in known["absent"].items():
            print(f"  {provider}: {reason or 'usable'}", file=sys.stderr)
        return 1
    print(report.text(known))
    return 0 if report.all_right(known) else 1


if __name__ == "__main__":
    sys.exit(main())
