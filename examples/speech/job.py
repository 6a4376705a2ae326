"""The task `speech`: an encoder that recognises spoken digits, trained by CTC.

PYTHONPATH=. python3 examples/train.py --task speech --small    # a CPU: about a minute
PYTHONPATH=. python3 examples/train.py --task speech            # a GPU: 4 layers, width 256
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.table import table
from examples.speech import data
from examples.speech.data import PACKAGES, TEST_SPEAKERS, TRAIN_SPEAKERS, WORDS, Speech, Utterance, batch_of, speak
from examples.speech.model import Recogniser, recognise
from examples.training.job import Report, Said, Size
from examples.training.loop import Curves
from examples.training.pictures import COLOURS, draw_bars
from examples.training.scores import TRAINED, ScoredJob, edit_distance

FLOOR = "always the same digit, in the right number"
EXAMPLES = 8
RECOGNISED_AT_ONCE = 64  # utterances


class SpeechJob(ScoredJob):
    task, files = "speech", "speech"
    description = "Train a recogniser of spoken digits twice, with the layers of fusednorm and with torch's."
    title = "Speech recognition with fused and eager encoders"
    packages = PACKAGES
    unit, measure, lower_is_better, floor = "digit", "character error rate", True, FLOOR
    betas = (0.9, 0.98)
    head_width = 32
    more_sizes = {"features": data.STACKED * data.MELS, "classes": len(WORDS)}
    context = 1  # known when all has been said
    source = "speech of eSpeak NG"
    sizes = {
        "epochs": Size(40, 8),
        "layers": Size(4, 2),
        "width": Size(256, 96),
        "utterances": Size(20000, 2400, "to train on; an eighth as many are held out; "),
        "batch": Size(64, 32),
        "dropout": Size(0.1, 0.0),
        "rate": Size(1e-3, 2e-3),
        "decay": Size(0.1, 0.05),
        "threads": Size(None, 1),
    }
    # With --small on a CPU, native kernels against eager: float32 at most 2.0e-4 (8 epochs), bfloat16 2.9e-3 (2
    # epochs). That is more than in the other tasks, and so is the bound.
    bounds = {"float32": 2e-3, "bfloat16": 5e-2}
    model = Recogniser
    train: Speech
    test: Speech

    def load(self) -> Sequence[str]:
        count, seed = self.arguments.utterances, 2 * self.arguments.seed
        if count < 8:
            raise ValueError(f"utterances is {count}; it must be at least 8")
        print(f"speaking {count:,} rows of digits", flush=True)
        self.train = Speech(speak(count, TRAIN_SPEAKERS, seed, "to train on"))
        self.test = Speech(speak(count // 8, TEST_SPEAKERS, seed + 1, "held out"))
        return []

    def encode(self, tokenizer: Any) -> str:
        both = [*self.train.utterances, *self.test.utterances]
        self.context = max(len(utterance.features) for utterance in both)
        return f"{len(self.train.utterances):,} training utterances, {len(self.test.utterances):,} held out"

    def data_facts(self) -> Report:
        return {
            "train": len(self.train.utterances),
            "test": len(self.test.utterances),
            "train_digits": sum(len(utterance.digits) for utterance in self.train.utterances),
            "speakers": {"train": list(TRAIN_SPEAKERS), "test": list(TEST_SPEAKERS)},
            "accents": list(data.ACCENTS),
        }

    def heard(self, model: Recogniser) -> list[list[int]]:
        """The digits of every held-out utterance, as a model hears them."""
        utterances, rows = self.test.utterances, []
        for first in range(0, len(utterances), RECOGNISED_AT_ONCE):
            batch = batch_of(utterances[first : first + RECOGNISED_AT_ONCE]).to(self.device)
            rows += recognise(model, *batch.inputs)
        return rows

    def after(self, twins: Mapping[str, Any], reloaded: Any, tokenizer: Any, curves: Curves) -> Report:
        said = self.test.utterances
        counts = Counter(digit for utterance in self.train.utterances for digit in utterance.digits)
        usual = counts.most_common(1)[0][0]
        heard = {
            FLOOR: [[usual] * len(utterance.digits) for utterance in said],
            TRAINED["eager"]: self.heard(twins["eager"]),
            TRAINED["fused"]: self.heard(reloaded),
        }
        examples = range(0, len(said), max(1, len(said) // EXAMPLES))
        return {
            "scores": {name: error_rate(said, rows) for name, rows in heard.items()},
            "by_speaker": {
                name: {speaker: error_rate(said, heard[name], speaker) for speaker in spoken(said)}
                for name in TRAINED.values()
            },
            "exact": sum(u.digits == row for u, row in zip(said, heard[TRAINED["fused"]])) / len(said),
            "examples": [
                {"speaker": said[i].speaker, "said": said[i].digits, "heard": heard[TRAINED["fused"]][i]}
                for i in examples
            ],
        }

    @classmethod
    def say(cls, report: Report) -> Said:
        facts, speakers = report["data"], report["data"]["speakers"]
        rows = [
            (e["speaker"], *(" ".join(WORDS[digit] for digit in e[name]) or "(nothing)" for name in ("said", "heard")))
            for e in report["examples"]
        ]
        return Said(
            "Speech: rows of one to four digits, said by the synthesiser eSpeak NG from the package espeakng-loader in "
            f"{len(facts['accents'])} accents of English. {facts['train']:,} utterances ({facts['train_digits']:,} "
            f"digits) of {len(speakers['train'])} speakers to train on; {facts['test']:,} of {len(speakers['test'])} "
            f"other speakers held out ({', '.join(speakers['test'])}).",
            [
                "The character error rate is the edit distance of all that was heard to all that was said, as a share "
                "of the digits said.",
                f"The fused model hears {report['exact']:.0%} of the utterances without any error.",
            ],
            ["Held-out utterances, taken at equal distances:", "", table(("speaker", "said", "heard"), rows, texts=3)],
            cls.score_table(report),
        )

    @staticmethod
    def draw_details(axes: Any, report: Report) -> None:
        rates = report["by_speaker"]
        speakers = list(rates[TRAINED["fused"]])
        draw_bars(axes, speakers, {name: list(rates[name].values()) for name in rates}, COLOURS, "%.2f")
        axes.set(xlabel="speaker, held out", ylabel="character error rate", title="By speaker")


def spoken(utterances: Sequence[Utterance]) -> list[str]:
    return sorted({utterance.speaker for utterance in utterances}, key=TEST_SPEAKERS.index)


def error_rate(utterances: Sequence[Utterance], heard: Sequence[Sequence[int]], speaker: str | None = None) -> float:
    """Edit distance over the length of what was said, of all utterances or of one speaker's."""
    chosen = [(u.digits, row) for u, row in zip(utterances, heard) if speaker in (None, u.speaker)]
    return sum(edit_distance(row, digits) for digits, row in chosen) / sum(len(digits) for digits, _ in chosen)
