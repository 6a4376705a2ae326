"""``scaled_dot_product_attention`` and ``varlen_attention`` over the provider table: against float64."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES
from oracle_attention import AttentionCall, check

from fusednorm import dropout_mask, scaled_dot_product_attention, varlen_attention

OP = "attention_fwd"

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def draw(generator, device, dtype, *shapes):
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def leaves_of(generator, device, dtype, batch=2, heads=4, n_queries=17, n_keys=23, dim=40, key_heads=None):
    q, k, v = draw(
        generator,
        device,
        dtype,
        (batch, heads, n_queries, dim),
        *[(batch, key_heads or heads, n_keys, dim)] * 2,
    )
    return {"q": q, "k": k, "v": v}


PLAIN = {
    "bare": {},
    "causal": {"is_causal": True},
    "causal_lower_right": {"is_causal": True, "causal_align": "lower_right"},
    "window": {"window": (3, 5)},
    "window_left": {"window": (4, None)},
    "window_right_lower_right": {"window": (None, 2), "causal_align": "lower_right"},
    "window_of_the_query_alone": {"window": (0, 0)},
    "scale": {"scale": 0.7},
    "negative_scale": {"scale": -0.3},
    "zero_scale": {"scale": 0.0},
    "softcap": {"softcap": 1.5},
    "softcap_causal": {"softcap": 2.0, "is_causal": True},
    "dropout": {"dropout_p": 0.3, "seed": 2**63 + 5},
    "everything": {"is_causal": True, "window": (6, 3), "softcap": 3.0, "dropout_p": 0.2, "seed": -4, "scale": 0.5},
}


@DTYPE
@pytest.mark.parametrize("name", PLAIN)
def test_every_option(name, dtype, using, device, generator):
    with using:
        check(AttentionCall(PLAIN[name]), leaves_of(generator, device, dtype), generator)
