"""What attention refuses: each message names the argument, its value and the remedy."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from fusednorm import scaled_dot_product_attention, varlen_attention

OP = "attention_fwd"

Q = torch.ones(2, 4, 5, 8)
K = torch.ones(2, 4, 7, 8)
QKV, HEADS, SHORT = (Q, K, K), torch.randn(1, 2, 4, 8), torch.randn(1, 1, 4, 8)
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
    NESTED = torch.nested.nested_tensor([torch.randn(4, 8), torch.randn(3, 8)])


def keys(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


SDPA = {
    "query_type": (TypeError, ([1.0], K, K), {}, r"query.*list"),
    "query_integer": (TypeError, (Q.int(), K, K), {}, r"query.*float32.*torch.int32.*convert"),
    "query_1d": (ValueError, (torch.ones(8), K, K), {}, r"query.*\(\.\.\., sequence, head_dim\).*\(8,\).*reshape"),
    "query_nested": (TypeError, (torch.nested.nested_tensor([Q], layout=torch.jagged), K, K), {}, r"query.*nested"),
    "query_sparse": (TypeError, (Q.to_sparse(), K, K), {}, r"query.*sparse.*to_dense"),
    "dtypes": (TypeError, (Q, K.double(), K), {}, r"key.*float64.*query torch.float32.*\.to\(dtype\)"),
    "value_dtype": (TypeError, (Q, K, K.half()), {}, r"value.*float16.*query torch.float32"),
    "devices": (ValueError, (Q, K.to("meta"), K), {}, r"key.*meta.*cpu.*\.to\(device\)"),
    "head_dims": (ValueError, (Q, torch.ones(2, 4, 7, 9), K), {}, r"key.*head dim 9.*query's 8"),
    "head_dim": (ValueError, (torch.ones(1, 3, 257),) * 3, {}, r"query.*257.*over 256.*split"),
    "value_length": (ValueError, (Q, K, Q), {}, r"value.*5 positions.*key 7"),
    "heads": (ValueError, (Q, K[:, :2], K[:, :2]), {}, r"key.*\(2, 2\).*\(2, 4\).*enable_gqa=True"),
    "value_heads": (ValueError, (Q, K, K[:, :2]), {}, r"value.*\(2, 2\).*\(2, 4\).*enable_gqa"),
    "gqa_divides": (ValueError, (Q, K[:, :3], K[:, :3]), {"enable_gqa": True}, r"key.*3.*divide"),
    "gqa_more_heads": (ValueError, (Q[:, :2], K, K), {"enable_gqa": True}, r"key.*4 heads.*query's 2"),
    "gqa_without_heads": (ValueError, (Q[0, 0], K[0, 0], K[0, 0]), {"enable_gqa": True}, r"enable_gqa.*unsqueeze"),
    "batch": (ValueError, (Q, torch.ones(3, 4, 7, 8), torch.ones(3, 4, 7, 8)), {}, r"key.*\(3, 4\).*\(2, 4\)"),
    "query_array": (TypeError, (Q.numpy(), K, K), {}, r"query.*ndarray.*torch\.from_numpy\(query\)"),
    "mask_float16": (TypeError, (Q, K, K, torch.ones(5, 7).half()), {}, r"attn_mask.*attend\) or float32 \(added"),
    "mask_type": (TypeError, (Q, K, K, "causal"), {}, r"attn_mask.*str"),
    "mask_dtype": (TypeError, (Q, K, K, torch.ones(5, 7).int()), {}, r"attn_mask.*bool.*torch.int32.*convert"),
    "mask_float64": (TypeError, (Q, K, K, torch.ones(5, 7).double()), {}, r"attn_mask.*torch.float64"),
    "mask_shape": (ValueError, (Q, K, K, torch.ones(7, 5)), {}, r"attn_mask.*\(7, 5\).*\(2, 4, 5, 7\).*unsqueeze or"),
    "mask_batch": (ValueError, (Q, K, K, torch.ones(3, 1, 5, 7)), {}, r"attn_mask.*\(3, 1, 5, 7\).*\(2, 4, 5, 7\)"),
    "mask_1d": (ValueError, (Q, K, K, torch.ones(7)), {}, r"attn_mask.*2 dimensions.*\(7,\)"),
    "mask_5d": (ValueError, (Q, K, K, torch.ones(1, 2, 4, 5, 7)), {}, r"attn_mask.*\(1, 2, 4, 5, 7\)"),
    "mask_device": (ValueError, (Q, K, K, torch.ones(5, 7, device="meta")), {}, r"attn_mask.*meta.*cpu"),
    "mask_sparse": (TypeError, (Q, K, K, torch.ones(5, 7).to_sparse()), {}, r"attn_mask.*sparse.*to_dense"),
    "probability": (ValueError, (Q, K, K, None, 1.5), {}, r"dropout_p.*\[0, 1\].*1\.5"),
    "probability_negative": (ValueError, (Q, K, K, None, -0.1), {}, r"dropout_p.*-0\.1"),
    "scale": (TypeError, QKV, {"scale": "large"}, r"scale.*number.*str"),
    "key_mask_type": (TypeError, QKV, {"key_mask": [True]}, r"key_mask.*list"),
    "key_mask_dtype": (
        *(TypeError, QKV, {"key_mask": torch.ones(2, 7)}),
        r"key_mask.*bool.*float32.*mask != 0.*mask == 0.*additive",
    ),
    "key_mask_shape": (ValueError, QKV, {"key_mask": keys(2, 5)}, r"key_mask.*\(2, 7\).*\(2, 5\)"),
    "key_mask_expanded": (
        *(ValueError, QKV, {"key_mask": keys(2, 1, 1, 7)}),
        r"key_mask.*\(2, 7\).*\(2, 1, 1, 7\).*mask\[:, 0, 0\].*attn_mask",
    ),
    "key_mask_of_ints": (TypeError, QKV, {"key_mask": keys(2, 7).long()}, r"int64; pass `mask != 0` if 1[^,]*$"),
    "key_mask_broadcasts": (ValueError, QKV, {"key_mask": keys(1, 7)}, r"key_mask.*\(2, 7\).*\(1, 7\).*expand"),
    "window_type": (TypeError, QKV, {"window": 3}, r"window.*\(left, right\).*int"),
    "window_length": (ValueError, QKV, {"window": (1, 2, 3)}, r"window.*3 entries"),
    "window_negative": (ValueError, QKV, {"window": (-1, 0)}, r"window.*>= 0.*\(-1, 0\).*None is unbounded"),
    "window_float": (TypeError, QKV, {"window": (1.5, 0)}, r"window.*ints.*1\.5"),
    "softcap": (ValueError, QKV, {"softcap": -1.0}, r"softcap.*0\.0 \(no cap\).*-1\.0"),
    "softcap_nan": (ValueError, QKV, {"softcap": float("nan")}, r"softcap.*nan"),
    "softcap_type": (TypeError, QKV, {"softcap": None}, r"softcap.*0\.0 is no cap.*NoneType"),
    "align": (ValueError, QKV, {"causal_align": "bottom"}, r"causal_align.*'lower_right'.*'bottom'"),
    "seed": (TypeError, (Q, K, K, None, 0.5), {"seed": 1.5}, r"seed.*one-element int64"),
    "key_mask_sparse": (TypeError, (SHORT,) * 3, {"key_mask": keys(1, 4).to_sparse()}, "key_mask: .*to_dense"),
    "mask_shape_beside_is_causal": (
        *(ValueError, (torch.ones(1, 2, 6, 8),) * 3, {"attn_mask": keys(5, 6), "is_causal": True}),
        r"attn_mask.*\(5, 6\)",
    ),
    "nested_everywhere": (TypeError, (NESTED,) * 3, {}, "query: nested tensors"),
}
for _n, _name in enumerate(("query", "key", "value")):
    for _other, _said in ((NESTED, "nested tensors are not accepted"), (torch.randn(4, 8).to_sparse(), "to_dense")):
        _operands = [torch.randn(4, 8) for _ in range(3)]
        _operands[_n] = _other
        SDPA[f"{_name}_{_said}"] = (TypeError, tuple(_operands), {}, f"{_name}: .*{_said}")
for _options in ({}, {"softcap": 1.0}, {"is_causal": True}, {"return_lse": True}):  # every way
    _said = "scale: expected a number or None, got bool"
    SDPA[f"scale_bool_{_options}"] = (TypeError, (HEADS,) * 3, {"scale": True, **_options}, _said)
for _softcap in (1e39, 1e-46, math.inf, -1.0, math.nan):  # which float32 does not hold, or no cap
    SDPA[f"softcap_{_softcap}"] = (ValueError, (HEADS,) * 3, {"softcap": _softcap}, r"softcap: expected 0\.0")


@pytest.mark.parametrize("requires_grad", [False, True], ids=["forward", "with_gradient"])
@pytest.mark.parametrize("case", SDPA)
def test_error_names_argument_value_and_remedy(case, requires_grad, using):
    error, args, options, said = SDPA[case]
    if requires_grad and isinstance(args[0], torch.Tensor) and args[0].is_floating_point() and args[0].is_leaf:
        args = (args[0].detach().requires_grad_(), *args[1:])
    with using, pytest.raises(error, match=said):
        scaled_dot_product_attention(*args, **options)


T = torch.ones(6, 4, 8)


def bounds(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


B = bounds(0, 2, 6)
VARLEN = {
    "query_shape": (ValueError, (T[0], T, T, B, B, 4, 4), r"query.*\(total, heads, head_dim\).*\(4, 8\)"),
    "heads": (ValueError, (T, T[:, :3], T[:, :3], B, B, 4, 4), r"key.*3 heads.*query's 4"),
    "value_heads": (ValueError, (T, T, T[:, :2], B, B, 4, 4), r"value.*2 heads.*key 4"),
    "value_length": (ValueError, (T, T, T[:5], B, B, 4, 4), r"value.*5 positions.*key 6"),
    "type": (TypeError, (T, T, T, [0, 6], B, 4, 4), r"cu_seqlens_q.*int32.*list"),
    "dtype": (TypeError, (T, T, T, B, B.long(), 4, 4), r"cu_seqlens_k.*int32.*torch.int64.*to\(torch.int32\)"),
    "dimensions": (ValueError, (T, T, T, B[None], B, 4, 4), r"cu_seqlens_q.*\(batch \+ 1,\).*\(1, 3\)"),
    "empty": (ValueError, (T, T, T, B[:0], B, 4, 4), r"cu_seqlens_q.*\(0,\)"),
    "not_monotone": (ValueError, (T, T, T, bounds(0, 7, 6), B, 7, 4), r"cu_seqlens_q.*never decrease.*\[0, 7, 6\]"),
    "begin": (ValueError, (T, T, T, B, bounds(1, 2, 6), 4, 4), r"cu_seqlens_k.*begin with 0.*\[1, 2, 6\]"),
    "end": (ValueError, (T, T, T, B, bounds(0, 2, 5), 4, 4), r"cu_seqlens_k.*length 6.*\[0, 2, 5\].*cumulative"),
    "numbers": (ValueError, (T, T, T, B, bounds(0, 6), 4, 6), r"cu_seqlens_k.*1 sequences.*has 2"),
    "sparse": (TypeError, (T[:4],) * 3 + (bounds(0, 4), bounds(0, 4).to_sparse(), 4, 4), "cu_seqlens_k: .*to_dense"),
    "longest": (ValueError, (T, T, T, B, B, 3, 4), r"max_seqlen_q.*3.*4 positions"),
    "longest_type": (TypeError, (T, T, T, B, B, 4.0, 4), r"max_seqlen_q.*float"),
    "probability": (ValueError, (T, T, T, B, B, 4, 4, 1.5), r"dropout_p.*1\.5"),
    "device": (ValueError, (T, T, T, B.to("meta"), B, 4, 4), r"cu_seqlens_q.*meta.*cpu"),
}


@pytest.mark.parametrize("case", VARLEN)
def test_varlen_error_names_argument_value_and_remedy(case, using):
    error, args, said = VARLEN[case]
    with using, pytest.raises(error, match=said):
        varlen_attention(*args)
