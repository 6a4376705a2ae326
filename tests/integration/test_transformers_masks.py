"""The attention function that transformers calls, by itself: keywords, masks of each kind, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils  # noqa: E402

from fusednorm.integrations import _transformers_masks as masks  # noqa: E402
from fusednorm.integrations import transformers as integration  # noqa: E402
from tests.helpers.transformers_models import operands, padding, sinks  # noqa: E402

transformers.utils.logging.set_verbosity_error()


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"s_aux": torch.zeros(4)}, "s_aux: attention sinks; .*eager"),
        ({"head_mask": torch.ones(4)}, "head_mask: .*eager"),
        ({"indices": torch.zeros(2, 6, 3, dtype=torch.long)}, "indices: sparse attention"),
        ({"alibi": torch.randn(4, 6)}, "alibi: a keyword unknown here"),
        ({"score_mod": max}, "score_mod"),
        ({"block_table": torch.zeros(1, dtype=torch.int32)}, "block_table: a paged cache"),
    ],
)
def test_what_would_change_the_result_is_refused(keywords, said):
    with pytest.raises(ValueError, match=said):
        integration.attention(torch.nn.Module(), *operands(), None, **keywords)


def testsinks_are_refused_in_a_model():
    model = sinks()
    model.config._attn_implementation_internal = "fusednorm"
    with pytest.raises(ValueError, match="s_aux: attention sinks"):
        model(torch.randint(3, 48, (1, 5)))


def test_plain_keywords_pass():
    module = torch.nn.Module()
    plain = {"position_ids": torch.arange(6)[None], "use_cache": True, "num_items_in_batch": torch.tensor(3.0)}
    out, weights = integration.attention(module, *operands(), None, s_aux=None, output_attentions=True, **plain)
    assert out.shape == (2, 6, 4, 8) and out.is_contiguous() and weights is None


@pytest.mark.parametrize("dim", [8, 260])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_a_key_mask_or_none_leaves_causality_and_window_to_keywords(masked, causal, window, dim):
    q, k, v = operands(4, 6, dim)
    keys = torch.tensor([[True] * 6, [False] * 2 + [True] * 4]) if masked else None
    module = torch.nn.Module()
    module.is_causal = causal
    out, _ = integration.attention(module, q, k, v, keys, sliding_window=window)
    ahead = torch.arange(6) - torch.arange(4)[:, None] - 2
    seen = (ahead <= 0) if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        seen = seen & (ahead.abs() < window)
    seen = seen if keys is None else seen & keys[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), seen
    )
    expected = expected.nan_to_num(0.0).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    if causal:
        said, _ = integration.attention(torch.nn.Module(), q, k, v, keys, sliding_window=window, is_causal=True)
        assert torch.equal(said, out)


def test_a_bias_gets_its_gradient_under_every_mask():
    q, k, v = operands()
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    keys = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    full = keys[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()
    added = torch.zeros(2, 1, 6, 6).masked_fill(~full, torch.finfo(torch.float32).min)
    grads = []
    for mask in (keys, full, added):
        out, _ = integration.attention(torch.nn.Module(), q, k, v, mask, position_bias=bias, is_causal=True)
        grads.append(torch.autograd.grad(out.square().sum(), bias)[0])
    assert grads[0].abs().max() > 1e-3
    # float32 sums in another order; the largest gradient is over 1e-3
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-5, atol=1e-6)


FUNCTIONS = {
    "causal": (masking_utils.causal_mask_function, None),
    "window": (masking_utils.sliding_window_causal_mask_function(3), 3),
    "a window of all": (masking_utils.sliding_window_causal_mask_function(6), 6),
    "both ways": (masking_utils.bidirectional_mask_function, None),
    "window both ways": (masking_utils.sliding_window_bidirectional_mask_function(2), 2),
    "chunks": (masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)), 3),
    "a prefix": (masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 2), None),
}


@pytest.mark.parametrize("side", [None, "left", "right", "nothing left"])
@pytest.mark.parametrize(
    ("q_length", "kv_length", "q_offset", "kv_offset"),
    [(6, 6, 0, 0), (2, 6, 4, 0), (1, 6, 5, 0), (2, 6, 6, 2), (6, 9, 0, 0), (2, 9, 4, 0), (1, 9, 0, 0), (1, 9, 4, 0)],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_says_what_sdpa_mask_says(name, q_length, kv_length, q_offset, kv_offset, side):
    """Also where a cache is longer than what is filled, and in the two cases where there is none."""
    function, local = FUNCTIONS[name]
    mask = None if side is None else torch.ones(2, kv_length + kv_offset, dtype=torch.bool)
    if side == "nothing left":
        mask[1] = False
    elif side is not None:
        mask[1, :3] = mask[0, :1] = False
        mask = mask if side == "left" else mask.flip(1)
    both_ways = "both ways" in name
    given = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    given |= {"kv_offset": kv_offset, "mask_function": function, "attention_mask": mask, "local_size": local}
    given |= {"dtype": torch.float32, "config": None, "a_later_keyword": 1}
    plain = name not in ("chunks", "a prefix")
    skips = {"allow_is_causal_skip": not both_ways and name != "a prefix", "allow_is_bidirectional_skip": both_ways}
    expected = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    got = integration.attention_mask(**given, **skips)
    if got is None:
        assert masking_utils.sdpa_mask(**given, **skips) is None
        got = masks.Pattern(None, not both_ways, None, "lower_right").full(q_length, kv_length, torch.device("cpu"))
    elif side in ("left", "right") and plain and q_offset - kv_offset in (0, kv_length - q_length):
        assert isinstance(got, masks.PatternMask)
        assert got.shape == expected.shape and got.dtype == torch.bool and got._full is None
    assert torch.equal(torch.broadcast_to(got, expected.shape), expected)


def test_operations_see_the_full_mask():
    keys = padding("left").bool()
    make = {"batch_size": 3, "q_length": 9, "kv_length": 9, "attention_mask": keys}
    full = masking_utils.sdpa_mask(**make)
    for read in (
        lambda m: m[:, :, 2:, :4],
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: ~m,
        lambda m: torch.cat([m, m], -1),
        lambda m: torch.stack([m])[0],
        lambda m: m.to(torch.float32),
        lambda m: m.expand(3, 2, 9, 9),
        copy.deepcopy,
    ):
        mask = integration.attention_mask(**make)
        assert isinstance(mask, masks.PatternMask)
        assert type(read(mask)) is torch.Tensor and torch.equal(read(mask), read(full))
    mask = integration.attention_mask(**make)
    assert mask.to("cpu") is mask and mask._full is None
    mask[:, :, :, 8] = False  # written to: the attention function takes what was written
    written = full.clone()
    written[:, :, :, 8] = False
    q, k, v = torch.randn(3, 3, 4, 9, 8).unbind()
    module = torch.nn.Module()
    out, expected = (integration.attention(module, q, k, v, m)[0] for m in (mask, written))
    assert torch.equal(out, expected)
