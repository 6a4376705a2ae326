"""The layers: torch's to everything that handles modules, fused where they may be, and unfused where they may not."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from drop_in import error, grid, results, twins
from oracle_activation import TORCHS
from torch import nn
from torch.nn.utils import parametrizations

import fusednorm
from fusednorm import TransformerDecoderLayer, TransformerEncoderLayer, explain
from fusednorm.modules._layer import activation_name

OP = "attention_fwd"
B, S, M, E, H = 3, 6, 5, 16, 4
LAYERS = ("TransformerEncoderLayer", "TransformerDecoderLayer")
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)
FORMS = grid(norm_first=(False, True), batch_first=(False, True))
SIZES = {"d_model": E, "nhead": H, "dim_feedforward": 24, "dropout": 0.0, "dtype": torch.float64}


def inputs(name: str, batch_first: bool = True, dtype: torch.dtype = torch.float64) -> tuple:
    lengths = (S,) if "Encoder" in name else (S, M)
    shapes = [(B, n, E) if batch_first else (n, B, E) for n in lengths]
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def masks(name: str, dtype: torch.dtype | None = None) -> dict:
    """Bool, or additive of a dtype: padding and a causal mask."""
    causal = torch.ones(S, S).triu(1).bool()
    padding, across = torch.zeros(B, S).bool(), torch.zeros(B, M).bool()
    padding[0, 4:] = across[1, 2:] = True
    memory = (torch.rand(S, M, generator=torch.Generator().manual_seed(2)) < 0.3).index_fill(
        1, torch.tensor([0]), False
    )
    found = {"src_mask": causal, "src_key_padding_mask": padding}
    if "Decoder" in name:
        found = {"tgt_mask": causal, "tgt_key_padding_mask": padding}
        found |= {"memory_mask": memory, "memory_key_padding_mask": across}
    if dtype is None:
        return found
    return {n: torch.zeros(m.shape, dtype=dtype).masked_fill(m, -torch.inf) for n, m in found.items()}


class Squared(nn.Module):
    def forward(self, x):
        return x.square()


@EVERY_LAYER
@pytest.mark.parametrize("activation", [*TORCHS, F.silu, torch.tanh, nn.ReLU(), nn.GELU("tanh"), nn.SiLU(), Squared()])
def test_every_activation_gives_torchs_results(name, activation):
    for form in FORMS[:2]:
        theirs, ours = twins(name, **SIZES, activation=TORCHS.get(activation, activation), **form)
        if isinstance(activation, str):
            ours = getattr(fusednorm, name)(**SIZES, activation=activation, **form)
            ours.load_state_dict(theirs.state_dict())
            assert activation_name(ours.activation) == activation
        args = inputs(name, form["batch_first"])
        assert error(results(ours, args, masks(name)), results(theirs, args, masks(name))) < 1e-13


@EVERY_LAYER
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_mask_gives_torchs_results(name, form, using):
    theirs, ours = twins(name, **SIZES, **form)
    args = inputs(name, form["batch_first"])
    for given in (masks(name), masks(name, torch.float64)):
        for some in ({}, given, dict(list(given.items())[:1]), dict(list(given.items())[1:])):
            with using:
                assert error(results(ours, args, some), results(theirs, args, some)) < 1e-13
    hint = {"is_causal" if "Encoder" in name else "tgt_is_causal": True}
    with using:
        assert error(results(ours, args, masks(name) | hint), results(theirs, args, masks(name))) < 1e-13


@EVERY_LAYER
def test_unbatched_inputs(name):
    theirs, ours = twins(name, **SIZES)
    args = tuple(x[0].detach().requires_grad_() for x in inputs(name))
    given = {n: m[0] if "padding" in n else m for n, m in masks(name).items()}
    for some in ({}, given):
        assert error(results(ours, args, some), results(theirs, args, some)) < 1e-13


def lora(linear: nn.Linear) -> nn.Module:
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.sum(-1, keepdim=True)

    adapted = Adapted(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
    adapted.load_state_dict(linear.state_dict())
    return adapted


def hook(layer, seen):
    layer.linear2.register_forward_hook(lambda module, args, out: seen.append(1) or 2.0 * out)


def pre_hook(layer, seen):
    layer.norm1.register_forward_pre_hook(lambda module, args: seen.append(1) or (args[0] + 1.0,))


def backward_hook(layer, seen):
    layer.linear1.register_full_backward_hook(lambda module, into, out: seen.append(1) and None)


def attention_hook(layer, seen):
    layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(1) or (2.0 * out[0], out[1]))


def adapter(layer, seen):
    layer.linear1 = lora(layer.linear1)
    seen.append(1)


def parametrised(layer, seen):
    torch.manual_seed(0)
    parametrizations.weight_norm(layer.linear1)
    seen.append(1)


def replaced_norm(layer, seen):
    layer.norm2 = nn.RMSNorm(E, dtype=torch.float64)
    seen.append(1)


def replaced_forward(layer, seen):
    forward = layer.linear1.forward
    layer.linear1.forward = lambda x: seen.append(1) or 2.0 * forward(x)


def replaced_block(layer, seen):
    block = layer._ff_block
    layer._ff_block = lambda x: seen.append(1) or 2.0 * block(x)


CHANGES = {
    hook: "linear2 has hooks",
    pre_hook: "norm1 has hooks",
    backward_hook: "linear1 has hooks",
    attention_hook: "self_attn has hooks",
    adapter: f"linear1 is {__name__}.lora.<locals>.Adapted, not torch.nn.Linear",
    parametrised: "linear1 is torch.nn.utils.parametrize.ParametrizedLinear, not torch.nn.Linear",
    replaced_norm: "norm2 is torch.nn.RMSNorm, not torch.nn.LayerNorm",
    replaced_forward: "linear1.forward was replaced",
    replaced_block: "_ff_block is overridden",
}


@EVERY_LAYER
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_submodules_that_are_not_plain_are_called_and_explain_says_so(name, change):
    for form in FORMS[1:3]:
        theirs, ours = twins(name, **SIZES, **form)
        args = inputs(name, form["batch_first"])
        assert "fused" in explain(ours, *args).splitlines()[0]
        seen: list[int] = []
        change(theirs, [])
        change(ours, seen)
        assert error(results(ours, args, masks(name)), results(theirs, args, masks(name))) < 1e-13
        assert seen
        first, reason = explain(ours, *args).splitlines()[:2]
        assert first == f"{name}: unfused, each submodule by itself"
        assert reason == f"  the fused path is not used: {CHANGES[change]}" or CHANGES[change] in reason


def test_hooks_for_every_module_are_called():
    ours = TransformerEncoderLayer(E, H)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: called.append(type(module)))
    try:
        ours(torch.randn(S, B, E))
    finally:
        handle.remove()
    assert nn.Linear in called and fusednorm.LayerNorm in called and ours(torch.randn(S, B, E)).shape == (S, B, E)


@EVERY_LAYER
def test_a_subclass_with_a_block_of_its_own_keeps_it(name):
    class Mine(getattr(fusednorm, name)):
        def _sa_block(self, x, *args, **kwargs):
            return torch.zeros_like(x)

    class Theirs(getattr(nn, name)):
        _sa_block = Mine._sa_block

    theirs, ours = Theirs(**SIZES, batch_first=True), Mine(**SIZES, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    args = inputs(name)
    assert error(results(ours, args), results(theirs, args)) < 1e-13
    assert "_sa_block is overridden" in explain(ours, *args)


@EVERY_LAYER
def test_dropout_follows_the_mode_of_each_dropout_module(name):
    """Monte Carlo dropout switches the dropout modules alone."""
    ours = getattr(fusednorm, name)(**SIZES | {"dropout": 0.5}, batch_first=True).eval()
    args = inputs(name)
    assert torch.equal(ours(*args), ours(*args))
    ours.dropout2.train()
    assert not torch.equal(ours(*args), ours(*args))
    ours.dropout2.eval()
    assert torch.equal(ours(*args), ours(*args))
    ours.self_attn.train()
    assert not torch.equal(ours(*args), ours(*args))


@EVERY_LAYER
def test_dropout_of_everything_is_torchs(name):
    theirs, ours = twins(name, **SIZES | {"dropout": 1.0}, batch_first=True)
    args = inputs(name)
    assert error(results(ours, args), results(theirs, args)) < 1e-13
    assert "drops everything" in explain(ours, *args)


@EVERY_LAYER
@pytest.mark.parametrize("norm_first", [False, True])
def test_one_seed_gives_one_result(name, norm_first):
    ours = getattr(fusednorm, name)(**SIZES | {"dropout": 0.3}, batch_first=True, norm_first=norm_first)
    args, found = inputs(name), []
    for _ in range(2):
        torch.manual_seed(4)
        found.append(results(ours, args))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(ours(*args), found[0][0])


@EVERY_LAYER
def test_pickle_copy_and_types(name):
    ours = getattr(fusednorm, name)(**SIZES, batch_first=True, recompute=("norms",))
    args = inputs(name)
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert other.recompute == ("norms",) and isinstance(other, getattr(nn, name))
        assert torch.equal(other(*args), ours(*args))
    assert type(ours.self_attn) is fusednorm.MultiheadAttention and type(ours.norm1) is fusednorm.LayerNorm
    assert getattr(fusednorm, name)(**SIZES | {"dtype": None}, device="meta").linear1.weight.is_meta


@EVERY_LAYER
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_that_does_not_fit_is_named_and_nothing_is_loaded(name, strict):
    ours = getattr(fusednorm, name)(**SIZES)
    before = copy.deepcopy(ours.state_dict())
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    state["linear1.weight"] = torch.zeros(3, 3)
    del state["norm2.bias"]
    state["norm9.bias"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="nothing was loaded") as refused:
        ours.load_state_dict(state, strict=strict)
    assert "size mismatch for linear1.weight" in str(refused.value)
    assert strict == ('Missing key(s) in state_dict: "norm2.bias"' in str(refused.value))
    assert strict == ('Unexpected key(s) in state_dict: "norm9.bias"' in str(refused.value))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
    state["linear1.weight"] = torch.zeros_like(before["linear1.weight"])
    found = ours.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["norm2.bias"], ["norm9.bias"])
    assert not ours.linear1.weight.any()


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"src_mask": torch.zeros(S, S + 1)}, ValueError, r"src_mask: expected shape \(6, 6\)"),
        ({"src_mask": torch.zeros(S, S).int()}, TypeError, "src_mask: .*int32"),
        (
            {"src_key_padding_mask": torch.zeros(S, B).bool()},
            ValueError,
            r"src_key_padding_mask: expected shape \(3, 6\)",
        ),
        ({"is_causal": True}, ValueError, "is_causal: .*src_mask"),
        ({"src_mask": torch.zeros(2, 2), "is_causal": True}, ValueError, "src_mask: expected shape"),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_the_layers_own_names(given, kind, message):
    with pytest.raises(kind, match=message):
        TransformerEncoderLayer(E, H, batch_first=True)(torch.randn(B, S, E), **given)


def test_inputs_that_do_not_fit_are_refused_by_the_layers_own_names():
    encoder, decoder = TransformerEncoderLayer(E, H), TransformerDecoderLayer(E, H, batch_first=True)
    with pytest.raises(ValueError, match="src: expected 16 features"):
        encoder(torch.randn(S, B, E + 1))
    with pytest.raises(ValueError, match="memory: a batch of 4, tgt's is 3; batch_first is True"):
        decoder(torch.randn(B, S, E), torch.randn(B + 1, M, E))
    with pytest.raises(ValueError, match="memory: has 2 dimensions, tgt 3"):
        decoder(torch.randn(B, S, E), torch.randn(M, E))
    with pytest.raises(ValueError, match="memory_mask: expected shape"):
        decoder(torch.randn(B, S, E), torch.randn(B, M, E), memory_mask=torch.zeros(S, S))


@pytest.mark.parametrize("norm_first", [False, True])
def test_nested_tensors_are_taken_with_and_without_gradients(norm_first):
    theirs, ours = twins("TransformerEncoderLayer", **SIZES, batch_first=True, norm_first=norm_first)
    rows = [torch.randn(n, E, dtype=torch.float64) for n in (4, 6, 1)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        nested = torch.nested.nested_tensor(rows)
    expected = [theirs(row) for row in rows]
    found = ours(nested)
    assert found.is_nested and error(list(found.unbind()), expected) < 1e-13
    with pytest.raises(ValueError, match="src: is a nested tensor"):
        ours(nested, src_key_padding_mask=torch.zeros(3, 6).bool())
    with torch.no_grad():
        assert error(list(ours.eval()(nested).unbind()), list(theirs.eval()(nested).unbind())) < 1e-13
    with pytest.raises(ValueError, match="batch_first=True"):
        TransformerEncoderLayer(E, H)(nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_jagged_tensors_are_refused_and_what_the_message_says_works():
    theirs, ours = twins("TransformerEncoderLayer", **SIZES, batch_first=True)
    rows = [torch.randn(n, E, dtype=torch.float64) for n in (4, 6, 1)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    with torch.no_grad(), pytest.raises(AssertionError, match="NestedTensor"):
        theirs.eval()(jagged)
    with pytest.raises(TypeError, match=r"src: .*torch.jagged.*as_nested_tensor\(src.unbind\(\)\).*to_padded_tensor"):
        ours(jagged)
    expected = [ours(row) for row in rows]
    jagged.requires_grad_()
    again = ours(torch.nested.as_nested_tensor(jagged.unbind()))
    assert error(list(again.unbind()), expected) < 1e-13
    assert torch.autograd.grad(again.to_padded_tensor(0.0).square().sum(), jagged)[0].values().any()
    hidden = torch.arange(6) >= torch.tensor([4, 6, 1])[:, None]
    padded = ours(jagged.to_padded_tensor(0.0), src_key_padding_mask=hidden)
    assert error([padded[~hidden]], [torch.cat(expected)]) < 1e-13
