"""``MultiheadAttention``: every mask and form that torch's takes, its refusals, and the weights."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from drop_in import error, grid, results, twins
from torch import nn

import fusednorm
from fusednorm import MultiheadAttention, dropout_mask, explain

OP = "attention_fwd"
B, L, S, E, H = 3, 5, 7, 12, 4


def inputs(batch_first: bool, *widths: int, same: str = "apart", dtype=torch.float64) -> tuple:
    """Query, key, value; "self" and "cross" share them as torch looks for."""
    sizes = [(B, L), (B, S), (B, S)] if same != "self" else [(B, S)] * 3
    made = []
    for (batch, length), width in zip(sizes, widths or (E, E, E), strict=True):
        shape = (batch, length, width) if batch_first else (length, batch, width)
        made.append(torch.randn(shape, dtype=dtype, requires_grad=True))
    query, key, value = made
    return {"apart": (query, key, value), "cross": (query, key, key), "self": (query, query, query)}[same]


def padding() -> torch.Tensor:
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0, 4:] = mask[2, 1] = True
    return mask


def attn_masks(queries: int) -> dict[str, torch.Tensor | None]:
    hidden = torch.rand(queries, S) < 0.3
    hidden[:, 0] = False  # no query without a key: torch's has NaN
    each = (torch.rand(B * H, queries, S) < 0.3).index_fill(2, torch.tensor([0]), False)
    return {
        "none": None,
        "bool": hidden,
        "float": torch.randn(queries, S, dtype=torch.float64),
        "infinite": torch.zeros(queries, S, dtype=torch.float64).masked_fill(hidden, -torch.inf),
        "each": each,
        "each float": torch.randn(B * H, queries, S, dtype=torch.float64),
    }


@pytest.mark.parametrize("attn_mask", ["none", "bool", "float", "infinite", "each", "each float"])
@pytest.mark.parametrize("key_padding_mask", ["none", "bool", "float", "bias"])
def test_every_mask_gives_torchs_results(attn_mask, key_padding_mask, using):
    mask = attn_masks(L)[attn_mask]
    padded = {
        "none": None,
        "bool": padding(),
        "float": torch.zeros(B, S, dtype=torch.float64).masked_fill(padding(), -torch.inf),
        "bias": torch.randn(B, S, dtype=torch.float64),
    }[key_padding_mask]
    for batch_first in (True, False):
        theirs, ours = twins("MultiheadAttention", E, H, batch_first=batch_first, dtype=torch.float64)
        args = inputs(batch_first)
        for need_weights in (True, False):
            kwargs = {"key_padding_mask": padded, "attn_mask": mask, "need_weights": need_weights}
            with using:
                assert error(results(ours, args, kwargs), results(theirs, args, kwargs)) < 1e-13


@pytest.mark.parametrize("same", ["self", "cross", "apart"])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"bias": False},
        {"kdim": 6, "vdim": 10},
        {"kdim": 6, "vdim": 10, "bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "kdim": 8, "vdim": 8},
    ],
    ids=str,
)
def test_every_constructor_form_gives_torchs_results(form, same):
    if same == "self" or (same == "cross" and form.get("kdim") != form.get("vdim")):
        form = {name: value for name, value in form.items() if name not in ("kdim", "vdim")}
    for batch_first in (True, False):
        theirs, ours = twins("MultiheadAttention", E, H, batch_first=batch_first, dtype=torch.float64, **form)
        args = inputs(batch_first, E, form.get("kdim", E), form.get("vdim", E), same=same)
        queries = S if same == "self" else L
        for choice in grid(need_weights=(True, False), key_padding_mask=(None, padding()), mask=("none", "bool")):
            kwargs = {**choice, "attn_mask": attn_masks(queries)[choice["mask"]]}
            del kwargs["mask"]
            assert error(results(ours, args, kwargs), results(theirs, args, kwargs)) < 1e-13


def test_unbatched_inputs_and_single_heads_of_weights():
    theirs, ours = twins("MultiheadAttention", E, H, dtype=torch.float64)
    for batch_first in (False, True):
        theirs.batch_first = ours.batch_first = batch_first
        query, key = (torch.randn(n, E, dtype=torch.float64, requires_grad=True) for n in (L, S))
        mask = torch.rand(H, L, S).gt(0.7).index_fill(2, torch.tensor([0]), False)
        for average in (True, False):
            kwargs = {"key_padding_mask": padding()[0], "attn_mask": mask, "average_attn_weights": average}
            found, expected = (results(m, (query, key, key), kwargs) for m in (ours, theirs))
            assert found[1].shape == ((L, S) if average else (H, L, S))
            assert error(found, expected) < 1e-13


def test_is_causal_beside_appended_keys_does_not_hide_them():
    theirs, ours = twins("MultiheadAttention", E, H, add_bias_kv=True, add_zero_attn=True, dtype=torch.float64)
    query, _, _ = inputs(False, same="self")
    mask = torch.ones(S, S).triu(1).bool()
    expected = results(theirs, (query,) * 3, {"attn_mask": mask})
    assert error(results(ours, (query,) * 3, {"attn_mask": mask, "is_causal": True}), expected) < 1e-13


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_hint_replaces_the_mask_where_torchs_does_though_the_mask_belies_it(need_weights, average, padded):
    theirs, ours = twins("MultiheadAttention", E, H, batch_first=True, dtype=torch.float64)
    query, _, _ = inputs(True, same="self")
    causal = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    window = torch.ones(S, S).triu(1).bool() | torch.ones(S, S).tril(-2).bool()
    future = torch.ones(S, S).tril(-1).bool()
    hidden = torch.zeros(B, S).bool().index_fill(1, torch.tensor([3]), True)
    true = (causal, causal.isinf())  # to the hint; the others are not
    masks = (*true, window, future, causal - torch.arange(S), torch.randn(B * H, S, S, dtype=torch.float64))
    for mask, training in ((m, t) for m in (*masks, masks[-1].clone().requires_grad_()) for t in (True, False)):
        kwargs = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights, "average_attn_weights": average}
        kwargs["key_padding_mask"] = hidden if padded else None
        expected = results(theirs.train(training), (query,) * 3, kwargs)
        assert not expected[0].isnan().any()
        assert error(results(ours.train(training), (query,) * 3, kwargs), expected) < 1e-13
        with torch.no_grad():  # no other path than with gradients
            assert error([ours(*(query,) * 3, **kwargs)[0]], expected[:1]) < 1e-13


def test_a_learned_mask_gets_its_gradient():
    theirs, ours = twins("MultiheadAttention", E, H, batch_first=True, dtype=torch.float64)
    for shape in ((L, S), (B * H, L, S)):
        mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for kwargs in ({"attn_mask": mask}, {"attn_mask": mask, "need_weights": False}):
            args = inputs(True)
            assert error(results(ours, args, kwargs), results(theirs, args, kwargs)) < 1e-13


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_that_sees_nothing_has_the_projection_of_zeros_and_no_gradient(need_weights, using):
    ours = MultiheadAttention(E, H, batch_first=True)
    nn.init.normal_(ours.out_proj.bias)
    query, key, value = inputs(True, dtype=torch.float32)
    hidden = torch.zeros(B, S, dtype=torch.bool)
    hidden[1] = True
    with using:
        out, weights = ours(query, key, value, key_padding_mask=hidden, need_weights=need_weights)
        gradients = torch.autograd.grad(out.square().sum(), (query, key, value))
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(L, E))
    assert all(not g[1].any() and g[0].any() and g.isfinite().all() for g in gradients)
    assert weights is None or (not weights[1].any() and weights.isfinite().all())


def test_padding_that_holds_nan_reaches_nothing():
    ours = MultiheadAttention(E, H, batch_first=True)
    query, key, value = inputs(True, dtype=torch.float32)
    clean, _ = ours(query, key, value, key_padding_mask=padding(), need_weights=False)
    spoilt = [t.detach().masked_fill(padding()[..., None], torch.nan) for t in (key, value)]
    for need_weights in (False, True):
        out, weights = ours(query, *spoilt, key_padding_mask=padding(), need_weights=need_weights)
        torch.testing.assert_close(out, clean)
        assert weights is None or weights.isfinite().all()


def test_the_weights_are_those_of_the_output_with_dropout_too():
    """One seed, one mask: asking for the weights changes nothing, and they are what dropped the values."""
    ours = MultiheadAttention(E, H, dropout=0.4, batch_first=True, dtype=torch.float64)
    query, key, value = inputs(True)
    torch.manual_seed(3)
    plain, _ = ours(query, key, value, need_weights=False)
    torch.manual_seed(3)
    out, weights = ours(query, key, value, average_attn_weights=False)
    assert torch.equal(out, plain)
    torch.manual_seed(3)
    seed = fusednorm.dropout.default_seed(torch.device("cpu"))
    assert torch.equal(weights != 0, dropout_mask((B, H, L, S), 0.4, seed))
    _, _, w_v = ours.in_proj_weight.chunk(3)
    values = nn.functional.linear(value, w_v, ours.in_proj_bias[2 * E :]).unflatten(-1, (H, E // H)).transpose(1, 2)
    again = ours.out_proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(again, out)
    ours.eval()
    assert torch.equal(ours(query, key, value)[0], ours(query, key, value)[0])


def test_dropout_of_everything_and_wide_heads_are_served():
    theirs, ours = twins("MultiheadAttention", E, H, dropout=1.0, dtype=torch.float64)
    args = inputs(False)
    assert error(results(ours, args), results(theirs, args)) < 1e-13
    theirs, ours = twins("MultiheadAttention", 600, 2, dtype=torch.float64)  # 300 a head, more than the kernels take
    args = inputs(False, 600, 600, 600)
    for kwargs in ({}, {"need_weights": False, "key_padding_mask": padding()}):
        assert error(results(ours, args, kwargs), results(theirs, args, kwargs)) < 1e-13


@pytest.mark.parametrize("batch", [0, 1])
def test_an_empty_batch(batch):
    theirs, ours = twins("MultiheadAttention", E, H, batch_first=True)
    x = torch.randn(batch, S, E)
    assert torch.allclose(ours(x, x, x, need_weights=False)[0], theirs(x, x, x)[0], atol=1e-6)
    assert ours(x, x, x, need_weights=False)[0].shape == (batch, S, E)


def test_the_packed_product_is_read_where_it_lies():
    """Attention takes slices of one product: nothing of its size is made between the two."""
    ours = MultiheadAttention(64, 4, batch_first=True)
    for batch_first in (True, False):
        ours.batch_first = batch_first
        x = torch.randn(4, 16, 64, requires_grad=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            ours(x, x, x, need_weights=False)
        names = ("aten::copy_", "aten::clone", "aten::cat")
        copies = [event for event in profile.events() if event.name in names]
        assert all(copy.cpu_parent.name == "aten::addmm" for copy in copies)  # which spreads its bias


REFUSED = {
    "attn_mask of another length": ({"attn_mask": torch.zeros(L, S + 1)}, ValueError, r"attn_mask: .*\(5, 8\)"),
    "attn_mask of three dimensions": ({"attn_mask": torch.zeros(B, L, S)}, ValueError, "attn_mask: .*num_heads"),
    "attn_mask of four dimensions": ({"attn_mask": torch.zeros(B, H, L, S)}, ValueError, "attn_mask: "),
    "attn_mask of ints": ({"attn_mask": torch.zeros(L, S).long()}, TypeError, "attn_mask: .*int64"),
    "attn_mask of another float": ({"attn_mask": torch.zeros(L, S).double()}, TypeError, "attn_mask: .*float64"),
    "attn_mask that is none": ({"attn_mask": [[0.0]]}, TypeError, "attn_mask: .*list"),
    "attn_mask on another device": ({"attn_mask": torch.zeros(L, S, device="meta")}, ValueError, "attn_mask: .*meta"),
    "wrong mask beside the hint": (
        {"attn_mask": torch.zeros(2, 2), "is_causal": True, "need_weights": False},
        ValueError,
        r"attn_mask: .*\(2, 2\)",
    ),
    "hint without mask": ({"is_causal": True}, ValueError, "is_causal: .*attn_mask"),
    "padding of one dimension": ({"key_padding_mask": torch.zeros(S).bool()}, ValueError, "key_padding_mask: "),
    "padding transposed": ({"key_padding_mask": torch.zeros(S, B).bool()}, ValueError, r"key_padding_mask: .*\(3, 7\)"),
    "padding of ints": ({"key_padding_mask": torch.zeros(B, S).int()}, TypeError, "key_padding_mask: .*int32"),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_masks_that_torch_refuses_are_refused_by_name(case, need_weights):
    given, kind, message = REFUSED[case]
    theirs, ours = twins("MultiheadAttention", E, H, batch_first=True)
    args = inputs(True, dtype=torch.float32)
    given = {"need_weights": need_weights, **given}
    with pytest.raises(kind, match=message):
        ours(*args, **given)
    # the first is ignored there, the others taken
    if case not in ("wrong mask beside the hint", "attn_mask of another float", "attn_mask on another device"):
        with pytest.raises(Exception):  # noqa: B017
            theirs(*args, **given)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((B, L, E), (B, S, E), (B, S + 1, E)), "value: .* key's"),
        (((B, L, E), (B + 1, S, E), (B + 1, S, E)), "key: a batch of 4"),
        (((B, L, E + 1), (B, S, E), (B, S, E)), "query: expected 12 features"),
        (((L, E), (B, S, E), (B, S, E)), "key: has 3 dimensions"),
        (((B, L, 1, E), (B, S, E), (B, S, E)), "query: expected .*got shape"),
    ],
)
def test_inputs_that_torch_refuses_are_refused_by_name(shapes, message):
    theirs, ours = twins("MultiheadAttention", E, H, batch_first=True)
    args = [torch.randn(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        ours(*args)
    with pytest.raises(Exception):  # noqa: B017
        theirs(*args)


def test_an_output_projection_of_another_kind_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    ours = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, S, E)
    plain, _ = ours(x, x, x)
    other = Doubled(E, E)
    other.load_state_dict(ours.out_proj.state_dict())
    ours.out_proj = other
    torch.testing.assert_close(ours(x, x, x)[0], 2.0 * plain)
    other.register_forward_hook(lambda module, args, out: out + 1.0)
    torch.testing.assert_close(ours(x, x, x)[0], 2.0 * plain + 1.0)


def test_nested_tensors_go_to_torchs_own():
    theirs, ours = twins("MultiheadAttention", E, H, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        x = torch.nested.nested_tensor([torch.randn(n, E) for n in (3, 5)])
    with torch.no_grad():
        found, expected = (m.eval()(x, x, x, need_weights=False)[0] for m in (ours, theirs))
    torch.testing.assert_close(found.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
    with pytest.raises(AssertionError, match="NestedTensor"):
        ours.train()(x, x, x)


def test_explain_reaches_the_attention():
    x = torch.randn(B, S, E)
    assert "scaled_dot_product_attention: " in explain(MultiheadAttention(E, H), x, x, x)


def test_nested_blocks_each_collect_the_weights_of_their_calls():
    layer = fusednorm.TransformerEncoderLayer(E, H, 16, batch_first=True)
    x = torch.randn(B, S, E)
    with fusednorm.attention_weights(layer) as outer:
        layer(x)
        with pytest.raises(ZeroDivisionError), fusednorm.attention_weights(layer.self_attn) as inner:
            layer(x)
            raise ZeroDivisionError
        layer(x)
    layer(x)
    assert (len(outer["self_attn"]), len(inner[""])) == (3, 1)
    assert torch.equal(outer["self_attn"][1], inner[""][0])
    first, second = fusednorm.attention_weights(layer), fusednorm.attention_weights(layer)
    kept = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    layer(x)
    second.__exit__(None, None, None)
    layer(x)
    assert [len(maps["self_attn"]) for maps in kept] == [0, 1]
    assert "_kept_weights" not in vars(layer.self_attn)


def test_a_copy_made_while_weights_are_collected_collects_none():
    layer = fusednorm.TransformerEncoderLayer(E, H, 16, batch_first=True).eval()
    x = torch.randn(B, S, E)
    with fusednorm.attention_weights(layer) as maps:
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        shallow = copy.copy(layer.self_attn)
        for other in copies:
            assert torch.equal(other(x), layer(x))
        shallow(x, x, x)
        assert len(maps["self_attn"]) == len(copies)
    for other in copies:
        with fusednorm.attention_weights(other) as own:
            other(x)
        assert len(own["self_attn"]) == 1
