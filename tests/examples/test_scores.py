"""Scores of trained models: of planted predictions, and what is said where nothing was learned."""

from __future__ import annotations

import math

import pytest
import torch

from examples import train
from examples.training import scores
from examples.training.model import make_twins


def test_accuracy_majority_and_confusion_of_planted_predictions():
    found, right = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2])
    assert scores.accuracy(found, right) == 0.75
    assert scores.majority(right) == 2
    assert scores.confusion(found, right, 3) == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_mean_iou_is_over_classes_that_occur():
    assert scores.mean_iou([[3, 1, 0], [0, 4, 0], [0, 0, 0]]) == pytest.approx((3 / 4 + 4 / 5) / 2)


@pytest.mark.parametrize(
    ("one", "other", "edits"), [("", "", 0), ("abc", "", 3), ("abc", "axc", 1), ("abc", "bcd", 2), ("ab", "aab", 1)]
)
def test_edit_distance(one, other, edits):
    assert scores.edit_distance(one, other) == scores.edit_distance(other, one) == edits


def test_predictions_take_all_that_is_asked_for_and_leave_the_mode(case):
    model = make_twins(case.job.model, case.config, 0, case.device)["fused"].train()
    if case.job.task in ("translate", "speech"):
        pytest.skip("what these say is decoded, not taken position by position")
    found, right = scores.predictions(model, case.side(11), 4, case.device)
    assert model.training and len(found) == len(right) == sum(batch.tokens() for batch in case.side(11).batches(4))


SCORED = [job for job in train.TASKS.values() if issubclass(job, scores.ScoredJob)]


@pytest.mark.parametrize("job", SCORED, ids=lambda job: job.task)
@pytest.mark.parametrize("label", scores.TRAINED.values())
def test_models_no_better_than_the_floor_are_named(job, label):
    good, bad = (0.1, 0.6) if job.lower_is_better else (0.6, 0.1)
    curves = {"fused": {"test": [3.0, 1.0]}}
    found = {"scores": {job.floor: 0.5, **dict.fromkeys(scores.TRAINED.values(), good)}, "curves": curves}
    assert job.not_learned(found | {"unigram_loss": 2.0}) == []
    for planted in (bad, 0.5, math.nan):
        (fault,) = job.not_learned(found | {"unigram_loss": 2.0, "scores": found["scores"] | {label: planted}})
        assert job.measure in fault and label in fault and job.floor in fault
