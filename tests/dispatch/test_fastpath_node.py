"""The fast path's autograd nodes are used, freed, kept and differentiated as autograd's own are."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastpath_calls import (
    ACTIVATED,
    NEEDS_FASTPATH,
    NORMS,
    Form,
    chosen,
    cotangents_of,
    cuda_forms,
    gradients,
    heads,
    same,
)
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import fusednorm
from fusednorm.autograd import norm as autograd_norm

pytestmark = NEEDS_FASTPATH
ONE_OF_EACH = chosen("add_layer_norm", "both", "gelu", "gelu, half dropped", "causal", "padded")


def close(form: Form, found, expected) -> None:
    """To the last bit, but of attention by the CPU library, which may read copies in another layout."""
    if form.function == "scaled_dot_product_attention" and form.provider == "cpu":
        torch.testing.assert_close(list(found), list(expected))
    else:
        same(found, expected)


def test_a_backward_stays_in_cpp(native, monkeypatch):
    def refuse(*_):
        raise AssertionError("the node's gradients were left to Python")

    monkeypatch.setattr(autograd_norm, "fastpath_backward", refuse)
    form = NORMS["add_layer_norm"]
    leaves = form.leaves()
    outputs = form.call(leaves)
    assert all(g is not None for g in gradients(outputs, leaves, cotangents_of(outputs), [0]))


SMOOTH = [name for name in ACTIVATED if not name.startswith("relu")]


@chosen(*NORMS, "bias", "both", "both of an RMSNorm", *SMOOTH, "plain", "causal", "all", *cuda_forms(*NORMS))
def test_derivatives_of_second_order_and_batched(form):
    leaves, options = form.leaves((3, 5), torch.float64), {}
    if form.function == "scaled_dot_product_attention":
        rows = heads(torch.float64, (4, 4), dims=(3, 3))
        leaves = {name: t.detach()[:, :1].requires_grad_() for name, t in rows.items()}
        if "key_mask" in form.options:
            options["key_mask"] = torch.tensor([[True, True, False, True], [True, False, True, True]])

    def function(*tensors):
        outputs = form.call(dict(zip(leaves, tensors, strict=True)), **options)
        assert outputs[0].grad_fn.name() == form.node
        return outputs

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), check_batched_grad=True)


@ONE_OF_EACH
def test_the_graph_is_freed_after_one_backward(form):
    leaves = form.leaves()
    outputs = form.call(leaves)
    cotangents = cotangents_of(outputs)
    first = gradients(outputs, leaves, cotangents, retain_graph=True)
    same(first, gradients(outputs, leaves, cotangents))
    with pytest.raises(RuntimeError, match="a second time"):
        gradients(outputs, leaves, cotangents)


@ONE_OF_EACH
def test_what_was_changed_in_place_is_noticed(form):
    """Each tensor that the backward reads: x is not, where its sum with the residual is kept."""
    leaves = form.leaves()
    kept = set(leaves) - ({"x", "residual", "bias", "x_bias"} if "norm" in form.function else set())
    for name in kept:
        outputs = form.call(leaves)
        with torch.no_grad():
            leaves[name].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs[0].sum().backward()


def test_a_changed_output_is_noticed_if_it_is_kept(native):
    form = NORMS["add_layer_norm"]
    leaves = form.leaves()
    normed, z = form.call(leaves)
    z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()
    normed, z = form.call(leaves)
    cotangent = torch.randn_like(normed)
    expected = torch.autograd.grad(normed, leaves["x"], 2.0 * cotangent, retain_graph=True)
    same(torch.autograd.grad(normed.mul_(2.0), leaves["x"], cotangent), expected)


# z or x, the statistics, the parameters and the seed; of attention its operands, result and log-sum-exp. No mask
PACKED = {  # their dimensions, by function and options
    ("add_layer_norm", ()): [1, 1, 2, 2],
    ("add_layer_norm", ("dropout_p", "seed")): [1, 1, 1, 1, 2, 2],
    ("bias_act_dropout", ("activation",)): [1, 2],
    ("bias_act_dropout", ("activation", "dropout_p", "seed")): [1, 1, 2],
    ("scaled_dot_product_attention", ("is_causal",)): [3, 4, 4, 4, 4],
    ("scaled_dot_product_attention", ("key_mask",)): [2, 3, 4, 4, 4, 4],
}


@ONE_OF_EACH
def test_hooks_on_saved_tensors_and_checkpoints(form):
    leaves = form.leaves()
    outputs = form.call(leaves)
    cotangents = cotangents_of(outputs)
    expected = gradients(outputs, leaves, cotangents)
    packed = []

    def pack(tensor):
        packed.append(tensor.ndim)
        return tensor.detach().mT.clone() if tensor.ndim > 1 else tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.mT.contiguous() if t.ndim > 1 else t):
        hooked = form.call(leaves)
    assert sorted(packed) == PACKED[form.function, tuple(sorted(form.options))]
    for outputs in (hooked, checkpoint(form.call, leaves, use_reentrant=False)):
        close(form, gradients(outputs, leaves, cotangents), expected)


def test_a_drawn_seed_under_checkpoint(native):
    form = Form("add_layer_norm", ("x", "residual", "weight", "bias", "x_bias"), {"dropout_p": 0.5})
    leaves = form.leaves()
    _, z = checkpoint(form.call, leaves, use_reentrant=False)
    gradient = torch.autograd.grad(z, leaves["x"], torch.ones_like(z))[0]
    kept = z.detach() != leaves["residual"].detach()
    assert torch.equal(gradient != 0, kept)  # the mask of the recomputed forward is the first one's


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's tracing looks at z's
@chosen(
    *("add_layer_norm", "bias", "dropout", "both", "silu", "silu, half dropped", "causal", "all"),
    *cuda_forms("add_layer_norm", "all"),
)
def test_compiled_autograd(form):
    torch._dynamo.reset()
    leaves = form.leaves()
    outputs = form.call(leaves)
    cotangents = cotangents_of(outputs)
    for used in (None, [len(outputs) - 1])[: len(outputs)]:
        expected = gradients(outputs, leaves, cotangents, used, retain_graph=True)
        for _ in range(2):
            again = form.call(leaves)
            assert again[0].grad_fn.name() == form.node
            with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
                found = gradients(again, leaves, cotangents, used)
            close(form, found, expected)


def test_compiled_autograd_tells_which_parameters_there_are(native):
    """Behind hooks on saved tensors a frozen weight and a frozen bias look alike."""
    x, r = torch.randn(2, 4, 8)
    x.requires_grad_()
    found = []
    for parameter in ("bias", "weight"):
        with torch.autograd.graph.saved_tensors_hooks(identity, identity):
            normed, _ = fusednorm.add_layer_norm(x, r, 8, **{parameter: torch.arange(8.0)})
        cotangent = torch.randn(4, 8)
        expected = torch.autograd.grad(normed, x, cotangent, retain_graph=True)[0]
        with compiled_autograd._enable(lambda graph: graph):
            found.append((torch.autograd.grad(normed, x, cotangent)[0], expected))
    for gradient, expected in found:
        torch.testing.assert_close(gradient, expected)


def identity(tensor):
    return tensor


def test_a_long_chain_is_destroyed_without_recursion(native):
    h = weight = torch.ones(8, requires_grad=True)
    for _ in range(20_000):
        h = fusednorm.rms_norm(h, 8, weight)
    assert h.grad_fn is not None
    del h  # a recursion this deep would overflow the stack


def test_several_threads_at_once(native):
    form = NORMS["add_layer_norm"]
    leaves = form.leaves((64, 256))
    outputs = form.call(leaves)
    cotangents = cotangents_of(outputs)
    expected = gradients(outputs, leaves, cotangents)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: gradients(form.call(leaves), leaves, cotangents), range(80)):
            same(found, expected)


OPS = {"bias_act_dropout": "bias_act_dropout", "scaled_dot_product_attention": "attention"}


@chosen("add_layer_norm", "gelu, half dropped", "padded", *cuda_forms("add_layer_norm", "plain"))
def test_calls_show_in_the_profiler_and_leak_nothing(form):
    leaves = form.leaves()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs = form.call(leaves)
        sum(output.sum() for output in outputs).backward()
    op = OPS.get(form.function, "add_layer_norm")
    found = {event.name for event in profile.events() if event.name.startswith("fusednorm_")}
    assert found == {f"fusednorm_{form.provider}::{op}_fwd", f"fusednorm_{form.provider}::{op}_bwd"}
    references = [weakref.ref(t) for t in (*leaves.values(), *outputs)]
    del leaves, outputs
    gc.collect()
    assert [r() for r in references] == [None] * len(references)
