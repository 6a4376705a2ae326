"""``recompute``: the same results from fewer kept bytes, and the report of them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from drop_in import error, grid, results
from torch import nn

import fusednorm
from fusednorm import LayerNorm, activation_bytes

OP = "attention_fwd"
B, L, M, E, H, F = 4, 24, 17, 64, 4, 128
PARTS = ("norms", "activation", "attention")
SETS = [(), ("norms",), ("activation",), ("attention",), PARTS]


def module(name: str, recompute=(), norm: bool = True, **form) -> nn.Module:
    torch.manual_seed(1)
    kind = name.removesuffix("Layer")
    form = {"dropout": 0.1, "activation": "gelu", "batch_first": True, **form}
    layer = getattr(fusednorm, f"{kind}Layer")(E, H, F, **form, recompute=recompute)
    if name != kind:
        return layer
    last = LayerNorm(E, dtype=form.get("dtype")) if norm else None
    return getattr(fusednorm, kind)(layer, 2, last)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    lengths = (L, M) if "Decoder" in name else (L,)
    return tuple(torch.randn(B, n, E, dtype=dtype, requires_grad=True) for n in lengths)


def kept(layer: nn.Module, args: tuple, **kwargs) -> int:
    """Bytes of the storages that the graph holds, but for parameters and arguments."""
    given = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *args)}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(*args, **kwargs)
    assert out.requires_grad  # and is alive: no two storages had one address
    return sum(storage.nbytes() for storage in storages.values())


EVERY_MODULE = pytest.mark.parametrize(
    "name", ["TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder", "TransformerDecoder"]
)


@EVERY_MODULE
@pytest.mark.parametrize("recompute", SETS, ids="+".join)
def test_the_report_is_what_is_measured(name, recompute):
    for form in grid(norm_first=(False, True), batch_first=(True,), norm=(True, False)):
        layer = module(name, recompute, **form)
        assert sum(activation_bytes(layer, B, L, M).values()) == kept(layer, inputs(name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_report_in_other_dtypes_and_layouts(dtype):
    layer = module("TransformerDecoderLayer", norm_first=True, dtype=dtype)
    assert sum(activation_bytes(layer, B, L, M).values()) == kept(layer, inputs("TransformerDecoderLayer", dtype))
    layer = module("TransformerEncoderLayer", batch_first=False, bias=False, dtype=dtype)
    assert sum(activation_bytes(layer, L, B).values()) == kept(layer, inputs("TransformerEncoderLayer", dtype))
    for form in grid(norm_first=(False, True), norm=(True, False)):
        layer = module("TransformerEncoder", dtype=dtype, **form)
        assert sum(activation_bytes(layer, B, L).values()) == kept(layer, inputs("TransformerEncoder", dtype))


def test_what_each_part_saves():
    """Post-norm: the sum before the inner norm; q, k, v, the output and the statistics; half of the feed-forward."""
    plain = activation_bytes(module("TransformerEncoderLayer"), B, L)
    assert plain.keys() == {"attention", "feed_forward", "norm1", "norm2"}
    row = B * L * 4
    saved = {"norms": ("norm1", row * E), "activation": ("feed_forward", row * F)}
    saved["attention"] = ("attention", row * (4 * E + H))
    for name, (part, size) in saved.items():
        found = activation_bytes(module("TransformerEncoderLayer", (name,)), B, L)
        assert plain[part] - found[part] == size and sum(plain.values()) - sum(found.values()) == size


def test_without_dropout_no_more_is_kept_than_reported():
    for name, recompute in (("TransformerEncoderLayer", ()), ("TransformerDecoderLayer", PARTS)):
        layer = module(name, recompute, activation="relu", dropout=0.0)
        assert kept(layer, inputs(name)) <= sum(activation_bytes(layer, B, L, M).values())


def test_a_weight_at_zero_keeps_the_sum_and_the_report_says_so(caplog):
    layer = module("TransformerEncoderLayer", ("norms",))
    before = activation_bytes(layer, B, L)
    with torch.no_grad():
        layer.norm1.weight[0] = 0.0
    after = activation_bytes(layer, B, L)
    assert after["norm1"] - before["norm1"] == B * L * E * 4
    assert sum(after.values()) == kept(layer, inputs("TransformerEncoderLayer"))


def test_what_has_no_report_is_refused():
    with pytest.raises(TypeError, match=r"module: expected one of this package's .*Linear"):
        activation_bytes(nn.Linear(2, 2), B, L)
    with pytest.raises(ValueError, match=r"does not take the fused path.*activation"):
        activation_bytes(module("TransformerEncoderLayer", activation=torch.tanh), B, L)
    hooked = module("TransformerEncoder")
    hooked.layers[0].linear1.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="linear1 has hooks"):
        activation_bytes(hooked, B, L)


def check_results(name: str, recompute: tuple[str, ...], using, **options) -> None:
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    padding = torch.arange(L) >= torch.tensor([L, 9, 2, 5])[:, None]
    names = ("tgt_mask", "tgt_key_padding_mask") if "Decoder" in name else ("mask", "src_key_padding_mask")
    names = ("src_mask", names[1]) if name == "TransformerEncoderLayer" else names
    for norm_first in (False, True):
        args = inputs(name, torch.float64)
        found = []
        for parts in ((), recompute):
            layer = module(name, parts, norm_first=norm_first, dtype=torch.float64, **options)
            torch.manual_seed(2)
            with using:
                found.append(results(layer, args, dict(zip(names, (causal, padding), strict=True))))
        assert error(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("recompute", SETS[1:-1], ids="+".join)
def test_results_of_a_layer_are_those_of_keeping_everything(name, recompute):
    check_results(name, recompute, nullcontext())


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_results_of_a_stack_are_those_of_keeping_everything(name, provider, using):
    """What is recomputed has a seed. What torch's operators keep has torch's own mask, another one."""
    check_results(name, PARTS, using, **({"dropout": 0.0} if provider == "torch" else {}))


def test_a_learned_mask_gets_its_gradient_through_recomputed_attention():
    mask = torch.randn(L, L, dtype=torch.float64, requires_grad=True)
    args = inputs("TransformerEncoderLayer", torch.float64)
    found = []
    for parts in ((), PARTS):
        layer = module("TransformerEncoderLayer", parts, dropout=0.0, dtype=torch.float64)
        found.append(results(layer, args, {"src_mask": mask}))
    assert error(found[1], found[0]) < 1e-12


def test_frozen_parameters_and_inputs_without_gradient():
    layer = module("TransformerEncoderLayer", PARTS)
    x = torch.randn(B, L, E)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert not layer(x).requires_grad
    layer.linear2.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.linear2.weight.grad is not None and layer.linear1.weight.grad is None


@pytest.mark.parametrize("recompute", SETS[1:], ids="+".join)
@pytest.mark.parametrize("form", ["stack", "shared layer", "one tensor twice"])
def test_recomputed_gradients_that_are_to_be_differentiated_are_the_same(form, recompute):
    """Inputs that were made of each other, as a decoder's memory, a weight's product and its bias, and a layer's own
    output: nothing counts twice."""
    name = {"stack": "", "shared layer": "EncoderLayer", "one tensor twice": "DecoderLayer"}[form]
    sizes, lengths = ((8, 2, 2, 2, 12, 0.0), (4, 3)) if form == "stack" else ((8, 2, 12, 0.0), (4,))
    args = [torch.randn(2, length, 8, dtype=torch.float64, requires_grad=True) for length in lengths]

    def derivatives(recompute: tuple[str, ...]) -> tuple:
        torch.manual_seed(2)
        model = getattr(fusednorm, f"Transformer{name}")(
            *sizes, activation="gelu", batch_first=True, dtype=torch.float64, recompute=recompute
        )
        run = {"shared layer": lambda x: model(model(x)), "one tensor twice": lambda x: model(x, x)}.get(form, model)
        assert torch.autograd.gradgradcheck(run, args, fast_mode=True)
        loss, leaves = run(*args).sin().sum(), [*args, *model.parameters()]
        plain = torch.autograd.grad(loss, leaves, retain_graph=True)
        alone = [torch.autograd.grad(loss, leaf, create_graph=True)[0] for leaf in leaves]
        graphed = torch.autograd.grad(loss, leaves, create_graph=True)
        return plain, alone, graphed, torch.autograd.grad(sum(g.square().sum() for g in graphed), leaves)

    plain, alone, graphed, second = derivatives(recompute)
    assert error(graphed, plain) < 1e-12 and error(alone, plain) < 1e-12
    torch.testing.assert_close(graphed, plain, rtol=1e-10, atol=1e-12)
    # float64; second derivatives are sums of more terms than the first, in another order where they are recomputed
    torch.testing.assert_close(second, derivatives(())[3], rtol=1e-9, atol=1e-11)
