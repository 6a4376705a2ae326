"""Spoken digits: synthesised, turned into log-mel features, split by speaker, batched.

eSpeak NG says rows of one to four digits with eight accents of English, at several speeds and pitches. The test side
has speakers that training never hears.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from examples.speech.synthesiser import synthesiser
from examples.training.batches import buckets
from examples.training.machine import progress_bar
from examples.training.model import IGNORED, Batch

PACKAGES = {"espeakng_loader": "espeakng-loader"}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = tuple(
    f"gmw/{name}"
    for name in (
        "en",
        "en-029",
        "en-GB-scotland",
        "en-GB-x-gbclan",
        "en-GB-x-gbcwmd",
        "en-GB-x-rp",
        "en-US",
        "en-US-nyc",
    )
)
# eSpeak has more. What f2, f3 and f5 say differs a little from process to process; all of these repeat bit for bit.
# fmt: off
TRAIN_SPEAKERS = (
    "m1", "m2", "m3", "m4", "m6", "m7", "f1", "f4", "Andy", "Alex", "Annie", "Gene", "Lee", "Mike", "adam",
    "benjamin", "iven", "linda", "paul", "shelby",
)
# fmt: on
TEST_SPEAKERS = ("m5", "m8", "anika", "aunty", "Michael", "belinda", "david", "steph")
SPEEDS, PITCHES = (140, 221), (30, 71)  # words a minute; of 0 to 100
LONGEST = 4  # digits

WINDOW, HOP = 512, 220  # samples: 23 and 10 ms at 22,050 a second
MELS = 40
STACKED = 4  # windows that one position of the model holds


@dataclass(frozen=True)
class Utterance:
    features: torch.Tensor  # (positions, STACKED * MELS)
    digits: list[int]
    speaker: str


def mel_filters(rate: int) -> torch.Tensor:
    """Triangles (WINDOW / 2 + 1, MELS), equally wide on the mel scale, from 60 Hz to half the rate."""
    highest = 2595 * math.log10(1 + rate / 2 / 700)
    lowest = 2595 * math.log10(1 + 60 / 700)
    corners = 700 * (10 ** (torch.linspace(lowest, highest, MELS + 2) / 2595) - 1)
    bins = torch.linspace(0, rate / 2, WINDOW // 2 + 1)[:, None]
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def log_mel(samples: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Log-mel features (positions, STACKED * MELS), each mel of mean 0 and variance 1 over the utterance."""
    power = torch.stft(samples, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True).abs().square()
    mels = (power.T @ filters + 1e-6).log()
    mels = (mels - mels.mean(0)) / (mels.std(0) + 1e-3)
    mels = nn.functional.pad(mels, (0, 0, 0, -len(mels) % STACKED))
    return mels.reshape(-1, STACKED * MELS)


def speak(count: int, speakers: Sequence[str], seed: int, label: str) -> list[Utterance]:
    """Draw rows of digits and who says them how, and let them be said."""
    voice, generator = synthesiser(), torch.Generator().manual_seed(seed)
    filters = mel_filters(voice.rate)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    said = []
    for _ in progress_bar(range(count), count, f"speaking, {label}"):
        digits = [draw(0, len(WORDS)) for _ in range(draw(1, LONGEST + 1))]
        speaker, accent = speakers[draw(0, len(speakers))], ACCENTS[draw(0, len(ACCENTS))]
        text = " ".join(WORDS[digit] for digit in digits)
        samples = voice.say(text, accent, speaker, draw(*SPEEDS), draw(*PITCHES))
        said.append(Utterance(log_mel(samples, filters), digits, speaker))
    return said


def batch_of(utterances: Sequence[Utterance]) -> Batch:
    """Features and digits filled up at the end, and how many positions of each row are features."""
    lengths = torch.tensor([len(utterance.features) for utterance in utterances])
    features = nn.utils.rnn.pad_sequence([utterance.features for utterance in utterances], batch_first=True)
    digits = [torch.tensor(utterance.digits) for utterance in utterances]
    wanted = nn.utils.rnn.pad_sequence(digits, batch_first=True, padding_value=IGNORED)
    return Batch((features, lengths), wanted)


@dataclass(frozen=True)
class Speech:
    """Utterances, in batches of about equal length."""

    utterances: Sequence[Utterance]

    def batches(self, size: int, seed: int | None = None) -> list[Batch]:
        chosen = buckets([len(utterance.features) for utterance in self.utterances], size, seed)
        return [batch_of([self.utterances[i] for i in part]) for part in chosen]
