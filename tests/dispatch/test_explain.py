"""What ``explain`` says of whole models, and of what is no call."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import fusednorm
from fusednorm import explain
from fusednorm.dispatch.explain import _places, decisions

E, H = 16, 2


def encoder(layers, norm_first=True, **kwargs):
    layer = fusednorm.TransformerEncoderLayer(E, H, 32, batch_first=True, norm_first=norm_first, **kwargs)
    return fusednorm.TransformerEncoder(layer, layers)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_12_layer_model_is_said_in_at_most_40_lines(training, norm_first):
    said = explain(encoder(12, norm_first).train(training), torch.randn(2, 5, E)).splitlines()
    assert len(said) <= 20, "\n".join(said)
    assert max(map(len, said)) < 240
    assert said[0].startswith("TransformerEncoder: fused, ")
    for start, place in (
        ("12 x scaled_dot_product_attention: ", "(in layers.0-11.self_attn)"),
        ("12 x bias_act_dropout: ", "(in layers.0-11)"),
    ):
        (line,) = [line for line in said if line.startswith(start)]
        assert line.endswith(place), line
    assert any("add_layer_norm: " in line and "layers.0-11.norm2" in line for line in said)
    assert len(set(said)) == len(said)  # nothing twice
    reasons = [at for at, line in enumerate(said) if line.startswith("  triton is not used: ")]
    assert len(reasons) == 1 and reasons[0] > len(said) - 8  # once, at the end


def test_one_layer_that_differs_is_named():
    model, x = encoder(4), torch.randn(2, 5, E)
    model.layers[2].linear1.register_forward_hook(lambda *args: None)
    said = explain(model, x)
    assert "3 x TransformerEncoderLayer: fused, " in said and "(in layers.0-1+3)" in said
    (line,) = [line for line in said.splitlines() if line.startswith("TransformerEncoderLayer: unfused")]
    assert line.endswith("(in layers.2)")
    at = said.splitlines().index(line)
    assert said.splitlines()[at + 1] == "  the fused path is not used: linear1 has hooks"  # below the line it is about


def test_every_decision_names_the_module_that_made_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = fusednorm.AddLayerNorm(E)

        def forward(self, x, residual):
            x, residual = self.norm(x, residual)
            return fusednorm.bias_act_dropout(x, None, "gelu"), residual

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.last = fusednorm.RMSNorm(E)

        def forward(self, x):
            residual = None
            for block in self.blocks:
                x, residual = block(x, residual)
            return fusednorm.layer_norm(self.last(x), E)

    model, x = Model(), torch.randn(3, E)
    places = [(route.function, route.where) for route in decisions(model, x)]
    assert places == [
        ("add_layer_norm", "blocks.0.norm"),
        ("bias_act_dropout", "blocks.0"),
        ("add_layer_norm", "blocks.1.norm"),
        ("bias_act_dropout", "blocks.1"),
        ("rms_norm", "last"),
        ("layer_norm", ""),
    ]
    assert [(r.function, r.where) for r in decisions(model.forward, x)] == places
    assert [(r.function, r.where) for r in decisions(functools.partial(model, x))] == places
    assert {r.where for r in decisions(lambda: model(x))} == {""}  # no model was given


def test_explain_leaves_the_way_that_is_taken_as_it_is():
    """Hooks would make the fused layers call each submodule."""
    model, x = encoder(2).eval(), torch.randn(2, 5, E)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert all(route.provider != "unfused" for route in decisions(model, x))
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_reasons_are_in_words_and_about_this_call():
    x = torch.randn(4, 64, requires_grad=True)
    for said in (
        explain(fusednorm.bias_act_dropout, x, x[0], "gelu"),
        explain(fusednorm.add_layer_norm, x, x, 64, x_bias=x[0]),
    ):
        assert "no kernel of ours serves" not in said
        assert "/4/" not in said and "bias_gelu" not in said and "bias_dropout_add" not in said


def test_what_is_no_function_is_described_and_not_printed():
    with pytest.raises(TypeError, match=r"got a Tensor of shape \(300, 300\) and dtype torch.float32") as caught:
        explain(torch.randn(300, 300))
    assert len(str(caught.value)) < 200
    with pytest.raises(TypeError, match="got 3"):
        explain(3)
    with pytest.raises(TypeError, match="got a list"):
        explain(list(range(1000)))
    with pytest.raises(TypeError, match=r"function: expected a function or a module, .* got 'layer_norm'"):
        explain("layer_norm", [4])


def test_the_names_of_modules_are_put_together():
    names = [f"layers.{i}.self_attn" for i in (0, 1, 2, 5, 11)] + ["norm", "", "norm"]
    assert _places(names) == "layers.0-2+5+11.self_attn, norm"
    assert _places(["a.1.b.2.c", "a.1.b.3.c"]) == "a.1.b.2-3.c"
    assert _places([]) == ""


NEAR = [("Torch", "torch"), ("trition", "triton"), ("refrence", "reference"), ("cuda13", "cuda")]


@pytest.mark.parametrize(("name", "near"), NEAR)
def test_an_unknown_provider_suggests_the_nearest_name(name, near):
    with pytest.raises(ValueError, match=rf"name: no provider is called '{name}'; did you mean '{near}'\?"):
        fusednorm.use_provider(name)
    with pytest.raises(ValueError, match=r"no provider is called 'xyz'\. Known are 'triton'.*'reference'"):
        fusednorm.use_provider("xyz")
