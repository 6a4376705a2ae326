"""The fast path gives what the Python path gives, bit for bit: of every operator, in every form."""

from __future__ import annotations

import itertools

import pytest
import torch
from fastpath_calls import (
    ACTIVATED,
    ATTENTION,
    DTYPES,
    EPILOGUES,
    EVERY,
    NEEDS_FASTPATH,
    NORMS,
    Form,
    chosen,
    cotangents_of,
    cuda_forms,
    gradients,
    heads,
    hold_to_python_path,
    same,
)
from oracle import MODULATION
from oracle_activation import ACTIVATIONS

import fusednorm
from fusednorm import dispatch, scaled_dot_product_attention

pytestmark = NEEDS_FASTPATH
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# odd, three dimensions, one row, no rows, no columns, one element, rows for several threads
SHAPES = [(5, 33), (2, 3, 16), (7,), (0, 16), (4, 0), (1, 1), (64, 300)]


@DTYPE
@chosen(*NORMS, *EPILOGUES, *ACTIVATED)
def test_every_shape(form, dtype):
    of_samples = not set(MODULATION).isdisjoint(form.names)
    for shape in SHAPES:
        if len(shape) > of_samples:  # there are samples
            hold_to_python_path(form, form.leaves(shape, dtype), what=shape)


@DTYPE
@chosen(*NORMS)
def test_norms_over_two_dimensions(form, dtype):
    hold_to_python_path(form, form.leaves((3, 2, 4, 6), dtype, 2), ndim=2)


@DTYPE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_by_automatic_choice(activation, dtype):
    """Whoever serves the call: the kernels, or torch's own operators."""
    for dropout, shape, bias in itertools.product(
        [{}, {"dropout_p": 0.3, "seed": -7}], [(4, 64), (64, 1024), (4, 8192)], [True, False]
    ):
        form = Form("bias_act_dropout", ("x", "bias") if bias else ("x",), {"activation": activation, **dropout})
        leaves = form.leaves(shape, dtype)
        with dispatch.settings.without_fastpath():
            (expected,) = form.call(leaves)
        if expected.grad_fn.name() == "BiasActDropoutFunctionBackward":
            hold_to_python_path(form, leaves)
            continue
        (found,) = form.call(leaves)
        assert found.grad_fn.name() != form.node
        cotangents = cotangents_of([found])
        same([found], [expected])
        same(gradients([found], leaves, cotangents), gradients([expected], leaves, cotangents))


@chosen(*NORMS, "bias", "dropout", "both", *ACTIVATED, "causal", "padded", *cuda_forms("bias", "both", "causal"))
def test_any_subset_of_gradients(form):
    base = form.leaves((6, 40) if form.provider == "cuda" else (6, 33))
    for count in range(1, len(base) + 1):
        for subset in itertools.combinations(base, count):
            leaves = {name: leaf.detach().requires_grad_(name in subset) for name, leaf in base.items()}
            hold_to_python_path(form, leaves, what=subset)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "expanded": lambda t: t[:1].expand_as(t),
    "sliced": lambda t: torch.stack((t, t), -1).flatten(-2)[..., 1::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@chosen("add_layer_norm", "gelu, half dropped")
def test_layouts(form, layout):
    leaves = {name: leaf.detach() for name, leaf in form.leaves((6, 8)).items()}
    laid = ("x", "bias") if layout == "sliced" and form.function == "bias_act_dropout" else ("x",)
    laid = ("x", "residual") if layout == "transposed" and "residual" in leaves else laid
    leaves |= {name: LAYOUTS[layout](leaves[name]) for name in laid}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    rows = torch.randn(1, 8).expand(6, 8)
    cotangents = [torch.randn(8, 6).t(), rows] if form.function != "bias_act_dropout" else [rows]
    hold_to_python_path(form, leaves, cotangents)


def test_parameters_of_another_dtype_and_none(native):
    norm, both, activation = NORMS["add_layer_norm"], EPILOGUES["both"], ACTIVATED["gelu, half dropped"]
    hold_to_python_path(norm, norm.leaves(dtype=torch.bfloat16, weight=torch.float64, bias=torch.float32))
    hold_to_python_path(both, both.leaves(dtype=torch.bfloat16, x_bias=torch.float32))
    hold_to_python_path(activation, activation.leaves(dtype=torch.bfloat16, bias=torch.float32))
    for form, names in ((norm, ("x", "residual")), (activation, ("x",))):
        bare = Form(form.function, names, form.options)
        hold_to_python_path(bare, bare.leaves())


SEEDLESS = {name: Form(EVERY[name].function, EVERY[name].names) for name in ("dropout", "silu, dropout")}


@pytest.mark.parametrize("name", SEEDLESS)
def test_the_seed_that_the_python_path_draws(name, native):
    form = SEEDLESS[name]
    leaves = form.leaves()
    hold_to_python_path(form, leaves, dropout_p=0.5)
    torch.manual_seed(3)
    first = form.call(leaves, dropout_p=0.5)[-1]
    assert not torch.equal(first, form.call(leaves, dropout_p=0.5)[-1])


@pytest.mark.parametrize("name", SEEDLESS)
def test_a_seed_in_a_tensor_that_is_changed_is_noticed(name, native):
    form = SEEDLESS[name]
    leaves, seed = form.leaves(), torch.tensor([2**40])
    hold_to_python_path(form, leaves, dropout_p=0.5, seed=seed)
    output = form.call(leaves, dropout_p=0.5, seed=seed)[0]
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_layers_with_dropout_take_the_fastpath(native):
    layer = fusednorm.AddLayerNorm(16, dropout_p=0.5)
    x = torch.randn(4, 16, requires_grad=True)
    assert layer(x, x)[0].grad_fn.name() == "FusedNormBackward"
    assert layer.eval()(x, x)[0].grad_fn.name() == "FusedNormBackward"


# --- attention ---


def hold_attention_to_python_path(leaves, options, exact=True):
    """With gradients, and without: there the Python path may have torch choose another kernel."""
    form = Form("scaled_dot_product_attention", tuple(leaves), options)
    hold_to_python_path(form, leaves)
    with torch.no_grad():
        (found,) = form.call(leaves)
        with dispatch.settings.without_fastpath():
            (expected,) = form.call(leaves)
    if exact:
        same([found], [expected])
    else:
        torch.testing.assert_close(found, expected)
    return found


@pytest.mark.parametrize("vendor", ["amd", "intel"])
@DTYPE
@chosen(*ATTENTION)
def test_attention(form, dtype, vendor, as_on):
    as_on(vendor)
    hold_attention_to_python_path(heads(dtype), form.options)


@pytest.mark.parametrize("queries", [1, 130])
@chosen("plain", "all")
def test_attention_in_several_blocks(form, queries):
    options = dict(form.options)
    if "key_mask" in options:
        options["key_mask"] = torch.rand(2, 200) < 0.7
    hold_attention_to_python_path(heads(lengths=(queries, 200), dims=(16, 16)), options)


OTHER_SIZES = {  # than 7 queries and 7 keys of two heads of 8; and the options
    "grouped": ({"counts": (4, 2)}, {"enable_gqa": True}),
    "other value dim": ({"dims": (8, 12)}, {"is_causal": True}),
    "odd head dim": ({"lengths": (7, 9), "dims": (5, 7)}, {"window": (2, 2)}),
    "several tiles": ({"lengths": (70, 130), "dims": (16, 24)}, {"is_causal": True}),
}
OTHER_LAYOUTS = {
    "packed": lambda *heads: torch.stack([t.transpose(1, 2) for t in heads], 2).permute(2, 0, 3, 1, 4).unbind(),
    "transposed features": lambda q, k, v: (q, k.mT.contiguous().mT, v),
    "expanded": lambda q, k, v: (q, k[:1].expand_as(k), v),
    "inf under causality": lambda q, k, v: (q[:, :, :5], k, v.index_fill(2, torch.tensor(6).to(v.device), torch.inf)),
}


@pytest.mark.parametrize("layout", [*OTHER_SIZES, *OTHER_LAYOUTS])
@chosen("plain", *cuda_forms("plain"))
def test_attention_of_layouts(form, layout):
    sizes, options = OTHER_SIZES.get(layout, ({}, {"is_causal": True}))
    tensors = [t.detach() for t in heads(**{"lengths": (7, 7), "device": form.device, **sizes}).values()]
    tensors = OTHER_LAYOUTS.get(layout, lambda *heads: heads)(*tensors)
    leaves = {name: t.requires_grad_() for name, t in zip(form.names, tensors, strict=True)}
    exact = form.provider == "cuda" or layout in ("packed", "expanded", "inf under causality")
    assert hold_attention_to_python_path(leaves, options, exact).isfinite().all()
    out = scaled_dot_product_attention(*leaves.values(), **options)
    assert all(t.isfinite().all() for t in torch.autograd.grad(out.sum(), list(leaves.values())))
