"""Measure fusednorm against eager torch and other baselines on the best device here (a GPU, else the CPU).

    python3 -m benchmarks.run --report DIR               # tables, raw JSON, Markdown, pictures
    python3 -m benchmarks.run --only 'rms.*4096' --baselines all
    python3 -m benchmarks.run --compare OLD.json

Every case is checked against float64 at its own shape before it is timed; a wrong one gets no figure.
Exit status: 0; 1 when a case was wrong or none was measured; 3 when --compare found a case slower beyond the spread.
An interrupt (Ctrl-C) ends the measuring, and what was measured is written as ever. The file of --json is there from the
first half minute on: a kernel that never returns, or a machine that is taken away, costs only what came after it.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from importlib import util
from pathlib import Path
from typing import Any

import torch

import fusednorm
from benchmarks import cases, measure
from benchmarks.baselines import ATTENTION, BASELINES, UNTUNED, BaselineError, applies, served
from benchmarks.cases import Case
from benchmarks.cases import targets as cases_targets
from benchmarks.measure.machine import clocks, environment
from benchmarks.report import pages as report
from benchmarks.report.files import make_folder, read_result, write_result
from benchmarks.report.stats import AUTOMATIC
from benchmarks.report.table import table
from fusednorm.dispatch import tuned
from fusednorm.tuning import load as measure_load
from fusednorm.tuning.timers import alone

PEERS = (*ATTENTION, *(name for name, (module, _) in BASELINES.items() if module is not None))
SECONDS = {"quick": 0.1, "grid": 0.1, "default": 0.2, "full": 0.5, "targets": 0.05}
WRITE_EVERY = 20.0  # seconds; a result of five hundred cases takes a tenth of one


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="level", action="store_const", const="quick", default="default")
    size.add_argument(
        "--grid", dest="level", action="store_const", const="grid", help="what publish.crossovers asks for"
    )
    size.add_argument("--full", dest="level", action="store_const", const="full", help="all widths, rows, directions")
    size.add_argument(
        "--targets",
        dest="level",
        action="store_const",
        const="targets",
        help="what a GPU's targets are about (see publish.targets), most important first; on a CPU the default sweep",
    )
    parser.add_argument("--only", metavar="REGEX", help="cases whose name contains a match (see --list)")
    parser.add_argument("--list", action="store_true", help="print the cases with their byte and FLOP models, and stop")
    parser.add_argument(
        "--baselines",
        metavar="NAMES",
        help=f"comma-separated, besides eager: {', '.join(n for n in BASELINES if n != 'eager')}; "
        "peers (default): the sdpa-* and, on a GPU, other libraries that are importable; "
        "untuned: ours without the file of `fusednorm tune`; all; none; of --targets, "
        "peers,compile is the default, and a case is compared with what its target names",
    )
    parser.add_argument(
        "--provider", metavar="NAME", help="force one of fusednorm's providers (default: its own choice)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's, at most the cores)")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"of timing a case; default {SECONDS}")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="S",
        help="take no case after S seconds; default 120 on a CPU unless --full or --grid",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write benchmark.json, .md, .html and pictures here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw result to this file")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="flag changes beyond the spread")
    arguments = parser.parse_args(argv)
    try:
        arguments.only = re.compile(arguments.only or "")
    except re.error as error:
        parser.error(f"--only {arguments.only!r} is no regular expression: {error}")
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads {arguments.threads}: must be at least 1")
    if arguments.seconds is not None and arguments.seconds <= 0:
        parser.error(f"--seconds {arguments.seconds}: must be positive")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if arguments.level == "targets" and (arguments.device or measure.best_device().type) == "cpu":
        arguments.level = "default"
    try:
        cases.require_provider(arguments.provider)
        for folder in filter(None, (arguments.report, arguments.json and arguments.json.parent)):
            make_folder(folder)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if arguments.compare:
        try:
            arguments.compare = read_result(arguments.compare)
            arguments.compare["cases"]
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--compare: {error!r}")
    try:
        default = "peers,compile" if arguments.level == "targets" else "peers"
        arguments.baselines = _wanted(default if arguments.baselines is None else arguments.baselines)
    except ValueError as error:
        parser.error(f"--baselines: {error}")
    return arguments


def _wanted(names: str) -> list[str]:
    groups = {"peers": list(PEERS), "all": [n for n in BASELINES if n != "eager"], "none": [], "eager": []}
    wanted: list[str] = []
    for name in filter(None, names.split(",")):
        if name not in groups and name not in BASELINES:
            raise ValueError(f"unknown {name!r}; known are {', '.join([*BASELINES, 'peers', 'all', 'none'])}")
        wanted += groups.get(name, [name])
    return list(dict.fromkeys(wanted))


def present(wanted: Iterable[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The baselines that can be used here, eager first, and why not each other one."""
    used, absent = ["eager"], {}
    for name in (n for n in BASELINES if n != "eager"):
        module = BASELINES[name][0]
        if name not in wanted:
            absent[name] = "not asked for"
        elif name == UNTUNED and tuned.file(device) is None:
            absent[name] = "no file of `fusednorm tune` is in force"
        elif module is not None and util.find_spec(module) is None:
            absent[name] = f"{module} is not installed"
        elif module is not None and device.type != "cuda":
            absent[name] = "needs a GPU"
        else:
            used.append(name)
    return used, absent


# --- one case ---


def run_case(case: Case, device: torch.device, timer: Any, roofline: Any, baselines: list[str], seconds: float) -> dict:
    """Check, then time; the record holds figures only if the result was right."""
    record = case.record()
    record |= {"status": "wrong", "detail": "", "provider": "?", "how": "?", "notes": {}, "variants": {}}
    try:
        start = time.perf_counter()
        verdict = measure.check(case, device)
        record["check_seconds"] = round(time.perf_counter() - start, 3)
        record["detail"] = verdict.detail
        if not verdict.ok:
            return record
        op, problem = case.operation, measure.problem(case, device)
        # one set of inputs for all variants: addresses and cache lines are the same for each
        leaves = problem.leaves_for(case.direction)
        build = op.fused(leaves)
        record["provider"], record["how"], record["explain"] = cases.served_by(build)

        def bind(call: cases.Call) -> Any:
            return cases.runner(call, leaves.values(), problem.cotangents, case.direction)

        calls = {"fused": bind(build)}
        for name in (name for name in baselines if applies(name, op)):
            try:
                with served(name):
                    calls[name] = bind(BASELINES[name][1](op, leaves))
                    validate_baseline(name, case, device, calls[name], record["notes"])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # what a baseline cannot do is no fault of ours
                calls.pop(name, None)
                what = error if isinstance(error, BaselineError) else f"failed: {type(error).__name__}: {error}"
                record["notes"][name] = str(what).replace("\n", " ")[:200]
        flop_dtype = op.flop_dtype(case.torch_dtype)
        record["roofline_seconds"] = roofline.seconds(case.bytes_moved, case.flops, flop_dtype)
        if op.family == "layer" and case.direction != "forward":
            record["kept_bytes"] = {
                "fused": op.kept_bytes(leaves, build),
                "eager": op.kept_bytes(leaves, op.eager(leaves)),
            }
        record["variants"] = timer.measure(calls, seconds, served if UNTUNED in calls else alone)
        record["status"] = "measured"
    except torch.OutOfMemoryError as error:
        record |= {"status": "out of memory", "detail": str(error).splitlines()[0], "variants": {}}
    except Exception as error:  # one case that fails must not cost the others their figures
        record |= {"status": "failed", "detail": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]}
    return record


def validate_baseline(name: str, case: Case, device: torch.device, call: Any, notes: dict[str, str]) -> None:
    """Run a baseline once and, unless it draws its own mask, hold it against float64."""
    call()
    if name == "eager":  # what the budget is measured by
        return
    op, make = case.operation, BASELINES[name][1]
    if op.draws_mask:
        notes[name] = "draws its own mask: unchecked"
        return
    verdict = measure.check(case, device, lambda t, seed: make(op, t))
    if verdict.worst > measure.PEER_TOLERANCE:
        raise BaselineError(f"wrong: {verdict.detail}")
    if not verdict.ok:
        notes[name] = f"less accurate: {verdict.detail}"


# --- the whole run ---


def progress(chosen: list[Case]) -> Iterator[Case]:
    try:
        from tqdm import tqdm
    except ImportError:
        for index, case in enumerate(chosen, 1):
            if index % 10 == 1 or index == len(chosen):
                print(f"[{index}/{len(chosen)}] {case.name}", file=sys.stderr, flush=True)
            yield case
        return
    bar = tqdm(chosen, unit="case", dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10)
    for case in bar:
        bar.set_postfix_str(case.name, refresh=False)
        yield case


def run(
    arguments: argparse.Namespace, chosen: list[Case], device: torch.device, excluded: Mapping[str, str]
) -> dict[str, Any]:
    """Measure what was chosen; `excluded` says by name why the sweep itself leaves some cases out."""
    seconds, on_targets = arguments.seconds or SECONDS[arguments.level], arguments.level == "targets"
    limit = arguments.limit or (120.0 if device.type == "cpu" and arguments.level not in ("full", "grid") else math.inf)
    start, clocks_before = time.monotonic(), clocks(device)
    facts = environment(device)
    free = measure.available_memory(device)
    left_out = dict(excluded) | {
        case.name: f"needs about {report.bytes_text(case.memory_needed)}"
        for case in chosen
        if free is not None and case.memory_needed > 0.8 * free
    }
    used, absent = present(arguments.baselines, device)
    forced = fusednorm.use_provider(arguments.provider) if arguments.provider else nullcontext()
    with measure.steady_machine(arguments.threads) as machine, forced:
        timer, others = measure.timer_for(device), measure_load.BackgroundLoad()
        dtypes = list(dict.fromkeys(case.operation.flop_dtype(case.torch_dtype) for case in chosen))
        kept = [case for case in chosen if case.name not in left_out]
        most = max((case.bytes_moved for case in kept), default=0)
        # few samples a case, but what all are held against is the fastest of many
        roofline = measure.measure_roofline(device, timer, most, dtypes, seconds / (1 if on_targets else 4))
        records: list[dict] = []
        method = {
            "timer": timer.kind,
            "correctness": "max|ours - fp64| <= 2 max|eager - fp64| + one rounding, at each shape measured, before "
            f"timing; up to {measure.DRAWS} draws",
            "sampling": f"variants interleaved in random order, {seconds} s a case, {measure.SLOW_ROUNDS} to "
            f"{measure.MAX_ROUNDS} rounds; ratios are paired round by round, [..] is the 95% interval of their median",
            "roofline": "the fastest device copy, in this run, of as many bytes as the byte model says; or the matmul "
            "rate",
            **machine,
            "provider": arguments.provider or AUTOMATIC,
            "level": arguments.level,
            "only": arguments.only.pattern,
            "clocks before": clocks_before,
        }

        def known(reason: str) -> dict[str, Any]:
            """The result as it is now; `reason` is why what is neither measured nor left out is not there."""
            there = {record["name"] for record in records} | left_out.keys()
            return {
                "format": 1,
                "environment": facts,
                "method": method | {"others": others.share(), "seconds": round(time.monotonic() - start, 1)},
                "roofline": asdict(roofline),
                "baselines": {"used": used, "absent": absent},
                "left_out": left_out | {case.name: reason for case in kept if case.name not in there},
                "cases": records,
            }

        written = time.monotonic()
        try:
            for case in progress(kept):
                if time.monotonic() - start > limit:
                    left_out[case.name] = f"time was up ({limit:g} s)"
                    continue
                here = [name for name in used if not on_targets or cases_targets.compares(case, name)]
                if any(name.startswith("compile") for name in here):
                    torch._dynamo.reset()  # every case is another specialisation of the same code
                records.append(run_case(case, device, timer, roofline, here, seconds))
                if arguments.json and time.monotonic() - written > WRITE_EVERY:
                    write_result(arguments.json, known("cut off"))
                    written = time.monotonic()
        except KeyboardInterrupt:  # what was measured is worth its report
            pass
        measure.forget_problem()
        result = known("interrupted")
    result["method"]["clocks after"] = clocks(device)
    return result


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device) if arguments.device else measure.best_device()
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if arguments.level == "targets":
        every, limited = cases_targets.every(), {}
    else:
        sweep = cases.sweep_of(device.type, arguments.level)
        every, limited = sweep.cases(), sweep.left_out()
    chosen = [case for case in every if arguments.only.search(case.name)]
    excluded = {name: reason for name, reason in limited.items() if arguments.only.search(name)}
    if arguments.list:
        rows = [[c.name, c.bytes_moved, c.flops, f"{c.flops / c.bytes_moved:.2f}"] for c in chosen]
        print(table(["case", "bytes", "FLOP", "FLOP/byte"], rows))
        return 0
    if not chosen:
        print(f"no case of the {arguments.level} sweep matches {arguments.only.pattern!r}; see --list", file=sys.stderr)
        for name, reason in excluded.items():
            print(f"left out: {name}: {reason}", file=sys.stderr)
        return 2
    result = run(arguments, chosen, device, excluded)
    wrong = report.wrong_text(result)
    parts = [report.headline(result), report.pivots(result), report.left_out_text(result)]
    parts += ["Summary\n\n" + report.summary(result)]
    parts += ["Who served the cases\n\n" + report.providers_text(result)]
    parts += ["Kept for the backward\n\n" + kept] if (kept := report.kept_text(result)) else []
    parts += ["Where we lose\n\n" + report.losses_text(result)]
    parts += ["No figures\n\n" + wrong] if wrong else []
    slower = 0
    if arguments.compare:
        text, slower = report.compare(arguments.compare, result)
        parts.append(text)
    parts.append("Conclusion\n\n" + report.conclusion(result))
    print("\n\n".join(filter(None, parts)))
    if arguments.json:
        write_result(arguments.json, result)
    if arguments.report:
        print("\nwritten:", *report.write(result, arguments.report), sep="\n  ")
    print(f"{len(result['cases'])} cases in {result['method']['seconds']:.0f} s, {len(result['left_out'])} left out")
    if not report.measured(result) or any(record["status"] in ("wrong", "failed") for record in result["cases"]):
        return 1
    return 3 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
