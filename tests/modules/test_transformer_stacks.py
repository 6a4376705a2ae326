"""The stacks: the residual that travels, the causal mask that is found, and layers in other hands."""

from __future__ import annotations

import warnings

import pytest
import torch
from drop_in import error, grid, results, twins
from torch import nn

import fusednorm
from fusednorm import Transformer, TransformerDecoder, TransformerEncoder, TransformerEncoderLayer
from fusednorm.dispatch.explain import decisions
from fusednorm.modules import attention

OP = "attention_fwd"
B, S, T, E, H = 3, 6, 5, 16, 4
SIZES = {"d_model": E, "nhead": H, "dim_feedforward": 24, "dropout": 0.0, "dtype": torch.float64}
FORMS = grid(norm_first=(False, True), batch_first=(False, True))


def stacks(name: str, norm: bool, **form) -> tuple[nn.Module, nn.Module]:
    layer = getattr(nn, f"{name}Layer")(**SIZES, **form)
    last = nn.LayerNorm(E, dtype=torch.float64) if norm else None
    return twins(name, layer, 3, last)


def inputs(batch_first: bool, *lengths: int) -> tuple:
    shapes = [(B, n, E) if batch_first else (n, B, E) for n in lengths]
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def padding(length: int) -> torch.Tensor:
    return torch.arange(length) >= torch.tensor([length, 2, 4])[:, None]


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_stacks_give_torchs_results(form, norm, using):
    causal = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    theirs, ours = stacks("TransformerEncoder", norm, **form)
    args = inputs(form["batch_first"], T)
    for kwargs in ({}, {"mask": causal}, {"mask": causal.isinf(), "src_key_padding_mask": padding(T)}):
        with using:
            assert error(results(ours, args, kwargs), results(theirs, args, kwargs)) < 1e-13
    theirs, ours = stacks("TransformerDecoder", norm, **form)
    args = inputs(form["batch_first"], T, S)
    paddings = {"tgt_key_padding_mask": padding(T), "memory_key_padding_mask": padding(S)}
    for kwargs in ({}, {"tgt_mask": causal.isinf(), **paddings}, {"tgt_mask": causal, "tgt_is_causal": True}):
        with using:
            assert error(results(ours, args, kwargs), results(theirs, args, kwargs)) < 1e-13


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_transformer_gives_torchs_results(form, using):
    theirs, ours = twins("Transformer", **SIZES, num_encoder_layers=2, num_decoder_layers=2, **form)
    args = inputs(form["batch_first"], S, T)
    hidden = (
        torch.rand(T, S, generator=torch.Generator().manual_seed(3)).lt(0.3).index_fill(1, torch.tensor([0]), False)
    )
    kwargs = {"tgt_mask": torch.ones(T, T).triu(1).bool(), "memory_mask": hidden}
    kwargs |= {"src_key_padding_mask": padding(S), "memory_key_padding_mask": padding(S)}
    with using:
        assert error(results(ours, args, kwargs), results(theirs, args, kwargs)) < 1e-13
    unbatched = tuple(x[:, 0] if not form["batch_first"] else x[0] for x in args)
    assert error(results(ours, unbatched), results(theirs, unbatched)) < 1e-13


def test_between_pre_norm_layers_every_sum_is_fused_with_the_next_norm():
    ours = TransformerEncoder(TransformerEncoderLayer(E, H, 24, norm_first=True), 3, fusednorm.LayerNorm(E))
    x = torch.randn(S, B, E, requires_grad=True)
    lines = [f"{r.function}: {r.provider}, {r.how}" for r in decisions(ours, x)]
    assert lines[0] == "TransformerEncoder: fused, 3 layers, each residual step with the next layer's norm"
    assert sum(line.startswith("add_layer_norm") for line in lines) == 2 * 3 + 1
    assert not any(line.startswith("layer_norm") for line in lines)
    assert sum(line.startswith("bias_act_dropout") for line in lines) == 3


def with_other_class(stack):
    stack.layers[2] = nn.TransformerEncoderLayer(**SIZES, norm_first=True)
    stack.layers[2].load_state_dict(stack.layers[0].state_dict())


CHANGES = {  # what explain says, and what is done to a stack
    "layers.1 has hooks": lambda stack: stack.layers[1].register_forward_hook(lambda *args: None),
    "layers.2 is torch.nn.TransformerEncoderLayer; use fusednorm.TransformerEncoderLayer": with_other_class,
    "layers.0.linear1 has hooks": lambda stack: stack.layers[0].linear1.register_forward_hook(lambda *args: None),
    "layers.1 is compiled by itself": lambda stack: stack.layers[1].compile(backend="eager"),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_layers_that_are_not_plain_are_called_one_by_one(reason):
    _, ours = stacks("TransformerEncoder", True, norm_first=True)
    (x,) = inputs(False, S)
    for layer in ours.layers[1:]:
        layer.load_state_dict(ours.layers[0].state_dict())
    with torch.no_grad():  # Dynamo would look for the gradient of what is no leaf, and torch warn of it
        expected = ours(x)
        CHANGES[reason](ours)
        torch.testing.assert_close(ours(x), expected, rtol=0.0, atol=1e-13)
        first, why = fusednorm.explain(ours, x).splitlines()[:2]
    assert first == "TransformerEncoder: unfused, each submodule by itself" and reason in why


@pytest.mark.parametrize("norm_first", [False, True])
def test_our_layers_inside_torchs_own_stacks(norm_first):
    """In eval mode without gradients torch's encoder hands over a nested tensor and no mask."""
    form = {"norm_first": norm_first, "batch_first": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(**SIZES, **form), 2)
        ours = nn.TransformerEncoder(TransformerEncoderLayer(**SIZES, **form), 2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    args = inputs(True, S)
    kwargs = {"src_key_padding_mask": padding(S)}
    assert error(results(ours, args, kwargs), results(theirs, args, kwargs)) < 1e-13
    kwargs["mask"] = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Support for mismatched|The PyTorch API of nested)")
        assert error(results(ours, args, kwargs), results(theirs, args, kwargs)) < 1e-13
        with torch.no_grad():
            found, expected = (m.eval()(*args, src_key_padding_mask=padding(S)) for m in (ours, theirs))
    assert ours.use_nested_tensor == (not norm_first)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
    memory = torch.randn(B, T, E, dtype=torch.float64)
    decoders = [nn.TransformerDecoder(m.TransformerDecoderLayer(**SIZES, **form), 2) for m in (fusednorm, nn)]
    decoders[0].load_state_dict(decoders[1].state_dict())
    assert error(results(decoders[0], (*args, memory)), results(decoders[1], (*args, memory))) < 1e-13


def test_torchs_layers_inside_our_stacks():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(**SIZES)
    with pytest.warns(UserWarning, match="decoder_layer: is torch.nn.TransformerDecoderLayer, which runs unfused"):
        ours = TransformerDecoder(layer, 2)
    theirs = nn.TransformerDecoder(layer, 2)
    args = inputs(False, T, S)
    mask = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)}
    assert error(results(ours, args, mask), results(theirs, args, mask)) < 1e-13


def test_a_causal_mask_is_found_and_a_padding_mask_never_expanded(monkeypatch):
    seen = []
    function = attention.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        seen.append({"attn_mask": attn_mask, "is_causal": is_causal, **kwargs})
        return function(q, k, v, attn_mask, dropout_p, is_causal, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    ours = TransformerEncoder(TransformerEncoderLayer(E, H, 24, batch_first=True), 2)
    x = torch.randn(B, S, E)
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    hidden = torch.zeros(B, S).masked_fill(padding(S), -torch.inf)
    for mask in (causal, causal.isinf()):
        for pads in (padding(S), hidden):
            ours(x, mask, pads)
    assert len(seen) == 2 * 2 * 2
    assert all(call["attn_mask"] is None and call["is_causal"] for call in seen)
    assert all(call["key_mask"].shape == (B, S) for call in seen)
    seen.clear()
    ours(x, causal.masked_fill(causal.isinf(), -1.0))
    ours(x, src_key_padding_mask=torch.randn(B, S))
    assert not any(call["is_causal"] for call in seen)
    assert [call["attn_mask"].shape for call in seen] == [(S, S)] * 2 + [(B, 1, 1, S)] * 2


def test_attributes():
    ours = Transformer(E, H, 1, 2, 24, recompute=["norms"])
    assert ours.decoder.layers[1].recompute == ("norms",) and ours.d_model == E and ours.nhead == H
    assert type(ours.encoder) is TransformerEncoder and ours.encoder.enable_nested_tensor
    custom = Transformer(E, H, custom_encoder=nn.Identity(), custom_decoder=ours.decoder)
    assert isinstance(custom.encoder, nn.Identity) and custom.decoder is ours.decoder


def test_refusals_name_the_stacks_own_arguments():
    encoder = TransformerEncoder(TransformerEncoderLayer(E, H, 24), 1)
    with pytest.raises(ValueError, match=r"mask: expected shape \(6, 6\)"):
        encoder(torch.randn(S, B, E), torch.zeros(B, S))
    with pytest.raises(ValueError, match=r"is_causal: .* mask is the causal mask"):
        encoder(torch.randn(S, B, E), is_causal=True)
    with pytest.raises(RuntimeError, match="batch number of src and tgt"):
        Transformer(E, H, 1, 1, 24)(torch.randn(S, B, E), torch.randn(T, B + 1, E))
    with pytest.raises(ValueError, match="recompute: 'everything' is none of 'norms', 'activation', 'attention'"):
        TransformerEncoderLayer(E, H, recompute=["everything"])
    with pytest.raises(TypeError, match="recompute: expected a sequence of names"):
        Transformer(E, H, recompute="norms")


def test_stacks_without_layers():
    x = torch.randn(S, B, E)
    assert TransformerEncoder(TransformerEncoderLayer(E, H), 0)(x) is x
