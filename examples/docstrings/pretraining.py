"""The task `mlm`: an encoder learns to fill in hidden words of docstrings, then, from few labels, their packages.

    PYTHONPATH=. python3 examples/train.py --task mlm --small    # a CPU: under two minutes
    PYTHONPATH=. python3 examples/train.py --task mlm            # a GPU: 4 layers, width 256

The classifier is trained twice more from the same start without what was learned before: that is what pre-training is
worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from examples.docstrings import data
from examples.docstrings.data import CLASSES, Masked
from examples.docstrings.job import BAG, LONGEST, MAJORITY, DocstringJob, baselines
from examples.docstrings.model import MaskedModel, TextClassifier
from examples.language_model.data import unigram_loss
from examples.training.job import Report, Said, Size
from examples.training.loop import Curves, train_twins
from examples.training.model import VARIANTS, make_twins
from examples.training.pictures import draw_losses
from examples.training.scores import TRAINED, accuracy

SCRATCH = {"eager": "eager, without pre-training", "fused": "fused, without pre-training"}
TUNING_BATCH, TUNING_RATE = 32, 1e-3


class MaskedJob(DocstringJob):
    task, files = "mlm", "mlm"
    description = (
        "Pre-train a masked language model of docstrings twice, of fusednorm and of torch.nn, and fine-tune it."
    )
    title = "Masked language models with fused and eager encoders"
    floor = SCRATCH["fused"]
    sizes = {
        "epochs": Size(30, 5),
        "layers": Size(4, 2),
        "width": Size(256, 96),
        "texts": Size(10000, 1200, "of each package at most; "),
        "labels": Size(2000, 600, "texts whose package is told when fine-tuning; "),
        "tuning": Size(10, 6, "epochs of fine-tuning; "),
        "vocab": Size(8000, 2000),
        "batch": Size(64, 32),
        "dropout": Size(0.1, 0.0),
        "rate": Size(1e-3, 4e-3),
        "decay": Size(0.1, 0.1),
        "threads": Size(None, 1),
    }
    # As for `classify`: float32 at most 1.3e-5 (5 epochs), bfloat16 1.1e-4 (2 epochs).
    bounds = {"float32": 5e-4, "bfloat16": 2e-2}
    more_sizes = {}
    model = MaskedModel
    train: Masked
    test: Masked

    def load(self) -> list[str]:
        for name in ("labels", "tuning"):
            if getattr(self.arguments, name) < 1:
                raise ValueError(f"{name} is {getattr(self.arguments, name)}; it must be at least 1")
        return list(super().load())

    def encode(self, tokenizer: Any) -> str:
        vocab = tokenizer.get_vocab_size()
        self.encoded = [data.encode(tokenizer, side, LONGEST) for side in (self.split.train, self.split.test)]
        self.train, self.test = (Masked(side, vocab) for side in self.encoded)
        return f"{len(self.split.train):,} training texts, {len(self.split.test):,} held out"

    def few(self) -> list[data.Text]:
        """Texts of all packages, taken at equal distances."""
        texts = self.split.train
        return texts[:: max(1, len(texts) // self.arguments.labels)][: self.arguments.labels]

    def data_facts(self) -> Report:
        return super().data_facts() | {"labels": len(self.few())}

    def fine_tune(self, twins: Mapping[str, Any], tokenizer: Any) -> tuple[dict[str, Any], Curves]:
        """Classifiers with what was learned and without, of both variants, trained side by side on few labels."""
        config = replace(twins["fused"].config, classes=len(CLASSES))
        models = {}
        for labels in (SCRATCH, TRAINED):
            for variant, model in make_twins(TextClassifier, config, self.arguments.seed, self.device).items():
                if labels is TRAINED:  # all but the head, which pre-training has none of
                    model.load_state_dict(twins[variant].state_dict(), strict=False)
                models[labels[variant]] = model
        settings = replace(self.settings(), epochs=self.arguments.tuning, batch=TUNING_BATCH, learning_rate=TUNING_RATE)
        sides = (self.labelled(tokenizer, texts) for texts in (self.few(), self.split.test))
        print("fine-tuning with and without pre-training", flush=True)
        return models, train_twins(models, *sides, settings, self.device, lambda _: None)[0]

    def after(self, twins: Mapping[str, Any], reloaded: Any, tokenizer: Any, curves: Curves) -> Report:
        models, tuning = self.fine_tune({"eager": twins["eager"], "fused": reloaded}, tokenizer)
        side = self.labelled(tokenizer, self.split.test)
        tokens = torch.tensor([token for row in self.encoded[0] for token in row])
        asked = torch.cat([batch.wanted for batch in self.test.batches(self.arguments.batch)])
        return {
            "unigram_loss": unigram_loss(tokens, asked, self.train.vocab),
            "scores": {
                **baselines(self.few(), self.split.test),
                **{label: accuracy(*self.found(model, side)) for label, model in models.items()},
            },
            "tuning": tuning,
        }

    @classmethod
    def not_learned(cls, report: Report) -> list[str]:
        faults = super().not_learned(report)
        loss, unigram = report["curves"]["fused"]["test"][-1], report["unigram_loss"]
        if not loss < unigram:
            faults.append(f"the test loss is {loss:.3f}, no better than {unigram:.3f} of the tokens' frequencies")
        return faults

    @classmethod
    def say(cls, report: Report) -> Said:
        scores, labels = report["scores"], report["data"]["labels"]
        gain = scores[TRAINED["fused"]] - scores[SCRATCH["fused"]]
        lines = [
            f"Always guessing by the tokens' frequencies has a test loss of {report['unigram_loss']:.5f}.",
            f"Fine-tuning and the baselines ({MAJORITY}; {BAG}) have {labels:,} labels. Pre-training "
            f"{'adds' if gain >= 0 else 'COSTS'} {100 * abs(gain):.1f} points of accuracy to the fused model.",
        ]
        return Said(cls.texts_said(report), lines, [], cls.score_table(report))

    @staticmethod
    def draw_details(axes: Any, report: Report) -> None:
        """Draw the losses of fine-tuning on held-out texts."""
        for labels, colour, name in ((SCRATCH, "0.4", "without pre-training"), (TRAINED, "tab:orange", "pre-trained")):
            pair = {variant: report["tuning"][labels[variant]] for variant in VARIANTS}
            draw_losses(axes, pair, {"test": colour}, name)
        axes.set(xlabel="epoch of fine-tuning", ylabel="test loss (nats per text)", title="Fine-tuning")
        axes.grid(alpha=0.3)
        axes.legend()
