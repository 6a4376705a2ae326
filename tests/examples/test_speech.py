"""The task speech: the synthesiser, log-mel features, CTC, greedy recognition, error rates."""

from __future__ import annotations

import math

import pytest
import torch

from examples.speech import data, job
from examples.speech.data import MELS, STACKED, TEST_SPEAKERS, TRAIN_SPEAKERS, Utterance
from examples.speech.model import Recogniser, recognise
from examples.speech.synthesiser import Synthesiser, synthesiser
from examples.training.model import IGNORED, ModelConfig, loss_of


@pytest.fixture(scope="module")
def voice() -> Synthesiser:
    pytest.importorskip("espeakng_loader", reason="espeakng-loader is missing; the extra examples brings it")
    return synthesiser()


def test_speakers_of_the_two_sides_are_others():
    assert not set(TRAIN_SPEAKERS) & set(TEST_SPEAKERS)


def test_every_voice_speaks_and_speed_and_pitch_change_what_it_says(voice):
    voices = [(accent, speaker) for speaker in TRAIN_SPEAKERS + TEST_SPEAKERS for accent in data.ACCENTS[::7]]
    said = [voice.say("seven", accent, speaker, 180, 50) for accent, speaker in voices]
    assert all(samples.abs().max() > 0.05 and 0.2 < len(samples) / voice.rate < 1.5 for samples in said)
    slow, fast = (voice.say("one two three", "gmw/en", "m1", speed, 50) for speed in (140, 220))
    assert len(slow) > 1.2 * len(fast)


def test_voices_that_are_not_there_are_refused(voice):
    with pytest.raises(OSError, match="no speaker nobody"):
        voice.say("one", "gmw/en", "nobody", 180, 50)
    with pytest.raises(OSError, match="no accent gmw/nowhere"):
        voice.say("one", "gmw/nowhere", "m1", 180, 50)


def test_utterances_have_what_they_say_and_long_enough_features(voice):
    utterances = data.speak(40, TEST_SPEAKERS, 3, "x")
    assert {len(u.digits) for u in utterances} == {1, 2, 3, 4} and {u.speaker for u in utterances} <= set(TEST_SPEAKERS)
    for utterance in utterances:
        assert utterance.features.shape[1] == STACKED * MELS and utterance.features.isfinite().all()
        assert len(utterance.features) >= 2 * len(utterance.digits)  # CTC puts a blank between equal digits
    assert [u.digits for u in data.speak(40, TEST_SPEAKERS, 3, "x")] == [u.digits for u in utterances]


@pytest.mark.parametrize("hertz", [300.0, 1000.0, 4000.0])
def test_a_tone_is_loudest_at_its_mel(hertz):
    rate = 22050
    filters = data.mel_filters(rate)
    tone = torch.sin(2 * math.pi * hertz * torch.arange(rate) / rate)
    power = torch.stft(tone, data.WINDOW, data.HOP, window=torch.hann_window(data.WINDOW), return_complex=True).abs()
    loudest = int((power.square().mean(1) @ filters).argmax())
    highest, lowest = (2595 * math.log10(1 + f / 700) for f in (rate / 2, 60))
    centre = lowest + (loudest + 1) * (highest - lowest) / (MELS + 1)
    # within a filter's width, and a bin of the transform's
    width = (highest - lowest) / (MELS + 1) + 2595 * math.log10(1 + rate / data.WINDOW / (700 + hertz))
    assert abs(centre - 2595 * math.log10(1 + hertz / 700)) <= width


class Planned(Recogniser):
    """Logits that are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__("fused", ModelConfig(context=1, layers=1, width=4, heads=1, features=1, classes=3))
        self.planned = logits

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.planned


def test_recognition_leaves_out_repetitions_then_blanks():
    rows = torch.tensor([[0, 0, 3, 0, 1, 1], [3, 3, 3, 3, 3, 3], [2, 1, 2, 3, 3, 2]])
    model = Planned(torch.nn.functional.one_hot(rows, 4).float())
    assert recognise(model, torch.empty(0), torch.empty(0)) == [[0, 0, 1], [], [2, 1, 2, 2]]


def test_loss_is_that_of_every_alignment():
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1))
    likely = logits[0].softmax(-1)
    paths = [(0, 1, 1), (0, 0, 1), (0, 1, 3), (0, 3, 1), (3, 0, 1)]  # of three positions that say 0, then 1
    total = sum(math.prod(float(likely[t, c]) for t, c in enumerate(path)) for path in paths)
    model = Planned(logits)
    assert model.loss(logits, torch.tensor([[0, 1, IGNORED]])).item() == pytest.approx(-math.log(total) / 2, rel=1e-5)


@pytest.mark.parametrize("variant", ["eager", "fused"])
def test_padding_changes_neither_loss_nor_what_is_heard(variant):
    torch.manual_seed(0)
    config = ModelConfig(context=20, layers=2, width=32, heads=2, features=5, classes=6)
    model = Recogniser(variant, config).eval()
    short = Utterance(torch.randn(9, 5), [1, 2], "a")
    alone = data.batch_of([short])
    batch = data.batch_of([short, Utterance(torch.randn(20, 5), [3, 3, 4, 5, 0], "b")])
    first = data.Batch(batch.inputs, batch.wanted.clone())
    logits = model(*first.inputs)
    # float32 sums over padded rows, in another order
    torch.testing.assert_close(logits[0, :9], model(*alone.inputs)[0], rtol=1e-4, atol=1e-5)
    assert recognise(model, *first.inputs)[0] == recognise(model, *alone.inputs)[0]
    assert model.loss(logits[:1], batch.wanted[:1]).item() == pytest.approx(loss_of(model, alone).item(), rel=1e-5)


def test_error_rate_counts_edits_over_what_was_said():
    utterances = [Utterance(torch.empty(0), [1, 2, 3], "a"), Utterance(torch.empty(0), [4], "b")]
    assert job.error_rate(utterances, [[1, 2, 3], [4]]) == 0.0
    assert job.error_rate(utterances, [[1, 3], []]) == 0.5
    assert job.error_rate(utterances, [[1, 3], []], "b") == 1.0
