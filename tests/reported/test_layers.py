"""Faults that users reported against other attention and Transformer modules, as properties ours have. Each names the
report (of pytorch unless another project is named)."""

from __future__ import annotations

import pytest
import torch
from fresh import interpreter
from torch import nn

import fusednorm
from fusednorm import MultiheadAttention, Transformer, TransformerEncoder, TransformerEncoderLayer, dispatch, explain
from fusednorm.dispatch.explain import decisions

OP = "attention_fwd"
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's encoder's
B, S, E, H = 3, 7, 16, 4


def padding() -> torch.Tensor:
    return torch.arange(S) >= torch.tensor([S, 5, 2])[:, None]


def encoder(kind=TransformerEncoderLayer, stack=TransformerEncoder, **options) -> nn.Module:
    torch.manual_seed(0)
    return stack(kind(E, H, 24, **{"dropout": 0.1, "batch_first": True, **options}), 2)


# #86120: with a padding mask, eval mode gave an error or other values than training
@pytest.mark.parametrize("stack", [TransformerEncoder, nn.TransformerEncoder])
def test_a_padding_mask_gives_the_same_in_training_eval_and_inference(stack, using):
    model, x = encoder(stack=stack, dropout=0.0), torch.randn(B, S, E)
    present = ~padding()
    with using:
        trained = model(x, src_key_padding_mask=padding())
        evaluated = model.eval()(x, src_key_padding_mask=padding())
        with torch.inference_mode():
            inferred = model(x, src_key_padding_mask=padding())
    torch.testing.assert_close(evaluated, trained)
    torch.testing.assert_close(inferred[present], trained[present])
    for row, length in zip(range(B), present.sum(1).tolist(), strict=True):
        with using:
            torch.testing.assert_close(model(x[row, :length]), trained[row, :length])
    if stack is TransformerEncoder:  # torch's own puts zeros at padded positions without gradients
        torch.testing.assert_close(inferred, trained)


# #97111: the output was cut to the longest sequence of the batch
@pytest.mark.parametrize("stack", [TransformerEncoder, nn.TransformerEncoder])
def test_the_output_is_as_long_as_the_input_where_every_sequence_is_padded(stack, using):
    model, x = encoder(stack=stack).eval(), torch.randn(B, S, E)
    hidden = torch.arange(S) >= torch.tensor([4, 3, 2])[:, None]
    with using, torch.no_grad():
        assert model(x, src_key_padding_mask=hidden).shape == x.shape
    with using:
        assert model.train()(x, src_key_padding_mask=hidden).shape == x.shape


# #94428: slower with padding than without
def test_a_padding_mask_costs_no_expanded_mask_and_no_other_path():
    """A mask of (B, S) goes down as it is: no tensor of (.., S, S) is made, and the steps are those without it."""
    length, model = 64, encoder(dropout=0.1)
    x = torch.randn(B, length, E)
    hidden = torch.arange(length) >= torch.tensor([64, 50, 20])[:, None]

    def largest(**kwargs) -> int:
        with torch.profiler.profile(record_shapes=True) as profile:
            model(x, **kwargs)
        shapes = [shape for event in profile.events() for shape in event.input_shapes if shape]
        return max(shape.count(length) for shape in shapes)

    def steps(**kwargs) -> list[str]:
        return [f"{route.function}: {route.provider}" for route in decisions(model, x, **kwargs)]

    additive = torch.zeros(B, length).masked_fill(hidden, -torch.inf)
    for mask in (hidden, additive):
        assert steps(src_key_padding_mask=mask) == steps()
        if dispatch.unavailable_reason("cpu") is None:  # the reference computes in such tensors
            assert largest(src_key_padding_mask=mask) == 1


# #99282: is_causal was ignored where the weights were asked for
@pytest.mark.parametrize("padded", [False, True])
def test_is_causal_holds_with_and_without_weights(padded, using):
    attention, x = MultiheadAttention(E, H, batch_first=True), torch.randn(B, S, E)
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    kwargs = {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding() if padded else None}
    with using:
        out, weights = attention(x, x, x, **kwargs)
        plain, none = attention(x, x, x, **kwargs, need_weights=False)
        other = x.clone()
        other[:, -1] += 1.0
        later, _ = attention(other, other, other, **kwargs)
    assert none is None and torch.equal(out, plain)
    assert not weights.triu(1).any()
    torch.testing.assert_close(later[:, :-1], out[:, :-1])


# #124464, #99293; timm#1978, torchtune#1791: dropout of the attention stayed on in eval mode
@pytest.mark.parametrize("need_weights", [False, True])
def test_no_dropout_of_attention_in_eval_mode(need_weights, using):
    attention, x = MultiheadAttention(E, H, dropout=0.9, batch_first=True).eval(), torch.randn(B, S, E)
    without = MultiheadAttention(E, H, batch_first=True)
    without.load_state_dict(attention.state_dict())
    model = encoder(dropout=0.9).eval()
    with using:
        found = attention(x, x, x, need_weights=need_weights)[0]
        assert torch.equal(found, without(x, x, x, need_weights=need_weights)[0])
        assert torch.equal(model(x), model(x))
        attention.train()
        assert not torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])


# #99304: the attention maps of an encoder could not be had
@pytest.mark.parametrize("recompute", [(), ("attention",)])
def test_the_attention_maps_of_an_encoder_are_to_be_had(recompute, using):
    model, x = encoder(recompute=recompute), torch.randn(B, S, E)
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    torch.manual_seed(5)
    plain = model(x, causal, padding())
    torch.manual_seed(5)
    with fusednorm.attention_weights(model) as maps:
        assert torch.equal(model(x, causal, padding()), plain)
    assert list(maps) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(len(calls) == 1 and calls[0].shape == (B, H, S, S) for calls in maps.values())
    with using, fusednorm.attention_weights(model.eval()) as maps:
        model(x, causal, padding())
        model(x, causal, padding())
    assert model(x, causal, padding()).shape == x.shape
    for first, second in maps.values():
        assert torch.equal(first, second)
        torch.testing.assert_close(first.sum(-1), torch.ones(B, H, S))
        assert not first.triu(1).any() and not first[padding()[:, None, None].expand_as(first)].any()
    # those of the first layer are its module's own
    attention = model.layers[0].self_attn
    expected = attention(x, x, x, padding(), True, causal, average_attn_weights=False)[1]
    torch.testing.assert_close(maps["layers.0.self_attn"][0], expected)
    with (
        pytest.raises(ValueError, match=r"no fusednorm.MultiheadAttention in Linear"),
        fusednorm.attention_weights(nn.Linear(2, 2)),
    ):
        pass


def test_the_maps_of_an_encoder_decoder_have_every_attention():
    model = Transformer(E, H, 1, 2, 24, batch_first=True)
    with fusednorm.attention_weights(model) as maps:
        model(torch.randn(B, S, E), torch.randn(B, 5, E))
    shapes = {name.removesuffix("_attn"): calls[0].shape[-2:] for name, calls in maps.items()}
    assert shapes["encoder.layers.0.self"] == (S, S)
    assert shapes["decoder.layers.1.self"] == (5, 5) and shapes["decoder.layers.1.multihead"] == (5, S)


BARE = """
import sys
for absent in ("triton", "numpy", "einops", "transformers"):
    sys.modules[absent] = None
import torch
from fusednorm.providers.cpu import library as cpu
cpu.LIBRARY = cpu.LIBRARY.with_name("absent.so")
import fusednorm
assert fusednorm.available_providers() == ["torch", "reference"], fusednorm.available_providers()
model = fusednorm.Transformer(8, 2, 1, 1, 16, 0.1, batch_first=True, norm_first=True, recompute=("activation",))
out = model(torch.randn(2, 5, 8), torch.randn(2, 3, 8))
out.square().mean().backward()
assert all(p.grad is not None for p in model.parameters())
assert list(model.state_dict()) == list(torch.nn.Transformer(8, 2, 1, 1, 16).state_dict())
print("trained")
"""


# flash-attention#420, #1028, #382, #1912: no use without a build for this very machine
def test_the_layers_train_without_compiler_triton_or_native_library():
    assert interpreter("-c", BARE).strip() == "trained"


# #142132: the fast path was not taken, and nothing said why
def test_explain_says_why_a_path_is_not_taken():
    model, x = encoder(), torch.randn(B, S, E)
    lines = explain(model, x, src_key_padding_mask=padding()).splitlines()
    assert lines[0].startswith("TransformerEncoder: fused")
    assert any(line.startswith("2 x scaled_dot_product_attention: ") for line in lines)
    assert sum(line.startswith("  triton is not used: ") for line in lines) == 1
    model.layers[1].linear2.register_forward_hook(lambda *args: None)
    text = explain(model, x)
    assert "TransformerEncoder: unfused" in text and "the fused path is not used: linear2 has hooks" in text
    assert text.count("TransformerEncoderLayer: fused") == text.count("TransformerEncoderLayer: unfused") == 1
    assert "(in layers.0)" in text and "(in layers.1)" in text
    model = encoder(activation=torch.tanh)
    assert "the activation is a function of the caller's" in explain(model.layers[0], x)


# #149726 with #124464: one seed, one mask, whatever serves the call
def test_the_dropout_of_attention_is_that_of_its_seed(using, monkeypatch):
    attention, x = MultiheadAttention(E, H, dropout=0.5, batch_first=True), torch.randn(B, S, E)
    seed = torch.tensor([42])
    monkeypatch.setattr(fusednorm.dropout, "default_seed", lambda device: seed)
    with using:
        _, weights = attention(x, x, x, average_attn_weights=False)
    assert torch.equal(weights != 0, fusednorm.dropout_mask((B, H, S, S), 0.5, 42))


# #107573, #49791: the decoder layer had no cache of keys and values, so each new token cost the whole sequence again
def test_the_decoder_layer_continues_from_a_cache(monkeypatch):
    """It projects the new position alone: the rows that each linear layer takes are counted."""
    layer = fusednorm.TransformerDecoderLayer(E, H, 24, batch_first=True, norm_first=True).eval()
    x, memory, cache, taken = torch.randn(B, S, E), torch.randn(B, 20, E), fusednorm.KVCache(), []
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    with torch.no_grad():
        whole = layer(x, memory, tgt_mask=future, tgt_is_causal=True)
        layer(x[:, :-1], memory, cache=cache)
        product = torch.nn.functional.linear
        monkeypatch.setattr(
            torch.nn.functional, "linear", lambda a, *rest: taken.append(a[..., 0].numel()) or product(a, *rest)
        )
        last = layer(x[:, -1:], memory, cache=cache)
    torch.testing.assert_close(last, whole[:, -1:])
    assert set(taken) == {B}  # of 20 positions of memory none, and one of each sequence
