"""The task `translate`: an encoder-decoder Transformer that translates from English to Chinese.

    PYTHONPATH=. python3 examples/train.py --task translate --small    # a CPU: about two minutes
    PYTHONPATH=. python3 examples/train.py --task translate            # a GPU: 3 + 3 layers, width 256, dropout 0.1

What was learned is shown on pairs held out: chrF of greedy translations, beside that of the model before training and
of the nearest training source's translation (score.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report.table import table
from examples.training.job import Job, Report, Said, Size
from examples.training.loop import Curves
from examples.training.pictures import COLOURS, draw_bars, new_figure, save
from examples.training.report import subtitles
from examples.translation import score
from examples.translation.data import PACKAGES, SPECIAL, Pair, Sentences, Split, encode, load_pairs, split_pairs
from examples.translation.model import Translator

# What translates, and how the report names and draws it.
NAMES = {
    "untrained": "model before training",
    "nearest": "nearest training source",
    "eager": "eager, trained",
    "fused": "fused, trained",
}
EXAMPLES = 15
TRANSLATED_AT_ONCE = 128  # pairs


class TranslationJob(Job):
    task, files = "translate", "translate"
    description = "Train an English-Chinese Transformer twice, of fusednorm and of torch.nn, and compare the two."
    title = "Translation with fused and eager Transformers"
    packages = {**PACKAGES, "sacrebleu": "sacrebleu", "tokenizers": "tokenizers"}
    special = SPECIAL
    betas = (0.9, 0.98)
    head_width = 32
    sizes = {
        "epochs": Size(40, 9),
        "layers": Size(3, 2),
        "width": Size(256, 128),
        "vocab": Size(4000, 2000),
        "length": Size(120, 40, "leave out pairs with a side of more characters; "),
        "batch": Size(64, 32),
        "dropout": Size(0.1, 0.0),
        "rate": Size(1e-3, 1.8e-3),
        "decay": Size(0.1, 0.3),
        # A batch of 200 tokens gives two threads little to do: 31 ms a step on two idle cores, 37 ms with one thread.
        # Where another process holds one of the cores two threads wait for each other, and a step takes 2,500 ms.
        "threads": Size(None, 1),
    }
    # With --small on a CPU, native kernels against eager: float32 at most 4.6e-7 (2 seeds, 9 epochs), and 1.6e-4 in
    # the worst of the settings that were tried (rate 2e-3, a vocabulary of 4000); bfloat16 1.4e-2 (2 epochs). An error
    # like GELU's tanh form in place of erf moves the float32 losses by 1e-3 within four epochs.
    bounds = {"float32": 5e-4, "bfloat16": 1e-1}
    model = Translator
    context = 1  # known when the sentences are cut into tokens
    train: Sentences
    test: Sentences

    def load(self) -> list[str]:
        self.source = "translation catalogues"
        self.split = split_pairs(load_pairs(), self.arguments.length)
        # One vocabulary for both languages, so that names and marks are copied as they are.
        return [text for pair in self.split.train for text in (pair.source, pair.target)]

    def encode(self, tokenizer: Any) -> str:
        train, test = encode(tokenizer, self.split.train), encode(tokenizer, self.split.test)
        self.context = max(len(row) for pair in train + test for row in pair)
        self.train, self.test = Sentences(train), Sentences(test)
        self.tokenizer = tokenizer
        return f"{len(train):,} training pairs, {len(test):,} held out"

    def data_facts(self) -> Report:
        pairs = self.split.train + self.split.test
        return {
            "train_pairs": len(self.split.train),
            "test_pairs": len(self.split.test),
            "by_origin": dict(Counter(pair.origin for pair in pairs)),
            "left_out": self.split.left_out,
            "length": self.arguments.length,
            "train_tokens": sum(len(target) - 1 for _, target in self.train.encoded),
        }

    def translations(self, model: Translator, tokenizer: Any, label: str) -> list[str]:
        return score.translate_all(model, tokenizer, self.test.encoded, TRANSLATED_AT_ONCE, self.device, label)

    def before(self, twins: Mapping[str, Any]) -> None:
        self.untrained = self.translations(twins["fused"], self.tokenizer, "untrained")

    def after(self, twins: Mapping[str, Any], reloaded: Any, tokenizer: Any, curves: Curves) -> Report:
        nearest = score.nearest(self.split.train, [pair.source for pair in self.split.test])
        translations = {
            "untrained": self.untrained,
            "nearest": [pair.target for pair in nearest],
            "eager": self.translations(twins["eager"], self.tokenizer, "eager"),
            "fused": self.translations(reloaded, tokenizer, "fused"),
        }
        return {
            "scores": {name: score.scores(texts, self.split.test) for name, texts in translations.items()},
            "examples": examples_of(self.split, nearest, translations["fused"]),
        }

    @staticmethod
    def say(report: Report) -> Said:
        facts, scores = report["data"], report["scores"]
        packages = ", ".join(f"{origin} {count:,}" for origin, count in facts["by_origin"].items())
        left_out = ", ".join(f"{reason} {count:,}" for reason, count in facts["left_out"].items())
        gain = scores["fused"]["chrf"] - scores["nearest"]["chrf"]
        names = ("source", "reference", "fused", "nearest")
        sentences = [[example[name] or "(nothing)" for name in names] for example in report["examples"]]
        head = ("source", "reference", "fused, trained", "nearest training source")
        return Said(
            f"Pairs: {facts['train_pairs']:,} to train on ({facts['train_tokens']:,} target tokens), "
            f"{facts['test_pairs']:,} held out; by package: {packages}. Left out: {left_out}; at most "
            f"{facts['length']} characters a side.",
            [
                f"chrF of the fused model is {abs(gain):.1f} {'above' if gain >= 0 else 'BELOW'} that of the nearest "
                "training source's translation.",
                "chrF counts the n-grams of 1 to 6 characters that translation and reference share, from 0 to 100. The "
                "nearest training source is the one most like the held-out source; its translation is taken as it "
                "stands.",
            ],
            ["Held-out sentences, taken at equal distances:", "", table(head, sentences, "\\|", texts=4)],
            score_table(scores),
        )

    @staticmethod
    def draw(report: Report, folder: Path) -> dict[Path, str]:
        """Draw chrF over all held-out pairs and over those of each package."""
        figure, scores = new_figure(), report["scores"]
        origins = scores["fused"]["by_origin"]
        groups = [f"all ({report['data']['test_pairs']} pairs)"]
        groups += [f"{origin} ({entry['pairs']} pairs)" for origin, entry in origins.items()]
        axes = figure.subplots()
        series = {label: chrf_of(scores[name], origins) for name, label in NAMES.items()}
        draw_bars(axes, groups, series, COLOURS, "%.1f")
        axes.set(xlabel="where the held-out pairs come from", ylabel="chrF (0 to 100, higher is better)")
        title = "English to Chinese: chrF of greedy translations of held-out sentences"
        path = folder / "translate_chrf.png"
        save(figure, title, subtitles(report)[:2], path)
        return {path: "chrF"}


def score_table(scores: Mapping[str, Any]) -> str:
    origins = list(scores["fused"]["by_origin"])
    rows = [
        (label, *(f"{value:.1f}" for value in chrf_of(scores[name], origins)), f"{scores[name]['exact']:.0%}")
        for name, label in NAMES.items()
    ]
    return table(["translation by", "chrF", *(f"chrF, {origin}" for origin in origins), "equal to reference"], rows)


def chrf_of(scores: Mapping[str, Any], origins: Sequence[str] | Mapping[str, Any]) -> list[float]:
    """Over all pairs, then over those of each package."""
    return [scores["chrf"], *(scores["by_origin"][origin]["chrf"] for origin in origins)]


def examples_of(split: Split, nearest: Sequence[Pair], fused: Sequence[str]) -> list[dict[str, str]]:
    """Held-out pairs at equal distances, so that nobody chose them."""
    return [
        {
            "source": split.test[i].source,
            "reference": split.test[i].target,
            "fused": fused[i],
            "nearest": nearest[i].target,
            "nearest_source": nearest[i].source,
        }
        for i in range(0, len(split.test), max(1, len(split.test) // EXAMPLES))
    ]
