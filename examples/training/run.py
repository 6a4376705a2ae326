"""Train a model of a job twice, with the layers of fusednorm and with torch's, and compare the two runs.

Both variants start from one state and take the same batches in the same order, side by side in one process. The run
fails (exit status 1) in three cases. Their losses differ by more than the job's bound; with dropout, which each draws
for itself, they end further apart than two seeds would. Or the reloaded checkpoint does not give the same test loss bit
for bit. Or a run as long as that of --small, or longer, has not learned what the job asks of it.

Speed is that of all training steps but the first few, the variants alternating. Memory is the most that torch's
allocator lends out at once while a fresh copy of one variant trains.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.measure.machine import environment
from benchmarks.report.files import make_folder
from examples.training import report as reports
from examples.training import text
from examples.training.job import Job, Report
from examples.training.loop import evaluate, train_twins
from examples.training.machine import DTYPES, choose_device, deterministic, provider_context, threads
from examples.training.measure import measure_dropout, measure_memory, routes
from examples.training.model import VARIANTS, load_checkpoint, make_twins, save_checkpoint
from examples.training.pictures import plot_curves
from fusednorm.tuning import load as measure_load


def parse(kind: type[Job], argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, fill in the sizes, and keep the command that trains through the fused op on any machine."""
    parser = argparse.ArgumentParser(prog=f"train.py --task {kind.task}", description=kind.description)
    small = {name: size.small for name, size in kind.sizes.items()}
    parser.add_argument("--task", metavar="NAME", help="which model to train; each task has options of its own")
    parser.add_argument("--small", action="store_true", help=f"sized for two CPU cores: {small}")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="bfloat16 runs under autocast")
    parser.add_argument("--provider", metavar="NAME", help="force a provider of fusednorm (default: automatic choice)")
    parser.add_argument("--report", metavar="DIR", default="bench-report", help="default bench-report")
    kind.add_options(parser)
    for name, size in kind.sizes.items():
        number = float if isinstance(size.full, float) else int
        full, least = ("torch's choice" if value is None else value for value in size[:2])
        meaning = f"{size.meaning}default {full}, small {least}"
        parser.add_argument(f"--{name}", type=number, metavar="X" if number is float else "N", help=meaning)
    arguments = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    arguments.fused_command = shlex.join(["python3", "examples/train.py", *given, "--provider", "reference"])
    for name, size in kind.sizes.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, size.small if arguments.small else size.full)
    return arguments


def main(kind: type[Job], argv: Sequence[str] | None) -> int:
    """Run a job deterministically, on its device, with its provider; say what it refuses and return 2."""
    arguments = parse(kind, argv)
    # cuBLAS reads this when it starts; without it torch refuses deterministic matrix products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        job = kind(arguments, choose_device(arguments.device))
        cases.require_provider(arguments.provider)
        with deterministic(), provider_context(arguments.provider), threads(arguments.threads):
            return train_and_report(job)
    except (text.MissingPackage, ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


def train_and_report(job: Job) -> int:
    # Whatever can be refused is refused before anything is trained.
    arguments, device, settings = job.arguments, job.device, job.settings()
    vocab, tokenizer = getattr(arguments, "vocab", None), None
    if job.special is not None:
        text.check_vocab(vocab, job.special)
    job.config(vocab)
    text.require_packages(job.task, job.packages)
    texts = job.load()
    folder = Path(arguments.report)
    make_folder(folder)
    if job.special is not None:
        print(f"training a tokenizer of at most {vocab} entries on {job.source}", flush=True)
        tokenizer = text.train_tokenizer(texts, vocab, job.special)
        vocab = tokenizer.get_vocab_size()
    amount = job.encode(tokenizer)
    config = job.config(vocab)
    twins = make_twins(job.model, config, settings.seed, device)
    batches = job.train.batches(settings.batch)
    middle = batches[(len(batches) - 1) // 2].to(device)
    served = routes(twins["fused"], *middle.inputs)
    parameters = sum(p.numel() for p in twins["fused"].parameters())
    facts = environment(device)
    print(f"{amount}, {parameters:,} parameters, {facts['device']}", flush=True)

    job.before(twins)
    others = measure_load.BackgroundLoad()
    curves, speed = train_twins(twins, job.train, job.test, settings, device, partial(print, flush=True))
    taken = others.share()
    checkpoint = folder / f"{job.files}_checkpoint.pt"
    save_checkpoint(checkpoint, twins["fused"], tokenizer)
    reloaded, reloaded_tokenizer = load_checkpoint(checkpoint, job.model, device)
    reloaded_loss, test_loss = evaluate(reloaded, job.test, settings, device), curves["fused"]["test"][-1]
    print("measuring quality and memory", flush=True)
    report: Report = {
        "title": f"{job.title}, {settings.dtype}",
        "unit": job.unit,
        "model": {name: value for name, value in asdict(config).items() if value is not None},
        "settings": asdict(settings),
        "parameters": parameters,
        "data": job.data_facts(),
        "environment": {
            **facts,
            "threads": torch.get_num_threads(),
            "route": served,
            "fused_command": arguments.fused_command,
            "others": taken,
        },
        "curves": curves,
        "speed": speed,
        "memory": {v: measure_memory(job.model, v, config, settings, middle) for v in VARIANTS},
        # equal curves are proved without dropout; what it costs is measured beside
        "with_dropout": None if config.dropout else measure_dropout(job.model, config, settings, batches, device),
        "checks": {
            **reports.verdict(curves, job.bounds[settings.dtype], config.dropout),
            "reloaded_test_loss": reloaded_loss,
            "reload_equal": repr(reloaded_loss) == repr(test_loss),  # NaN equals NaN here
        },
        **job.after(twins, reloaded, reloaded_tokenizer, curves),
    }
    report["checks"]["not_learned"] = job.not_learned(report) if job.is_held() else []
    paths = write(job, report, folder)
    print("\n" + reports.summary(job, report))
    if not any(path.suffix == ".png" for path in paths):
        print("no pictures: matplotlib is missing (pip install matplotlib)")
    print("written:", *paths, checkpoint)
    faults = [*report["checks"]["faults"], *report["checks"]["not_learned"]]
    if not report["checks"]["reload_equal"]:
        faults.append(f"the reloaded checkpoint's test loss is {reloaded_loss!r}, before saving it was {test_loss!r}")
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    return 1 if faults else 0


def write(job: Job | type[Job], report: Report, folder: Path) -> list[Path]:
    """Write JSON, Markdown and, where matplotlib is there, pictures: of the curves, and the job's own."""
    curves = folder / f"{job.files}_curves.png"
    drawn = {curves: "Loss curves"} | job.draw(report, folder) if plot_curves(report, curves) else {}
    said = reports.summary(job, report) + "".join(f"\n![{caption}]({path.name})\n" for path, caption in drawn.items())
    data = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    files = {folder / f"{job.files}.json": data, folder / f"{job.files}.md": said}
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    return [*files, *drawn]
