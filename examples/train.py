"""Train a model twice, with fused and with eager steps, and compare the two runs.

    PYTHONPATH=. python3 examples/train.py --small              # a CPU with two cores: about three minutes
    PYTHONPATH=. python3 examples/train.py                      # a GPU: 4 layers, width 512
    PYTHONPATH=. python3 examples/train.py --text book.txt
    PYTHONPATH=. python3 examples/train.py --task translate --small
    PYTHONPATH=. python3 examples/train.py --task digits --small
    PYTHONPATH=. python3 examples/train.py --task translate --help    # the options of a task

| Task | What is trained | Where it is |
|---|---|---|
| `lm`, the default | a language model | language_model/ |
| `translate` | a translator from English to Chinese | translation/ |
| `classify` | an encoder that tells which package a docstring comes from | docstrings/ |
| `mlm` | the same encoder, pre-trained by hidden words, then fine-tuned | docstrings/ |
| `digits` | a Vision Transformer that reads handwritten digits | digits/ |
| `segment` | one that tells the digit of each pixel of a scene | digits/ |
| `speech` | a recogniser of spoken digits, by CTC | speech/ |

What they share is in training/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from examples.digits.job import DigitsJob, SegmentJob
from examples.docstrings.job import ClassifyJob
from examples.docstrings.pretraining import MaskedJob
from examples.language_model.job import LanguageModelJob
from examples.speech.job import SpeechJob
from examples.training import run
from examples.translation.job import TranslationJob

TASKS = {
    job.task: job
    for job in (LanguageModelJob, TranslationJob, ClassifyJob, MaskedJob, DigitsJob, SegmentJob, SpeechJob)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the command line to the job of the task, whose own parser reads the rest of it."""
    parser = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=tuple(TASKS), default="lm")
    known, _ = parser.parse_known_args(argv)
    return run.main(TASKS[known.task], argv)


if __name__ == "__main__":
    sys.exit(main())
