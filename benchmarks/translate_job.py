"""Train an English-Chinese Transformer twice, `fusednorm.Transformer` and `torch.nn.Transformer`, and compare the two.

    PYTHONPATH=. python3 benchmarks/train.py --task translate --small    # a CPU: about two minutes
    PYTHONPATH=. python3 benchmarks/train.py --task translate            # a GPU: 3 + 3 layers, width 256, dropout 0.1

The pairs come from translation catalogues of installed packages (translate_data.py). Both variants start from one
state (translate_model.py) and take the same batches in the same order, side by side in one process. The run fails
(exit status 1) when their losses differ by more than the bounds of translate_report.py, where their origin stands too,
or when the reloaded checkpoint does not give the same test loss bit for bit.

What was learned is shown on pairs held out: chrF of greedy translations, beside that of the model before training and
of the nearest training source's translation (translate_score.py).

Speed is that of every training step, the variants alternating; memory is the most that torch's allocator lends out at
once while a fresh copy of one variant trains.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import lm_data, train_shared, translate_report, translate_score
from benchmarks.measure import load as measure_load
from benchmarks.report.files import make_folder
from benchmarks.translate_data import (
    SPECIAL,
    Encoded,
    Pair,
    Split,
    batch_of,
    buckets,
    encode,
    load_pairs,
    require_packages,
    split_pairs,
    train_tokenizer,
)
from benchmarks.translate_loop import Settings, evaluate, measure_memory, train_twins
from benchmarks.translate_model import VARIANTS, ModelConfig, Translator, make_twins

FULL = {
    "layers": 3,
    "width": 256,
    "vocab": 4000,
    "length": 120,
    "batch": 64,
    "epochs": 40,
    "dropout": 0.1,
    "rate": 1e-3,
    "decay": 0.1,
    "threads": None,
}
SMALL = {
    "layers": 2,
    "width": 128,
    "vocab": 2000,
    "length": 40,
    "batch": 32,
    "epochs": 9,
    "dropout": 0.0,
    "rate": 1.8e-3,
    "decay": 0.3,
    # A batch of 200 tokens gives two threads little to do: 31 ms a step on two idle cores, 37 ms with one thread. Where
    # another process holds one of the cores two threads wait for each other, and a step takes 2,500 ms.
    "threads": 1,
}
EXAMPLES = 15
TRANSLATED_AT_ONCE = 128  # pairs


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py --task translate",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    train_shared.add_options(parser, SMALL)
    train_shared.add_sizes(parser, ("epochs", "layers", "width", "vocab", "batch"), int, FULL, SMALL)
    meaning = f"leave out pairs with a side of more characters; default {FULL['length']}, small {SMALL['length']}"
    parser.add_argument("--length", type=int, metavar="N", help=meaning)
    parser.add_argument("--threads", type=int, metavar="N", help=f"default torch's choice, small {SMALL['threads']}")
    train_shared.add_sizes(parser, ("dropout", "rate", "decay"), float, FULL, SMALL)
    return train_shared.parse(parser, argv, FULL, SMALL)


def save_checkpoint(path: Path, model: Translator, tokenizer: Any) -> None:
    """Write what a later process needs: parameters, model sizes, tokenizer; plain types and tensors only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"variant": model.variant, "config": asdict(model.config), "state": model.state_dict()}
    torch.save(content | {"tokenizer": tokenizer.to_str()}, path)


def load_checkpoint(path: Path, device: torch.device) -> tuple[Translator, Any]:
    """Rebuild model and tokenizer; `weights_only=True` executes nothing that the file contains."""
    saved = torch.load(path, map_location=device, weights_only=True)
    model = Translator(saved["variant"], ModelConfig(**saved["config"])).to(device)
    model.load_state_dict(saved["state"], strict=True)
    return model, lm_data.load_tokenizer(saved["tokenizer"])


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch compute with so many threads on the CPU; None leaves it at its own choice."""
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise ValueError(f"threads is {count}; it must be at least 1")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    with threads(arguments.threads):
        return train_and_report(arguments, device)


def train_and_report(arguments: argparse.Namespace, device: torch.device) -> int:
    # Whatever can be refused is refused before anything is trained.
    lm_data.check_vocab(arguments.vocab, SPECIAL)
    # positions: known when the sentences are cut into tokens
    sizes = {name: getattr(arguments, name) for name in ("vocab", "layers", "width", "dropout")}
    config = ModelConfig(**sizes, positions=1, heads=max(1, arguments.width // 32))
    settings = Settings(
        arguments.epochs, arguments.batch, arguments.rate, arguments.decay, arguments.seed, arguments.dtype
    )
    require_packages()
    folder = Path(arguments.report)
    make_folder(folder)
    split = split_pairs(load_pairs(), arguments.length)
    tokenizer = train_tokenizer(split.train, arguments.vocab)
    train, test = encode(tokenizer, split.train), encode(tokenizer, split.test)
    longest = max(len(row) for pair in train + test for row in pair)
    config = replace(config, vocab=tokenizer.get_vocab_size(), positions=longest)
    twins = make_twins(config, settings.seed, device)
    batches = buckets(train, settings.batch)
    middle = batch_of(train, batches[len(batches) // 2]).to(device)
    served = train_shared.routes(twins["fused"], middle.source, middle.target[:, :-1])
    parameters = sum(p.numel() for p in twins["fused"].parameters())
    machine = train_shared.device_name(device)
    print(f"{len(train):,} training pairs, {len(test):,} held out, {parameters:,} parameters, {machine}", flush=True)

    def translated(model: Translator, by: Any, label: str) -> list[str]:
        return translate_score.translate_all(model, by, test, TRANSLATED_AT_ONCE, device, label)

    before = translated(twins["fused"], tokenizer, "untrained")
    others = measure_load.BackgroundLoad()
    curves, speed = train_twins(twins, train, test, settings, device, partial(print, flush=True))
    taken = others.share()
    checkpoint = folder / "translate_checkpoint.pt"
    save_checkpoint(checkpoint, twins["fused"], tokenizer)
    reloaded, reloaded_tokenizer = load_checkpoint(checkpoint, device)
    reloaded_loss, test_loss = evaluate(reloaded, test, settings, device), curves["fused"]["test"][-1]
    print("translating and measuring memory", flush=True)
    nearest = translate_score.nearest(split.train, [pair.source for pair in split.test])
    translations = {
        "untrained": before,
        "nearest": [pair.target for pair in nearest],
        "eager": translated(twins["eager"], tokenizer, "eager"),
        "fused": translated(reloaded, reloaded_tokenizer, "fused"),
    }
    report = {
        "title": f"Translation with fused and eager Transformers, {settings.dtype}",
        "model": asdict(config),
        "settings": asdict(settings),
        "parameters": parameters,
        "data": data_of(split, train, arguments.length),
        "environment": train_shared.environment(device, served, arguments.fused_command, taken),
        "curves": curves,
        "speed": speed,
        "memory": {v: measure_memory(v, config, settings, middle, device) for v in VARIANTS},
        "checks": {
            **translate_report.verdict(curves, settings.dtype, config.dropout),
            "reloaded_test_loss": reloaded_loss,
            "reload_equal": repr(reloaded_loss) == repr(test_loss),  # NaN equals NaN here
        },
        "scores": {name: translate_score.scores(texts, split.test) for name, texts in translations.items()},
        "examples": examples_of(split, nearest, translations),
    }
    paths = translate_report.write(report, folder)
    print("\n" + translate_report.summary(report))
    if not any(path.suffix == ".png" for path in paths):
        print("no pictures: matplotlib is missing (pip install matplotlib)")
    print("written:", *paths, checkpoint)
    faults = list(report["checks"]["faults"])
    if not report["checks"]["reload_equal"]:
        faults.append(f"the reloaded checkpoint's test loss is {reloaded_loss!r}, before saving it was {test_loss!r}")
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    return 1 if faults else 0


def data_of(split: Split, train: Encoded, length: int) -> dict[str, Any]:
    pairs = split.train + split.test
    return {
        "train_pairs": len(split.train),
        "test_pairs": len(split.test),
        "by_origin": dict(Counter(pair.origin for pair in pairs)),
        "left_out": split.left_out,
        "length": length,
        "train_tokens": sum(len(target) - 1 for _, target in train),
    }


def examples_of(split: Split, nearest: Sequence[Pair], translations: dict[str, list[str]]) -> list[dict[str, str]]:
    """Held-out pairs at equal distances, so that nobody chose them."""
    chosen = range(0, len(split.test), max(1, len(split.test) // EXAMPLES))
    return [
        {
            "source": split.test[i].source,
            "reference": split.test[i].target,
            "fused": translations["fused"][i],
            "nearest": nearest[i].target,
            "nearest_source": nearest[i].source,
        }
        for i in chosen
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return train_shared.guarded(run, parse(argv))
