"""Torch's own attention as a provider: where no kernel of ours serves, where it is asked for, where it is chosen."""

from __future__ import annotations

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from derivatives import kept_and_recomputed
from oracle_attention import draw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fusednorm
from fusednorm import dispatch, scaled_dot_product_attention, varlen_attention
from fusednorm._options import from_flat
from fusednorm.dispatch import rules_attention as rules
from fusednorm.providers.triton import attention as triton_attention

N = 9
KEYS = torch.arange(N) < 7
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "lower_right": {"is_causal": True, "causal_align": "lower_right"},
    "key_mask": {"key_mask": KEYS.expand(2, N)},
    "window": {"window": (2, 1)},
    "window_lower_right": {"window": (1, None), "causal_align": "lower_right"},
    "causal_window_key_mask": {"is_causal": True, "window": (3, None), "key_mask": KEYS.expand(2, N)},
    "bool_mask_causal": {"attn_mask": torch.arange(N) != 3, "is_causal": True},
    "additive_mask": {
        "attn_mask": torch.linspace(-1, 1, N)
    },  # of float32 beside float64: torch itself reads it wrongly
    "additive_mask_key_mask": {"attn_mask": torch.linspace(-1, 1, N), "key_mask": KEYS.expand(2, N)},
    "rows_that_see_nothing": {"attn_mask": (torch.arange(6) > 2)[:, None].expand(6, N)},
}
EVERY = pytest.mark.parametrize("name", OPTIONS)
# two ways through float64: 2e-16 a rounding, a few hundred of them, of numbers up to some tens
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}


def options_of(name: str) -> dict:
    options = dict(OPTIONS[name])
    mask = options.get("attn_mask")
    return options if mask is None or mask.ndim == 2 else options | {"attn_mask": mask.expand(6, N)}


def operands(generator, dtype=torch.float64, queries=6, heads=4, keys_heads=4):
    q, k, v = draw(generator, "cpu", dtype, (2, heads, queries, 8), (2, keys_heads, N, 8), (2, keys_heads, N, 8))
    return [t.requires_grad_() for t in (q, k, v)]


def columns(leaves):
    """Of which torch's kernel for a CPU is the one that keeps every probability, and not flash's."""
    return [t.detach().mT.contiguous().mT.requires_grad_() for t in leaves]


def outcome(leaves, dout, **options):
    out = scaled_dot_product_attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.certifies("forward", "backward", op="scaled_dot_product_attention", provider="torch")
@pytest.mark.parametrize("layout", ["rows", "columns", "grouped", "without_heads"])
@EVERY
def test_it_is_the_documented_function(name, layout, torchs, generator):
    """By each of torch's kernels on a CPU: flash, and the one that keeps every probability."""
    options, leaves = options_of(name), operands(generator, keys_heads=2 if layout == "grouped" else 4)
    if layout == "columns":
        leaves = columns(leaves)
    elif layout == "grouped":
        options["enable_gqa"] = True
    elif layout == "without_heads":
        leaves = [t.detach()[:, 0].requires_grad_() for t in leaves]
    dout = torch.randn(leaves[0].shape, generator=generator, dtype=torch.float64)
    got = outcome(leaves, dout, **options)
    with fusednorm.use_provider("reference"):
        expected = outcome(leaves, dout, **options)
    torch.testing.assert_close(got, expected, **FLOAT64)
    said = fusednorm.explain(scaled_dot_product_attention, *leaves, **options)
    assert said.startswith("scaled_dot_product_attention: torch, torch's own operator"), said


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("name", ["plain", "causal", "key_mask", "bool_mask_causal"])
def test_second_derivatives(name, layout, torchs, generator):
    leaves = operands(generator)
    if layout == "columns":
        leaves = columns(leaves)

    def run(*tensors):
        return scaled_dot_product_attention(*tensors, **options_of(name))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_the_gradient_of_an_additive_mask(torchs, generator):
    leaves = operands(generator)
    mask = torch.randn(4, 6, N, generator=generator, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(2, 4, 6, 8, generator=generator, dtype=torch.float64)

    def gradients():
        return torch.autograd.grad(scaled_dot_product_attention(*leaves, mask, is_causal=True), (*leaves, mask), dout)

    got = gradients()
    with fusednorm.use_provider("reference"):
        torch.testing.assert_close(got, gradients(), **FLOAT64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_what_is_masked_reaches_nothing_without_kernels(layout, bad, without_kernels, generator):
    """Operands and cotangents on a CPU are looked at."""
    leaves = operands(generator, torch.float32, queries=N)
    if layout == "columns":
        leaves = columns(leaves)
    dout = torch.randn(2, 4, N, 8, generator=generator)
    expected = outcome(leaves, dout, is_causal=True)
    hidden = [leaves[0], *[t.detach().clone() for t in leaves[1:]]]
    for tensor in hidden[1:]:
        tensor[:, :, 7:] = bad
    got = scaled_dot_product_attention(*hidden, is_causal=True)
    torch.testing.assert_close(got[:, :, :7], expected[0][:, :, :7])
    dout[:, :, :3] = 0.0
    expected = outcome(leaves, dout, is_causal=True)
    dout[:, :, :3] = bad
    got = outcome(leaves, dout, is_causal=True)
    for gradient, known in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(gradient[:, :, 3:], known[:, :, 3:])


def test_what_key_mask_hides_reaches_nothing_under_a_dispatch_mode(without_kernels, generator):
    """Values are not looked at there."""
    q, k, v = [t.detach() for t in operands(generator, queries=N)]
    key_mask = torch.ones(2, N, dtype=torch.bool)
    key_mask[:, 7:] = False
    expected = scaled_dot_product_attention(q, k, v, key_mask=key_mask)
    k[:, :, 7:] = v[:, :, 7:] = float("nan")
    with FlopCounterMode(display=False):
        got = scaled_dot_product_attention(q, k, v, key_mask=key_mask)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_dropout_without_a_seed_is_torchs(options, dtype, torchs, generator):
    leaves = [t.detach().to(dtype).requires_grad_() for t in operands(generator)]
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        torch.manual_seed(5)
        out = function(*leaves, dropout_p=0.4, **options)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["plain", "causal", "causal_window_key_mask"])
def test_a_seed_gives_the_documented_mask(name, torchs, generator):
    leaves, options = operands(generator), options_of(name) | {"dropout_p": 0.4, "seed": 3}
    dout = torch.randn(2, 4, 6, 8, generator=generator, dtype=torch.float64)
    got = outcome(leaves, dout, **options)
    with fusednorm.use_provider("reference"):
        torch.testing.assert_close(got, outcome(leaves, dout, **options), **FLOAT64)


def test_what_it_lacks_is_refused_by_name(generator):
    q, k, v = operands(generator)
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    packed = [t[0].transpose(0, 1) for t in (q, q, q)]
    with fusednorm.use_provider("torch"):
        with pytest.raises(ValueError, match="'torch' cannot run attention_fwd: torch's attention has no softcap"):
            scaled_dot_product_attention(q, k, v, softcap=1.0)
        with pytest.raises(ValueError, match="'torch' cannot run attention_fwd: torch's attention returns no log-sum"):
            scaled_dot_product_attention(q, k, v, return_lse=True)
        with pytest.raises(ValueError, match="'torch' cannot run attention_fwd: torch's attention takes no packed"):
            varlen_attention(*packed, bounds, bounds, 6, 6)


@pytest.mark.parametrize("options", [{"softcap": 1.0}, {"return_lse": True}, {"dropout_p": 0.1, "seed": 1}], ids=str)
def test_the_reference_serves_what_it_lacks(options, without_kernels, generator):
    said = fusednorm.explain(scaled_dot_product_attention, *operands(generator), **options)
    assert said.startswith("scaled_dot_product_attention: reference, ") and "torch's own operator is not used: " in said


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.5}], ids=str)
def test_checkpoint(options, use_reentrant, torchs, generator):
    leaves = columns(operands(generator))
    dout = torch.randn(2, 4, 6, 8, generator=generator, dtype=torch.float64)
    attend = functools.partial(scaled_dot_product_attention, **options)
    plain, again = kept_and_recomputed(attend, leaves, [dout], use_reentrant)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_graph_is_walked_twice_only_if_retained(torchs, generator):
    leaves = columns(operands(generator))
    out = scaled_dot_product_attention(*leaves, is_causal=True)
    node = out.grad_fn
    assert hasattr(node, "inner")
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not hasattr(node, "inner")  # what torch's kernel saved is let go with what we saved
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), leaves)


def test_automatic_choice_keeps_the_error_budget_at_any_number_of_dimensions(generator):
    """Torch takes other kernels for other numbers of dimensions than four, with other errors; so must we."""
    chosen = random.Random(generator.initial_seed())
    for _ in range(24):
        lead = [chosen.randint(1, 4) for _ in range(chosen.choice([0, 1, 1, 2, 3]))]
        queries, keys, columns = chosen.randint(1, 20), chosen.randint(1, 20), chosen.choice([1, 3, 8, 33])
        options = chosen.choice(
            [{}, {"is_causal": True}, {"is_causal": True}, {"attn_mask": torch.randn(queries, keys)}]
        )
        worst: dict[str, list[float]] = {}
        for _ in range(6):
            shapes = [(*lead, n, columns) for n in (queries, keys, keys, queries)]
            *given, dout = draw(generator, "cpu", torch.float32, *shapes)

            def evaluate(function, dtype, given=given, dout=dout, options=options):
                leaves = [t.to(dtype).requires_grad_() for t in given]
                out = function(*leaves, **{n: o.to(dtype) if n == "attn_mask" else o for n, o in options.items()})
                return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

            exact = evaluate(F.scaled_dot_product_attention, torch.float64)
            ours = evaluate(scaled_dot_product_attention, torch.float32)
            eager = evaluate(F.scaled_dot_product_attention, torch.float32)
            for name, *results in zip(("out", "dq", "dk", "dv"), ours, eager, exact, strict=True):
                errors = [(r.double() - results[-1]).abs().max().item() for r in results[:2]]
                found = (*errors, results[-1].abs().max().item())
                worst[name] = [max(pair) for pair in zip(worst.get(name, found), found, strict=True)]
        for name, (error, eagers, size) in worst.items():
            budget = 2 * eagers + torch.finfo(torch.float32).eps * size
            assert error <= budget, (name, lead, queries, keys, columns, list(options), error, eagers)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Fake tensors on CUDA, whose values nobody can look at, and Triton's kernels for them."""
    monkeypatch.setitem(dispatch.registry._reasons, "triton", None)
    monkeypatch.setattr(triton_attention, "refusal", lambda op, *args: None)
    monkeypatch.setattr(dispatch.get("triton")[0], "for_tests", None)
    monkeypatch.setattr(dispatch.get("triton")[0], "runs_on", lambda: "cuda")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    with FakeTensorMode():
        yield
    torch.use_deterministic_algorithms(before)


def why_ours(needs_grad=True, dims=4, provider="triton", **changed) -> tuple[str, str]:
    """Why torch's operator does not serve a call on a GPU, and what explain says where it does."""
    q, k, v = (torch.empty(2, 4, 128, 64, device="cuda", requires_grad=needs_grad) for _ in range(3))
    args = {
        "q": q, "k": k, "v": v, "attn_mask": None, "key_mask": None, "seed": None, "cu_q": None, "cu_k": None,
        "longest_q": 128, "longest_k": 128, "scale": 0.125, "dropout_p": 0.0, "causal": False, "lower_right": False,
        "left": -1, "right": -1, "softcap": 0.0,
    }  # fmt: skip
    call = from_flat("attention_fwd", tuple((args | changed).values()))
    asked = rules.Asked(provider, False, dims, needs_grad, dispatch.settings.current.by_shape, None)
    return rules.why_not_torch(*call, asked), rules.how_torch_serves(*call)


@pytest.mark.parametrize("needs_grad", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
def test_plain_and_causal_attention_on_a_gpu_are_torchs(causal, needs_grad, on_a_gpu):
    differs, how = why_ours(needs_grad, causal=causal)
    assert differs == "" and ("but for NaN and Inf of what is masked" in how) == causal


def test_what_stays_ours_on_a_gpu(on_a_gpu):
    mask, key_mask = (torch.empty(s, dtype=torch.bool, device="cuda") for s in ((128, 128), (2, 128)))
    for changed, why in (
        ({"attn_mask": mask}, "NaN and Inf"),
        ({"key_mask": key_mask}, "key_mask is none of its arguments"),
        ({"left": 3}, "window is none of its arguments"),
        ({"softcap": 1.0}, "softcap"),
        ({"dropout_p": 0.1}, "dropout mask"),
        ({"causal": True, "scale": -1.0}, "scales the -inf"),
        ({"dims": 3}, "do not take"),
    ):
        assert why in why_ours(**changed)[0], changed
    with fusednorm.batch_invariant():
        assert "depends on the batch" in why_ours()[0]
    torch.use_deterministic_algorithms(True)
    assert "from run to run" in why_ours()[0] and why_ours(needs_grad=False)[0] == ""


def test_where_no_kernel_of_ours_takes_it_torchs_does_on_a_gpu(on_a_gpu):
    """Below capability 8.0, in float64, without a C compiler."""
    mask, key_mask = (torch.empty(s, dtype=torch.bool, device="cuda") for s in ((128, 128), (2, 128)))
    for changed in ({}, {"causal": True}, {"attn_mask": mask}, {"key_mask": key_mask}, {"left": 3}, {"dropout_p": 0.1}):
        assert why_ours(provider="torch", **changed)[0] == "", changed


def call(**changed) -> rules.Gpu:
    usual = rules.Gpu(attn_mask=False, fused=True, needs_grad=True, deterministic=False, by_shape=True)
    return usual._replace(**changed)


@pytest.mark.parametrize(
    ("described", "why"),
    [
        (call(), ""),
        (call(needs_grad=False, deterministic=True), ""),
        (call(attn_mask=True), "NaN and Inf"),
        (call(fused=False), "do not take"),
        (call(deterministic=True), "differ from run to run"),
        (call(by_shape=False), "depends on the batch"),
    ],
    ids=str,
)
def test_the_rule_for_a_gpu_where_nothing_was_measured(described, why):
    found = rules.why_not_torch_on_a_gpu(described)
    assert found == why if not why else why in found
