"""Attention by the fast path gives what the long way gives, bit for bit, and takes no call that needs that way."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fusednorm import dispatch, scaled_dot_product_attention
from fusednorm.dispatch import fastpath
from tests.dispatch.test_fastpath import _Dispatches, _Functions, _Subclass

_missing = fastpath.load()[1]
pytestmark = pytest.mark.skipif(bool(_missing), reason=f"no fast path: {_missing}")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KEY_MASK = torch.tensor([[True] * 7, [True, False, True, True, False, False, True]])
FORMS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": -0.3},
    "padded": {"key_mask": KEY_MASK},
    "window": {"window": (2, 1)},
    "half a window": {"window": (None, 2), "is_causal": True},
    "all": {"key_mask": KEY_MASK, "window": (3, 0), "is_causal": True, "scale": 0.5},
}


def operands(dtype=torch.float32, queries=5, keys=7, heads=(2, 2), dims=(8, 8)):
    shapes = [(2, heads[0], queries, dims[0]), (2, heads[1], keys, dims[0]), (2, heads[1], keys, dims[1])]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def differentiate(out, inputs, cotangent):
    return torch.autograd.grad(out, [t for t in inputs if t.requires_grad], cotangent)


def taken(*inputs, key_mask=None, is_causal=False, window=None, scale=None, enable_gqa=False):
    inputs = inputs or [t.detach() for t in operands()]
    return dispatch.settings.current.fastpath.attention(*inputs, key_mask, is_causal, window, scale, enable_gqa)


def compare(inputs, options, monkeypatch, exact=True):
    """Outputs and gradients by the fast path and the long way, and outputs without gradients, which are the last."""
    out = scaled_dot_product_attention(*inputs, **options)
    assert out.grad_fn.name() == "FusedAttentionBackward"
    cotangent = torch.randn(out.shape).to(out.dtype)
    results = [out, *differentiate(out, inputs, cotangent)]
    with torch.no_grad():
        results.append(scaled_dot_product_attention(*inputs, **options))
    with dispatch.settings.without_fastpath():
        out = scaled_dot_product_attention(*inputs, **options)
        assert out.grad_fn.name() != "FusedAttentionBackward"
        expected = [out, *differentiate(out, inputs, cotangent)]
        with torch.no_grad():
            expected.append(scaled_dot_product_attention(*inputs, **options))
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        if exact or i < len(results) - 1:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b)
    return results


@pytest.mark.parametrize("vendor", ["amd", "intel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_fastpath_attention_gives_the_bits_of_the_long_way(form, dtype, vendor, as_on, monkeypatch):
    as_on(vendor)
    compare(operands(dtype), FORMS[form], monkeypatch)


@pytest.mark.parametrize("form", ["plain", "all"])
@pytest.mark.parametrize("queries", [1, 130])
def test_fastpath_attention_in_several_blocks(form, queries, monkeypatch):
    options = dict(FORMS[form])
    if "key_mask" in options:
        options["key_mask"] = torch.rand(2, 200) < 0.7
    compare(operands(queries=queries, keys=200, dims=(16, 16)), options, monkeypatch)


@pytest.mark.parametrize("subset", [s for n in (1, 2) for s in itertools.combinations(range(3), n)], ids=str)
@pytest.mark.parametrize("form", ["causal", "padded"])
def test_fastpath_attention_gradients_of_any_subset(form, subset, monkeypatch):
    inputs = [t.detach().requires_grad_(i in subset) for i, t in enumerate(operands())]
    compare(inputs, FORMS[form], monkeypatch)


@pytest.mark.parametrize(
    "layout", ["packed", "grouped", "other value dim", "transposed features", "expanded", "inf under causality"]
)
def test_fastpath_attention_of_layouts(layout, monkeypatch):
    inputs, options = operands(queries=7), {"is_causal": True}
    if layout == "packed":
        inputs = [t.detach().requires_grad_() for t in torch.randn(2, 7, 3, 2, 8).permute(2, 0, 3, 1, 4)]
    elif layout == "grouped":
        inputs, options = operands(heads=(4, 2)), {"enable_gqa": True}
    elif layout == "other value dim":
        inputs = operands(dims=(8, 12))
    elif layout == "transposed features":
        inputs[1] = torch.randn(2, 2, 8, 7).mT.requires_grad_()
    elif layout == "expanded":
        inputs[1] = torch.randn(1, 2, 7, 8).expand(2, 2, 7, 8).requires_grad_()
    else:
        inputs[2] = inputs[2].detach().index_fill(2, torch.tensor(6), torch.inf)[:, :, :, :].requires_grad_()
        inputs[0] = inputs[0].detach()[:, :, :5].requires_grad_()
    # without gradients the long way has torch choose its kernel at once, whatever the layout
    exact = layout in ("packed", "expanded", "inf under causality")
    results = compare(inputs, options, monkeypatch, exact)
    assert all(t.isfinite().all() for t in results)


# --- what it leaves to the long way ---


def test_fastpath_attention_takes_what_is_plain():
    assert taken() is not None and taken(scale=0.1, is_causal=True, window=(0, None), key_mask=KEY_MASK) is not None
    with torch.inference_mode():
        assert taken(*(torch.randn(2, 2, 5, 8) for _ in range(3))).is_inference()


def _with(position, tensor):
    inputs = [torch.randn(2, 2, n, 8) for n in (5, 7, 7)]
    inputs[position] = tensor
    return inputs


@pytest.mark.parametrize(
    "inputs",
    [
        _with(0, torch.randn(2, 2, 5, 8).as_subclass(_Subclass)),
        _with(1, torch.randn(2, 2, 7, 8, device="meta")),
        _with(0, torch.randn(2, 5, 8)),
        _with(0, torch.randn(2, 2, 0, 8)),
        _with(0, torch.randn(2, 2, 5, 9)),
        _with(0, torch.randn(2, 4, 5, 8)),  # heads that enable_gqa alone allows
        _with(0, torch.randn(1, 2, 5, 8)),
        _with(1, torch.randn(2, 2, 7, 8).double()),
        _with(2, torch.randn(2, 2, 6, 8)),
        _with(2, torch.randn(2, 1, 7, 8)),
        _with(2, torch.randn(2, 2, 7, 257)),
        _with(1, torch.ones(2, 2, 7, 8, dtype=torch.int64)),
        _with(1, None),
        _with(1, [1.0]),
    ],
)
def test_fastpath_attention_leaves_other_tensors_to_the_long_way(inputs):
    assert taken(*inputs) is None


@pytest.mark.parametrize(
    "options",
    [
        {"key_mask": torch.ones(2, 7)},
        {"key_mask": torch.ones(1, 7, dtype=torch.bool)},
        {"key_mask": torch.ones(2, 6, dtype=torch.bool)},
        {"key_mask": KEY_MASK.as_subclass(_Subclass)},
        {"key_mask": True},
        {"is_causal": 1},
        {"window": 3},
        {"window": [1, 1]},
        {"window": (1,)},
        {"window": (-1, 0)},
        {"window": (1.0, 0)},
        {"window": (True, 0)},
        {"window": (2**70, 0)},
        {"scale": 1},
        {"scale": "large"},
        {"enable_gqa": None},
    ],
    ids=str,
)
def test_fastpath_attention_leaves_other_options_to_the_long_way(options):
    assert taken(**options) is None


@pytest.mark.parametrize("context", [lambda: torch.autocast("cpu"), _Functions, _Dispatches, FakeTensorMode])
def test_fastpath_attention_leaves_calls_that_somebody_watches_to_the_long_way(context):
    inputs = [t.detach() for t in operands()]
    with context():
        assert taken(*inputs) is None


def test_fastpath_attention_leaves_transforms_to_the_long_way():
    x, seen = torch.randn(3, 2, 2, 5, 8), []
    torch.vmap(lambda t: seen.append(taken(t, t, t)) or t)(x)
    torch.func.grad(lambda t: seen.append(taken(t, t, t)) or t.sum())(x[0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], torch.ones_like(x[0]))
        seen.append(taken(dual, dual, dual))
    assert seen == [None, None, None]


# --- its node ---


@pytest.mark.parametrize("form", ["plain", "causal", "all"])
def test_fastpath_attention_derivatives_of_second_order_and_batched(form):
    inputs = [t.detach()[:, :1, :4].requires_grad_() for t in operands(torch.float64, 4, 4, dims=(3, 3))]
    options = dict(FORMS[form])
    if "key_mask" in options:
        options["key_mask"] = torch.tensor([[True, True, False, True], [True, False, True, True]])

    def function(*tensors):
        out = scaled_dot_product_attention(*tensors, **options)
        assert out.grad_fn.name() == "FusedAttentionBackward"
        return out

    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("form", ["causal", "padded"])
def test_fastpath_attention_keeps_and_frees_as_autograd_does(form):
    inputs, options = operands(), FORMS[form]
    out = scaled_dot_product_attention(*inputs, **options)
    cotangent = torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, cotangent, retain_graph=True)
    again = torch.autograd.grad(out, inputs, cotangent)
    assert all(map(torch.equal, expected, again))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(out, inputs, cotangent)
    out = scaled_dot_product_attention(*inputs, **options)
    with torch.no_grad():
        inputs[1].mul_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.mT.clone(), lambda t: t.mT):
        hooked = scaled_dot_product_attention(*inputs, **options)
    rerun = checkpoint(scaled_dot_product_attention, *inputs, **options, use_reentrant=False)
    for out in (hooked, rerun):
        for a, b in zip(torch.autograd.grad(out, inputs, cotangent), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("form", ["causal", "all"])
def test_fastpath_attention_under_compiled_autograd(form):
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()
    inputs = operands()
    cotangent = torch.randn(2, 2, 5, 8)
    expected = differentiate(scaled_dot_product_attention(*inputs, **FORMS[form]), inputs, cotangent)
    for _ in range(2):
        out = scaled_dot_product_attention(*inputs, **FORMS[form])
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
            found = differentiate(out, inputs, cotangent)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_fastpath_attention_shows_in_the_profiler_and_leaks_nothing():
    inputs = operands()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = scaled_dot_product_attention(*inputs, key_mask=KEY_MASK)
        out.sum().backward()
    assert {"fusednorm_cpu::attention_fwd", "fusednorm_cpu::attention_bwd"} <= {e.name for e in profile.events()}
    references = [weakref.ref(t) for t in (*inputs, out)]
    del inputs, out
    gc.collect()
    assert [r() for r in references] == [None] * 4
