"""The ONNX exporter over torch.jit.trace: attention of every mask becomes torch's operator with one."""

from __future__ import annotations

import io

import pytest
import torch
from programs import CALLS, LAYER, PADDING, Program, inputs

import fusednorm
from fusednorm import _onnx

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)

KEYS = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(5)
MASKS = {
    "causal": {"is_causal": True},
    "window": {"window": (2, 1)},
    "window_left": {"window": (1, None), "causal_align": "lower_right"},
    "key_mask": {"key_mask": KEYS},
    "causal_key_mask": {"key_mask": KEYS, "is_causal": True},
    "bool_and_key_mask": {"key_mask": KEYS, "attn_mask": CAUSAL == 0},
    "additive": {"attn_mask": CAUSAL + 0.5},
    "additive_and_key_mask": {"key_mask": KEYS, "attn_mask": CAUSAL + 0.5},
}


def attention(grouped: bool = False, **options) -> Program:
    """Grouped: one head of keys for two of queries."""

    def call(x, y):
        q, k = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (x, y))
        k = k[:, :1] if grouped else k
        return fusednorm.scaled_dot_product_attention(q, k, k, enable_gqa=grouped, **options)

    return Program(call)


def export(program: torch.nn.Module) -> None:
    """As far as it goes without the package `onnx`, which writes the file."""
    try:
        torch.onnx.export(program.eval(), inputs(), io.BytesIO(), dynamo=False, opset_version=18)
    except torch.onnx.errors.OnnxExporterError as error:
        assert "onnx is not installed" in str(error)


@pytest.mark.parametrize("grouped", [False, True], ids=["heads", "grouped"])
@pytest.mark.parametrize("masks", MASKS)
def test_masks_become_one(masks, grouped, monkeypatch):
    program = attention(grouped, **MASKS[masks])
    monkeypatch.setattr(_onnx, "exporting", lambda: True)
    traced = torch.jit.trace(program, inputs())
    assert not [node for node in traced.inlined_graph.nodes() if "fusednorm" in node.kind()]
    torch.testing.assert_close(traced(*inputs(1)), program(*inputs(1)), rtol=1e-5, atol=1e-5)


PROGRAMS = ["add_layer_norm", "bias_act_dropout", "attention_causal", "MultiheadAttention", "TransformerEncoderLayer"]


@pytest.mark.parametrize("name", [*PROGRAMS, "TransformerEncoderLayer_padded", "TransformerDecoderLayer"])
def test_exporter_knows_every_operator_of_it(name):
    export(CALLS[name]())


@pytest.mark.parametrize("masks", ["", "causal", "window", "additive_and_key_mask"])
def test_exporter_sees_as_many_heads_of_keys_as_of_queries(masks):
    export(attention(True, **MASKS.get(masks, {})))


def test_decoder_with_a_causal_mask_is_exported():
    layer = fusednorm.TransformerDecoderLayer(**LAYER)
    causal = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDING}
    export(Program(lambda module, x, y: module(x, y, **causal), layer))


@pytest.mark.parametrize("option", [{"softcap": 2.0}, {"return_lse": True}, {"dropout_p": 0.5}], ids=str)
def test_what_onnx_has_no_form_of_is_named(option):
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"{name}: has no form in ONNX"):
        export(attention(is_causal=True, **option))
