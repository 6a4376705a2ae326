"""Outputs and gradients of every operator by every provider in every dtype, within the error budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators import OPERATORS, Operator
from oracle import DTYPES, evaluate

import fusednorm

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@DTYPE
@pytest.mark.certifies("forward", "backward")
def test_outputs_and_gradients(operator: Operator, dtype, leaves, using, provider, device, generator):
    if provider == "torch" and operator.attention:
        pytest.skip("torch's attention is held to itself, to the last bit, by the test below")
    with using:
        operator.check(operator.leaves(dtype, device, generator), generator)


@DTYPE
@pytest.mark.certifies("forward", "backward", op="scaled_dot_product_attention", provider="torch")
def test_torchs_attention_is_torchs_own_to_the_last_bit(dtype, generator):
    operator = OPERATORS["scaled_dot_product_attention"]
    leaves = operator.leaves(dtype, "cpu", generator)
    cotangents = (torch.randn(leaves["q"].shape, generator=generator).to(dtype),)
    with fusednorm.use_provider("torch"):
        ours = evaluate(operator.ours, leaves, cotangents)
    torchs = evaluate(lambda t: (F.scaled_dot_product_attention(*t.values(), is_causal=True),), leaves, cotangents)
    assert all(torch.equal(ours[name], torchs[name]) for name in torchs)
