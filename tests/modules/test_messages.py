"""What the modules say: to a constructor's caller, to a loader, to help() and to explain()."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import nn

import fusednorm
from fusednorm import MultiheadAttention, TransformerDecoder, TransformerEncoder, TransformerEncoderLayer, explain

E, H = 8, 2
NAMES = [
    *("LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm", "MultiheadAttention", "TransformerEncoderLayer"),
    *("TransformerDecoderLayer", "TransformerEncoder", "TransformerDecoder", "Transformer"),
]
NORMS, LAYERS = NAMES[:4], ("TransformerEncoderLayer", "TransformerDecoderLayer")


@pytest.mark.parametrize("name", NAMES)
def test_help_of_forward_names_every_argument(name):
    forward = getattr(fusednorm, name).forward
    text = inspect.getdoc(forward) or ""
    assert "Should be overridden" not in text and "Args:" in text
    for argument in list(inspect.signature(forward).parameters)[1:]:
        assert f"{argument}:" in text or f"{argument}," in text or f", {argument}" in text, argument


@pytest.mark.parametrize("name", NAMES)
def test_constructors_take_torchs_arguments_in_torchs_order(name):
    ours = inspect.signature(getattr(fusednorm, name)).parameters
    theirs = inspect.signature(getattr(nn, name.removeprefix("Add"))).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for key, parameter in theirs.items():
        assert (ours[key].default, ours[key].kind) == (parameter.default, parameter.kind), key


WRONG = [
    *[(n, ("8",), {}, TypeError, "normalized_shape: expected an int, got str '8'") for n in NORMS],
    *[(n, ((4, 2.0),), {}, TypeError, "normalized_shape: expected an int, got float 2.0") for n in NORMS],
    *[(n, (-3,), {}, ValueError, "normalized_shape: expected at least 0, got -3") for n in NORMS],
    *[(n, (E, "1e-5"), {}, TypeError, "eps: .*str '1e-5'; pass a float .YAML") for n in NORMS],
    *[(n, (E,), {"dtype": torch.int64}, TypeError, "dtype: .*torch.int64") for n in NORMS],
    *[(n, (E,), {"x_bias": torch.ones(E)}, TypeError, "x_bias: .*Tensor") for n in NORMS[2:]],
    ("LayerNorm", (E, None), {}, TypeError, "eps: expected a number, got NoneType"),
    ("MultiheadAttention", (12, 5), {}, ValueError, "embed_dim: 12 is not divisible by num_heads 5; pass num_heads=4"),
    ("MultiheadAttention", (0, 2), {}, ValueError, "embed_dim: expected at least 1, got 0"),
    ("MultiheadAttention", (8, -2), {}, ValueError, "num_heads: expected at least 1, got -2"),
    ("MultiheadAttention", (8.0, 2), {}, TypeError, "embed_dim: expected an int, got float 8.0"),
    ("MultiheadAttention", (8, "2"), {}, TypeError, "num_heads: expected an int, got str '2'"),
    ("MultiheadAttention", (8, 2, 1.5), {}, ValueError, "dropout: .*between 0 and 1, got 1.5"),
    ("MultiheadAttention", (8, 2, float("nan")), {}, ValueError, "dropout: .*nan"),
    ("MultiheadAttention", (8, 2, "0.1"), {}, TypeError, "dropout: expected a number in .0, 1., got str '0.1'"),
    ("MultiheadAttention", (8, 2), {"kdim": "8"}, TypeError, "kdim: expected an int, got str '8'"),
    ("MultiheadAttention", (8, 2), {"dtype": torch.int8}, TypeError, "dtype: .*torch.int8"),
    *[(n, (12, 5), {}, ValueError, "d_model: 12 is not divisible by nhead 5; pass nhead=4") for n in LAYERS],
    *[(n, (8, 2, "16"), {}, TypeError, "dim_feedforward: expected an int, got str '16'") for n in LAYERS],
    *[(n, (8, 2, -1), {}, ValueError, "dim_feedforward: expected at least 0, got -1") for n in LAYERS],
    *[(n, (8, 2, 16, None), {}, TypeError, "dropout: .*NoneType") for n in LAYERS],
    *[(n, (8, 2, 16, -0.1), {}, ValueError, "dropout: .*-0.1") for n in LAYERS],
    *[
        (n, (8, 2, 16, 0.1, nn.ReLU), {}, TypeError, r"activation: .*class ReLU; pass an instance, ReLU\(\)")
        for n in LAYERS
    ],
    *[(n, (8, 2, 16, 0.1, None), {}, TypeError, "activation: .* function or one of relu/gelu/") for n in LAYERS],
    *[(n, (8, 2), {"layer_norm_eps": "1e-5"}, TypeError, "layer_norm_eps: .*str '1e-5'") for n in LAYERS],
    *[(n, (8, 2), {"dtype": torch.int8}, TypeError, "dtype: .*torch.int8") for n in LAYERS],
    ("Transformer", (12, 5), {}, ValueError, "d_model: 12 is not divisible by nhead 5"),
    ("Transformer", (8, 2, 1.0), {}, TypeError, "num_encoder_layers: expected an int, got float 1.0"),
    ("Transformer", (8, 2, 1, -1), {}, ValueError, "num_decoder_layers: expected at least 0, got -1"),
    (
        "TransformerEncoder",
        (nn.TransformerEncoderLayer, 1),
        {},
        TypeError,
        "encoder_layer: .*the class Transf.*instance",
    ),
    ("TransformerDecoder", ([], 1), {}, TypeError, "decoder_layer: expected a layer .*got list"),
    ("TransformerEncoder", (nn.Identity(), "1"), {}, TypeError, "num_layers: expected an int, got str '1'"),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "kind", "message"), WRONG)
def test_a_constructor_names_the_argument_the_value_and_the_remedy(name, args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        getattr(fusednorm, name)(*args, **kwargs)


@pytest.mark.parametrize("name", ["MultiheadAttention", *LAYERS, "Transformer"])
def test_indivisible_heads_raise_what_torch_raises_too(name):
    for space in (nn, fusednorm):
        with pytest.raises(AssertionError, match="divisible"):
            getattr(space, name)(12, 5)


def test_what_torchs_constructors_take_ours_take():
    for sizes in (E, [E], (E,), torch.Size([E]), iter((E,))):
        assert fusednorm.LayerNorm(sizes).normalized_shape == (E,)
    assert fusednorm.RMSNorm(E, None).eps is None and fusednorm.LayerNorm(E, 0).eps == 0
    for p in (0, 1, 0.5, 1.0, False):
        assert MultiheadAttention(E, H, p).dropout == p
        assert TransformerEncoderLayer(E, H, 16, p).dropout1.p == p
    assert callable(TransformerEncoderLayer(E, H, 16, 0.1, nn.GELU()).activation)


def encoder_layer(space=nn):
    return space.TransformerEncoderLayer(E, H, 16, batch_first=True)


class OfTheirOwn(nn.TransformerEncoderLayer):
    pass


def test_layers_of_torch_in_our_stacks_are_warned_of():
    with pytest.warns(
        UserWarning, match="encoder_layer: .*runs unfused; use fusednorm.TransformerEncoderLayer"
    ) as seen:
        stack = TransformerEncoder(encoder_layer(), 2)
    assert seen[0].filename == __file__
    text = explain(stack, torch.randn(2, 3, E))
    assert "layers.0 is torch.nn.TransformerEncoderLayer; use fusednorm.TransformerEncoderLayer" in text
    with pytest.warns(UserWarning, match="decoder_layer: is torch.nn.TransformerDecoderLayer, which runs unfused; use"):
        stack = TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16), 1)
    text = explain(stack, torch.randn(3, 2, E), torch.randn(3, 2, E))
    assert "layers.0 is torch.nn.TransformerDecoderLayer; use fusednorm.TransformerDecoderLayer" in text
    with pytest.warns(UserWarning, match=rf"is {__name__}\.OfTheirOwn, .*derive it from fusednorm.TransformerEnc"):
        TransformerEncoder(OfTheirOwn(E, H, 16), 1)
    theirs = nn.TransformerEncoder(encoder_layer(), 1), nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16), 1)
    with pytest.warns(UserWarning, match="custom_(en|de)coder: is torch.nn.Transformer.*use fusednorm.Transf") as seen:
        fusednorm.Transformer(E, H, custom_encoder=theirs[0], custom_decoder=theirs[1])
    assert len(seen) == 2 and seen[0].filename == __file__


def test_what_is_fused_or_no_stack_of_torchs_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack = TransformerEncoder(encoder_layer(fusednorm), 1)
        TransformerEncoder(nn.Identity(), 1)
        fusednorm.Transformer(E, H, 1, 1, 16, custom_encoder=stack)
        fusednorm.Transformer(E, H, 1, 1, 16, custom_encoder=nn.Identity(), custom_decoder=nn.Identity())


class Linear(nn.Linear):
    """Of another module, as quantisation's and LoRA's are."""


def test_explain_tells_classes_of_one_name_apart():
    layer = encoder_layer(fusednorm)
    layer.linear1 = Linear(E, 16)
    x = torch.randn(2, 3, E)
    reason = f"linear1 is {__name__}.Linear, not torch.nn.Linear"
    assert reason in explain(layer, x)
    stack = TransformerEncoder(layer, 2)
    assert f"layers.0.{reason}" in explain(stack, x).splitlines()[1]
    layer = encoder_layer(fusednorm)
    layer.norm1 = None
    with pytest.raises(TypeError):
        layer(x)
    assert layer._obstacle() == "norm1 is None"
    layer.self_attn = nn.MultiheadAttention(E, H, batch_first=True)
    assert layer._obstacle() == "self_attn is torch.nn.MultiheadAttention; use fusednorm.MultiheadAttention"


def test_explain_tells_what_a_construction_keeps_from_being_fused():
    x = torch.randn(2, 3, E)
    layer = TransformerEncoderLayer(E, H, 16, batch_first=True, norm_first=True, recompute=["norms"])
    stack = TransformerEncoder(layer, 1, nn.RMSNorm(E))
    assert "the last norm by itself: norm is torch.nn.RMSNorm, not torch.nn.LayerNorm" in explain(stack, x)
    stack.layers[0].linear1.register_forward_hook(lambda *args: None)
    assert "linear1 has hooks; recompute ('norms',) has no effect" in explain(stack, x)
    wide = TransformerEncoderLayer(600, 2, 16, batch_first=True)
    text = explain(wide, torch.randn(2, 3, 600))
    assert "MultiheadAttention: unfused, the weights of every query and key are stored" in text
    assert "head dim 300 is over 256" in text


@pytest.mark.parametrize("name", ["AddLayerNorm", "AddRMSNorm"])
def test_an_older_checkpoint_is_told_where_its_bias_belongs(name):
    def model(x_bias):
        norm = getattr(fusednorm, name)(E, x_bias=x_bias, layer_scale=1.0 if x_bias else None)
        return nn.Sequential(nn.Linear(E, E, bias=not x_bias), norm)

    old, new = model(False).state_dict(), model(True)
    with pytest.raises(RuntimeError) as refused:
        new.load_state_dict(old)
    text = str(refused.value)
    assert '"1.x_bias", the bias of the linear layer before this module (x_bias=True)' in text
    assert 'rename its key to this one from "<linear layer>.bias"' in text
    assert '"1.layer_scale", the factor of the branch' in text and 'Unexpected key(s) in state_dict: "0.bias"' in text
    found = new.load_state_dict(old, strict=False)
    assert set(found.missing_keys) == {"1.x_bias", "1.layer_scale"} and found.unexpected_keys == ["0.bias"]
    assert repr(found.missing_keys) == repr(list(map(str, found.missing_keys)))
    old["1.x_bias"], old["1.layer_scale"] = old.pop("0.bias"), torch.ones(E)
    assert str(new.load_state_dict(old)) == "<All keys matched successfully>"
    with pytest.raises(RuntimeError, match='"x_bias", the bias of'):
        new[1].load_state_dict({key: value for key, value in new[1].state_dict().items() if key != "x_bias"})


class Quantised(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.quant, self.linear = torch.ao.quantization.QuantStub(), nn.Linear(E, E)
        self.norm, self.dequant = norm, torch.ao.quantization.DeQuantStub()

    def forward(self, x):
        return self.dequant(self.norm(self.linear(self.quant(x))))


def statically_quantised(norm):
    torch.manual_seed(0)
    model = Quantised(norm).eval()
    x = torch.randn(16, E)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates this quantisation, and its observers warn
        model.qconfig = torch.ao.quantization.get_default_qconfig(torch.backends.quantized.engine)
        model = torch.ao.quantization.prepare(model)
        model(x)
        model = torch.ao.quantization.convert(model)
    return model, x


def test_eager_static_quantisation_swaps_a_layer_norm_as_torchs():
    ours, x = statically_quantised(fusednorm.LayerNorm(E))
    theirs, _ = statically_quantised(nn.LayerNorm(E))
    assert type(ours.norm) is type(theirs.norm) is torch.ao.nn.quantized.LayerNorm
    assert torch.equal(ours(x), theirs(x))


def test_a_quantised_tensor_is_refused_with_what_to_do():
    for norm in (fusednorm.RMSNorm(E), fusednorm.AddLayerNorm(E)):
        with pytest.raises(TypeError, match=r"torch.quint8, which is quantised; call dequantize.*DeQuantStub.*qconfig"):
            norm(torch.quantize_per_tensor(torch.randn(2, E), 0.1, 0, torch.quint8))


def test_operands_that_differ_from_the_parameters_are_refused_by_the_callers_name():
    x = torch.randn(2, 3, E)
    message = r"is torch.float64, the module's parameters torch.float32; convert {0} with .to\(torch.float32\)"
    attention = MultiheadAttention(E, H, batch_first=True)
    for at, name in enumerate(("query", "key", "value")):
        args = [x, x.clone(), x.clone()]
        args[at] = args[at].double()
        with pytest.raises(TypeError, match=f"^{name}: " + message.format(name)):
            attention(*args)
    with pytest.raises(ValueError, match=r"^key: is on meta, the module's parameters on cpu"):
        attention(x, x.to("meta"), x)
    other = MultiheadAttention(E, H, batch_first=True, kdim=4, vdim=4)
    with pytest.raises(TypeError, match=r"^query: is torch.float64"):
        other(x.double(), x[..., :4], x[..., :4])
    with pytest.raises(TypeError, match=r"^src: is torch.float64"):
        TransformerEncoder(encoder_layer(fusednorm), 1)(x.double())
    decoder = fusednorm.TransformerDecoderLayer(E, H, 16, batch_first=True)
    with pytest.raises(TypeError, match=r"^memory: is torch.float64"):
        decoder(x, x.double())
    with pytest.raises(TypeError, match=r"^src: expected a torch.Tensor, got list"):
        encoder_layer(fusednorm)([1.0])
    with pytest.raises(TypeError, match=r"^key: expected a torch.Tensor, got NoneType"):
        attention(x, None, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(x.bfloat16(), x, x)[0].dtype == torch.bfloat16


def test_masks_are_refused_by_the_callers_names_with_what_to_do():
    x = torch.randn(2, 3, E)
    layer = encoder_layer(fusednorm)
    kept = torch.ones(2, 3).long()
    remedy = "src_key_padding_mask == 0 if 0 hides, as in a tokenizer's mask, or src_key_padding_mask != 0 if 0 keeps"
    with pytest.raises(
        TypeError, match=rf"src_key_padding_mask: expected bool .* or float32 \(.*torch.int64; pass {remedy}"
    ):
        layer(x, src_key_padding_mask=kept)
    assert layer.eval()(x, src_key_padding_mask=kept == 0).shape == x.shape
    with pytest.raises(TypeError, match=r"src_mask: .*float16; convert it with .to\(torch.float32\)"):
        layer(x, torch.zeros(3, 3).half())
    low = encoder_layer(fusednorm).bfloat16()
    with pytest.raises(TypeError, match=r"src_mask: expected bool .* or float32 or src's torch.bfloat16 \(added"):
        low(x.bfloat16(), torch.zeros(3, 3).half())
    with pytest.raises(ValueError, match="src_mask: is on meta, src on cpu"):
        layer(x, torch.zeros(3, 3, device="meta"))
