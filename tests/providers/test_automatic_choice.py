"""Automatic choice never takes kernels that are emulated or interpreted."""

from __future__ import annotations

import pytest
import torch

from fusednorm._options import ActivationInputs, ActivationOptions, AttentionInputs, AttentionOptions, NormInputs
from fusednorm.dispatch import rules

CALLS = {
    "add_layer_norm_fwd": (NormInputs(torch.ones(2, 8)), None),
    "bias_act_dropout_fwd": (ActivationInputs(torch.ones(2, 8)), ActivationOptions("relu", 0.0)),
    "attention_fwd": (AttentionInputs(*[torch.ones(1, 1, 2, 8)] * 3), AttentionOptions(2, 2, 1.0)),
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize(("provider", "why"), [("cuda", "emulation"), ("triton", "interpreter")])
def test_automatic_choice_says_why_it_does_not_take_them(provider, why, op, request):
    request.getfixturevalue(provider)
    reluctance = rules.reluctance(provider, op, *CALLS[op])
    assert reluctance is not None and why in reluctance
