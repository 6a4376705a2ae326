"""The task `lm`: a decoder-only language model on `pydoc_data.topics`, or on a text of your own.

PYTHONPATH=. python3 examples/train.py --small            # a CPU with two cores: about three minutes
PYTHONPATH=. python3 examples/train.py                    # a GPU: 4 layers, width 512
PYTHONPATH=. python3 examples/train.py --text book.txt
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch

from examples.language_model import data
from examples.language_model.data import END, Rows
from examples.language_model.model import LanguageModel, continue_text
from examples.training.job import Job, Report, Said, Size
from examples.training.loop import Curves


class LanguageModelJob(Job):
    task, files = "lm", "train"
    description = (
        "Train a small language model twice, with the layers of fusednorm and with torch's, and compare the two."
    )
    title = "Training with fused and eager Transformer layers"
    packages = {"tokenizers": "tokenizers"}
    special = (END,)
    betas = (0.9, 0.95)
    head_width = 64
    sizes = {
        "epochs": Size(10, 4),
        "layers": Size(4, 2),
        "width": Size(512, 192),
        "vocab": Size(10000, 2000),
        "context": Size(256, 64),
        "batch": Size(32, 8),
        "dropout": Size(0.1, 0.0),
        "rate": Size(5e-4, 1e-3),
        "decay": Size(0.0, 0.0),
        "threads": Size(None, None),
    }
    # With --small on a CPU, against torch's layers: float32 at most 8.6e-7 (2 seeds, native and hand-written kernels, 2
    # to 4 epochs; 1.1e-5 at one step), bfloat16 4.7e-4 (1 epoch; 9.5e-3 at a step). The bound leaves orders of
    # magnitude for other kernels, larger models and longer runs. It is still narrow enough to see an error as small as
    # eps = 1e-6 instead of 1e-5 in the norms, which moves the float32 losses by 5e-3 in the first epoch.
    bounds = {"float32": 1e-3, "bfloat16": 2e-2}
    model = LanguageModel
    train: Rows
    test: Rows

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--text", metavar="FILE", help="UTF-8 text to train on (default: pydoc_data.topics)")

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        super().__init__(arguments, device)
        self.context = arguments.context

    def load(self) -> list[str]:
        self.split = data.split_documents(*data.load_documents(self.arguments.text))
        self.source = self.split.source
        return self.split.train

    def encode(self, tokenizer: Any) -> str:
        self.vocab = tokenizer.get_vocab_size()
        self.streams = [data.encode(tokenizer, side) for side in (self.split.train, self.split.test)]
        self.train, self.test = (Rows(data.blocks(stream, self.context)) for stream in self.streams)
        return f"{self.streams[0].numel():,} training tokens"

    def data_facts(self) -> Report:
        return {
            "source": self.source,
            "train_tokens": self.streams[0].numel(),
            "test_tokens": self.streams[1].numel(),
            "vocab": self.vocab,
            "repeated_characters": self.split.repeated_characters,
        }

    def after(self, twins: Mapping[str, Any], reloaded: Any, tokenizer: Any, curves: Curves) -> Report:
        prompt = self.test.tokens[0, : self.context // 2]
        written = continue_text(reloaded, prompt[None].to(self.device), 60, self.arguments.seed)[0, len(prompt) :]
        unigram = data.unigram_loss(self.streams[0], self.test.tokens[:, 1:], self.vocab)
        test_loss = curves["fused"]["test"][-1]
        test_tokens, test_bytes = self.streams[1].numel(), sum(len(chunk.encode()) for chunk in self.split.test)
        return {
            "unigram_loss": unigram,
            "quality": {
                "perplexity": math.exp(min(test_loss, 700.0)),
                "unigram_perplexity": math.exp(unigram),
                "bits_per_byte": data.bits_per_byte(test_loss, test_tokens, test_bytes),
                "unigram_bits_per_byte": data.bits_per_byte(unigram, test_tokens, test_bytes),
            },
            "sample": {
                "prompt": tokenizer.decode(prompt.tolist()),
                "continuation": tokenizer.decode(written.tolist()),
            },
        }

    @staticmethod
    def say(report: Report) -> Said:
        facts, quality = report["data"], report["quality"]
        sample = f"{report['sample']['prompt']} [...] {report['sample']['continuation']}"
        return Said(
            f"Text: {facts['source']}, {facts['train_tokens']:,} tokens to train on, {facts['test_tokens']:,} to test "
            f"on, vocabulary {facts['vocab']:,}; {facts['repeated_characters']:,} characters of repeated paragraphs "
            "left out.",
            [
                f"Test perplexity {quality['perplexity']:.1f} per token; always predicting the token frequencies gives "
                f"{quality['unigram_perplexity']:.1f}. Bits per byte: {quality['bits_per_byte']:.3f}, "
                f"unigram {quality['unigram_bits_per_byte']:.3f}."
            ],
            ["A sample (prompt from the test text, then the model's own words):", "", "```text", sample, "```"],
        )
