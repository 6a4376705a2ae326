"""Triton's own interpreter, without what tests/helpers/interpreter.py mends: wrong results are refused by name."""

from __future__ import annotations

import importlib.util

import pytest
from fresh import python

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("triton", "numpy"))), reason="Triton's interpreter needs Triton and NumPy"
)

PROGRAM = """
import torch, fusednorm

torch.manual_seed(0)
CALLS = {
    "attention": lambda x: fusednorm.scaled_dot_product_attention(x, x, x, is_causal=True),
    "varlen_attention": lambda x: fusednorm.varlen_attention(
        *[x.flatten(0, 1)] * 3, *[torch.tensor([0, 8, 16], dtype=torch.int32)] * 2, 8, 8
    ),
    "layer_norm": lambda x: fusednorm.layer_norm(x, 16),
    "add_rms_norm": lambda x: fusednorm.add_rms_norm(x, x, 16)[0],
    "bias_act_dropout": lambda x: fusednorm.bias_act_dropout(x, x[0, 0, 0], "gelu"),
}
values = torch.randn(2, 8, 4, 16)
for name, call in CALLS.items():
    try:
        with fusednorm.use_provider("triton"):
            print(name, call(values.bfloat16()).abs().max().item())
    except ValueError as fault:
        print(name, "refused:", fault)
for dtype in (torch.float32, torch.float16):
    for name, call in CALLS.items():
        x = values.to(dtype)
        with fusednorm.use_provider("triton"):
            found = call(x).double()
        with fusednorm.use_provider("reference"):
            expected = call(x.double())
        print((found - expected).abs().max().item() < 20 * torch.finfo(dtype).eps)
"""


def test_bfloat16_is_refused_by_name_for_every_operation_and_other_dtypes_are_interpreted_rightly():
    lines = python("-c", PROGRAM, TRITON_INTERPRET="1").splitlines()
    refused, right = lines[:5], lines[5:]
    assert all("refused:" in line and "torch.bfloat16" in line and "torch.float16" in line for line in refused), refused
    assert right == ["True"] * 10
