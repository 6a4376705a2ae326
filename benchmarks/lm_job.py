"""Train a small language model twice, with the layers of fusednorm and with torch's, and compare the two runs.

    PYTHONPATH=. python3 benchmarks/train.py --small            # a CPU with two cores: about three minutes
    PYTHONPATH=. python3 benchmarks/train.py                    # a GPU: 4 layers, width 512
    PYTHONPATH=. python3 benchmarks/train.py --text book.txt

The text is `pydoc_data.topics` (see lm_data.py), the model a pre-norm decoder-only Transformer whose two variants
share one initial state (lm_model.py). Both take the same batches in the same order, side by side in one process. The
run fails (exit status 1) when their losses differ by more than the bound of lm_report.py, where its origin stands too
(with dropout, which each draws for itself, when they end further apart than two seeds would), or when the reloaded
checkpoint does not give the same test loss bit for bit.

Speed is that of whole training steps, the variants alternating; memory is the most that torch's allocator lends out at
once while a fresh copy of one variant trains.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import lm_data, lm_loop, lm_report, train_report, train_shared
from benchmarks.lm_loop import Settings
from benchmarks.lm_model import VARIANTS, LanguageModel, ModelConfig, continue_text, make_twins
from benchmarks.measure import load as measure_load
from benchmarks.report.files import make_folder

FULL = {
    "layers": 4,
    "width": 512,
    "vocab": 10000,
    "context": 256,
    "batch": 32,
    "epochs": 10,
    "dropout": 0.1,
    "rate": 5e-4,
}
SMALL = {"layers": 2, "width": 192, "vocab": 2000, "context": 64, "batch": 8, "epochs": 4, "dropout": 0.0, "rate": 1e-3}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py --task lm", description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter
    )
    train_shared.add_options(parser, SMALL)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to train on (default: pydoc_data.topics)")
    train_shared.add_sizes(parser, ("epochs", "layers", "width", "vocab", "context", "batch"), int, FULL, SMALL)
    train_shared.add_sizes(parser, ("dropout", "rate"), float, FULL, SMALL)
    return train_shared.parse(parser, argv, FULL, SMALL)


def save_checkpoint(path: Path, model: LanguageModel, tokenizer: Any) -> None:
    """Write what a later process needs: parameters, model sizes, tokenizer; plain types and tensors only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "variant": model.variant,
            "config": asdict(model.config),
            "state": model.state_dict(),
            "tokenizer": tokenizer.to_str(),
        },
        path,
    )


def load_checkpoint(path: Path, device: torch.device) -> tuple[LanguageModel, Any]:
    """Rebuild model and tokenizer; `weights_only=True` executes nothing that the file contains."""
    saved = torch.load(path, map_location=device, weights_only=True)
    model = LanguageModel(saved["variant"], ModelConfig(**saved["config"])).to(device)
    model.load_state_dict(saved["state"], strict=True)
    return model, lm_data.load_tokenizer(saved["tokenizer"])


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    # Whatever can be refused is refused before anything is trained.
    lm_data.check_vocab(arguments.vocab)
    config = ModelConfig(
        vocab=arguments.vocab,
        context=arguments.context,
        layers=arguments.layers,
        width=arguments.width,
        heads=max(1, arguments.width // 64),
        dropout=arguments.dropout,
    )
    settings = Settings(arguments.epochs, arguments.batch, arguments.rate, arguments.seed, arguments.dtype)
    lm_data.require_tokenizers()
    documents, source = lm_data.load_documents(arguments.text)
    folder = Path(arguments.report)
    make_folder(folder)
    split = lm_data.split_documents(documents, source)
    print(f"training a tokenizer of at most {arguments.vocab} entries on {split.source}", flush=True)
    tokenizer = lm_data.train_tokenizer(split.train, arguments.vocab)
    train_stream, test_stream = (lm_data.encode(tokenizer, side) for side in (split.train, split.test))
    train = lm_data.blocks(train_stream, arguments.context).to(device)
    test = lm_data.blocks(test_stream, arguments.context).to(device)
    config = replace(config, vocab=tokenizer.get_vocab_size())
    twins = make_twins(config, settings.seed, device)
    served = train_shared.routes(twins["fused"], train[: settings.batch, :-1])
    parameters = sum(p.numel() for p in twins["fused"].parameters())
    machine = train_shared.device_name(device)
    print(f"{train_stream.numel():,} training tokens, {parameters:,} parameters, {machine}", flush=True)

    curves = {v: asdict(c) for v, c in lm_loop.train_twins(twins, train, test, settings).items()}
    checkpoint = folder / "train_checkpoint.pt"
    save_checkpoint(checkpoint, twins["fused"], tokenizer)
    reloaded, reloaded_tokenizer = load_checkpoint(checkpoint, device)
    reloaded_loss = lm_loop.evaluate(reloaded, test, settings.batch, settings.dtype)

    prompt = test[0, : config.context // 2]
    written = continue_text(reloaded, prompt[None], 60, settings.seed)[0, len(prompt) :].cpu().tolist()
    unigram = lm_data.unigram_loss(train_stream, test[:, 1:].cpu(), config.vocab)
    test_loss = curves["fused"]["test"][-1]
    test_tokens, test_bytes = test_stream.numel(), sum(len(chunk.encode()) for chunk in split.test)
    print("measuring speed and memory", flush=True)
    others = measure_load.BackgroundLoad()
    speed = lm_loop.measure_speed(twins, train[: settings.batch], settings)
    taken = others.share()
    report = {
        "title": f"Training with fused and eager Transformer layers, {settings.dtype}",
        "model": asdict(config),
        "settings": asdict(settings),
        "parameters": parameters,
        "data": {
            "source": split.source,
            "train_tokens": train_stream.numel(),
            "test_tokens": test_tokens,
            "vocab": config.vocab,
            "repeated_characters": split.repeated_characters,
        },
        "environment": train_shared.environment(device, served, arguments.fused_command, taken),
        "curves": curves,
        "unigram_loss": unigram,
        "speed": speed,
        "memory": {v: lm_loop.measure_memory(v, config, settings, device) for v in VARIANTS},
        "checks": {
            **train_report.verdict(curves, lm_report.BOUNDS[settings.dtype], config.dropout),
            "reloaded_test_loss": reloaded_loss,
            "reload_equal": repr(reloaded_loss) == repr(test_loss),  # NaN equals NaN here
        },
        "quality": {
            "perplexity": math.exp(min(test_loss, 700.0)),
            "unigram_perplexity": math.exp(unigram),
            "bits_per_byte": lm_data.bits_per_byte(test_loss, test_tokens, test_bytes),
            "unigram_bits_per_byte": lm_data.bits_per_byte(unigram, test_tokens, test_bytes),
        },
        "notes": "Speed: whole training steps, the two variants alternating in one process.",
        "sample": {
            "prompt": reloaded_tokenizer.decode(prompt.cpu().tolist()),
            "continuation": reloaded_tokenizer.decode(written),
        },
    }
    paths = lm_report.write(report, folder)
    print("\n" + lm_report.summary(report))
    if not any(path.suffix == ".png" for path in paths):
        print("no picture: matplotlib is missing (pip install matplotlib)")
    print("written:", *paths, checkpoint)
    faults = list(report["checks"]["faults"])
    if not report["checks"]["reload_equal"]:
        faults.append(f"the reloaded checkpoint's test loss is {reloaded_loss!r}, before saving it was {test_loss!r}")
    for fault in faults:
        print(f"FAILED: {fault}", file=sys.stderr)
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    return train_shared.guarded(run, parse(argv))
