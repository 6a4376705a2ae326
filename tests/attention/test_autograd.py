"""Attention's derivatives of every order and kind, and PyTorch's other machinery."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from backends import INTERPRETED
from derivatives import assert_gradients, gradients_of, kept_and_recomputed, of_every_kind
from oracle_attention import AttentionCall
from torch._dynamo.testing import CompileCounterWithBackend

import fusednorm
from fusednorm import scaled_dot_product_attention, varlen_attention

OP = "attention_fwd"

OPTIONS = {
    "bare": {},
    "causal": {"is_causal": True},
    "window_softcap": {"window": (2, 1), "softcap": 2.0, "causal_align": "lower_right"},
    "dropout": {"dropout_p": 0.3, "seed": 2**63 + 5},
    "key_mask": {"key_mask": torch.tensor([[True, False, True, True, False]])},
}
EVERY = pytest.mark.parametrize("name", OPTIONS)
# float64 rounds at 1e-16; a derivative adds tens of terms of order one
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}


def options_of(name: str, device: str) -> dict:
    return {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in OPTIONS[name].items()}


def operands(generator, device, dtype=torch.float64, masked=False) -> dict[str, torch.Tensor]:
    shapes = {"q": (1, 2, 4, 3), "k": (1, 2, 5, 3), "v": (1, 2, 5, 3)} | ({"mask": (2, 1, 5)} if masked else {})
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for n, s in shapes.items()}


@pytest.mark.certifies("backward", "double backward")
@pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fast", "full"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@EVERY
def test_gradcheck_and_gradgradcheck(name, masked, fast_mode, using, device, generator):
    """In fast mode along random directions."""
    leaves = operands(generator, device, masked=masked)
    call = AttentionCall(options_of(name, device))

    def both(leaves):
        out, lse = call.ours(leaves)
        return out, lse.where(lse > -torch.inf, 0.0)

    def out_alone(leaves):
        return scaled_dot_product_attention(*leaves.values(), **call.options)

    with using:
        for function in (both, out_alone):
            assert_gradients(function, leaves, fast_mode=fast_mode)


@EVERY
def test_torch_func(name, using, device, generator):
    """grad, jvp, the Hessian by forward over reverse, gradients of each sample by vmap."""
    leaves = operands(generator, device, masked=True)
    call = AttentionCall(options_of(name, device))
    vectors = [torch.randn(1, 2, 4, 3, generator=generator, dtype=torch.float64).to(device) for _ in range(2)]
    with using:
        ours = of_every_kind(call.ours, leaves, ("q", "k"), *vectors)
    exact = of_every_kind(lambda t: call.explicit(t, torch.float64), leaves, ("q", "k"), *vectors)
    torch.testing.assert_close(ours, exact, **FLOAT64)


def test_vmap_over_any_operand(using, device, generator):
    q, k, v = (torch.randn(3, 2, 5, 4, generator=generator).to(device) for _ in range(3))
    mask = torch.rand(3, 5, 5, generator=generator).to(device) > 0.3
    with using:
        for bits in itertools.product([None, 0], repeat=4):
            if bits == (None,) * 4:
                continue
            given = [t if bit == 0 else t[0] for t, bit in zip((q, k, v, mask), bits, strict=True)]
            got = torch.vmap(scaled_dot_product_attention, in_dims=bits)(*given)
            for n in range(3):
                one = [t[n] if bit == 0 else t for t, bit in zip(given, bits, strict=True)]
                torch.testing.assert_close(got[n], scaled_dot_product_attention(*one))


def test_is_grads_batched(using, device, generator):
    leaves = [t.requires_grad_() for t in operands(generator, device).values()]
    cotangents = torch.randn(3, 1, 2, 4, 3, generator=generator, dtype=torch.float64).to(device)
    with using:
        out = scaled_dot_product_attention(*leaves, is_causal=True)
        batched = torch.autograd.grad(out, leaves, cotangents, is_grads_batched=True, retain_graph=True)
        for n in range(3):
            single = torch.autograd.grad(out, leaves, cotangents[n], retain_graph=True)
            torch.testing.assert_close([g[n] for g in batched], list(single), **FLOAT64)


@EVERY
def test_each_subset_of_gradients(name, using, device, generator):
    leaves = operands(generator, device, masked=True)
    dy = torch.randn(1, 2, 4, 3, generator=generator, dtype=torch.float64).to(device)

    def run(leaves):
        return scaled_dot_product_attention(*leaves.values(), **options_of(name, device))

    with using:
        every = gradients_of([*leaves], run, leaves, [dy])
        for n in range(1, 4):
            for wanted in itertools.combinations(leaves, n):
                for one, gradient in gradients_of(wanted, run, leaves, [dy]).items():
                    torch.testing.assert_close(gradient, every[one], **FLOAT64)


def test_nothing_is_recorded_without_a_gradient(using, device):
    x = torch.ones(1, 2, 3, 8, device=device, requires_grad=True)
    with using:
        with torch.no_grad():
            outputs = [scaled_dot_product_attention(x, x, x), scaled_dot_product_attention(x, x, x, is_causal=True)]
        with torch.inference_mode():
            outputs += [scaled_dot_product_attention(x, x, x, softcap=1.0)]
    assert not any(out.requires_grad for out in outputs)


def test_one_tensor_in_every_role(using, device, generator):
    x = torch.randn(1, 2, 5, 4, generator=generator, dtype=torch.float64).to(device)
    one, three = x.clone().requires_grad_(), [x.clone().requires_grad_() for _ in range(3)]
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device)
    with using:
        for options in ({}, {"softcap": 1.0}):
            (got,) = torch.autograd.grad(scaled_dot_product_attention(one, one, one, **options), one, dy)
            expected = torch.autograd.grad(scaled_dot_product_attention(*three, **options), three, dy)
            torch.testing.assert_close(got, sum(expected), **FLOAT64)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"is_causal": True}, {}], ids=str)
def test_checkpoint_recomputes_the_same(options, use_reentrant, using, device, generator):
    *leaves, dy = (torch.randn(2, 2, 9, 8, generator=generator).to(device).requires_grad_() for _ in range(4))
    attend = functools.partial(scaled_dot_product_attention, **options)
    with using:
        plain, again = kept_and_recomputed(attend, leaves, [dy.detach()], use_reentrant)
    for expected, got in zip(plain, again, strict=True):
        assert torch.equal(expected, got)


@pytest.mark.certifies("compile")
@pytest.mark.quick_on("automatic", "cpu")  # the others' graphs differ by a name in an op
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"is_causal": True}, marks=pytest.mark.slow),
        pytest.param({"dropout_p": 0.5}, marks=pytest.mark.slow),
        {"window": (2, 2), "softcap": 1.0, "return_lse": True},
    ],
    ids=str,
)
def test_compiles_whole_for_every_length(options, using, device):
    counter = CompileCounterWithBackend("aot_eager")

    def run(q, k, v, mask, seed):
        out = scaled_dot_product_attention(q, k, v, mask, **options, seed=seed if "dropout_p" in options else None)
        return out[0] + out[1][..., None] if "return_lse" in options else out

    def results(function, length, masked):
        generator = torch.Generator().manual_seed(length)
        leaves = [torch.randn(2, 2, length, 8, generator=generator).to(device).requires_grad_() for _ in range(3)]
        mask = torch.zeros(length, length, device=device) if masked else None
        out = function(*leaves, mask, torch.tensor([length], device=device))
        dy = torch.randn(out.shape, generator=generator).to(device)
        return out.detach(), torch.autograd.grad(out, leaves, dy)

    with using:
        for masked in (False, True):
            torch._dynamo.reset()
            compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
            results(compiled, 10, masked)
            first = counter.frame_count
            for length in (33, 12, 7):
                torch.testing.assert_close(results(compiled, length, masked), results(run, length, masked))
            assert counter.frame_count == first


@pytest.mark.certifies("compile", op="varlen_attention")
def test_varlen_compiles_whole(using, device, generator):
    torch._dynamo.reset()
    leaves = [torch.randn(9, 2, 8, generator=generator).to(device).requires_grad_() for _ in range(3)]
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)

    def run(q, k, v):
        return varlen_attention(q, k, v, bounds, bounds, 5, 5, is_causal=True)

    with using:
        results = []
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            out = function(*leaves)
            results.append((out.detach(), torch.autograd.grad(out, leaves, torch.ones_like(out))))
    torch.testing.assert_close(*results)


@pytest.mark.certifies("autocast")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 1.0}, {"is_causal": True}], ids=str)
def test_autocast_gives_torchs_dtype(options, dtype, using, device):
    x = torch.ones(1, 2, 4, 8, device=device, dtype=dtype, requires_grad=True)
    mask = torch.zeros(4, 4, device=device, dtype=dtype)
    with using, torch.autocast(device, dtype=torch.bfloat16):
        ours = scaled_dot_product_attention(x, x, x, mask, **options)
        assert ours.dtype == F.scaled_dot_product_attention(x, x, x, mask).dtype
        assert torch.autograd.grad(ours, x, torch.ones_like(ours))[0].dtype == dtype


def test_autocast_takes_mixed_dtypes_as_torch_does(using, device):
    x = torch.ones(1, 2, 4, 8, device=device)
    with using, torch.autocast(device, dtype=torch.bfloat16):
        assert scaled_dot_product_attention(x, x.bfloat16(), x.half(), softcap=1.0).dtype == torch.bfloat16


# --- who serves a call ---


def test_explain(provider, using, device, generator):
    x = torch.randn(1, 2, 4, 8, generator=generator).to(device)
    with using:
        plain, capped = (fusednorm.explain(scaled_dot_product_attention, x, x, x, **o) for o in ({}, {"softcap": 1.0}))
    if provider != "automatic":
        assert all(
            said.startswith(f"scaled_dot_product_attention: {provider}, one fused op") for said in (plain, capped)
        )
    else:
        assert "torch's own operator: it means the same" in plain
        native = {"cpu": "cpu", "cuda": "triton"}[device]
        served = native if native in fusednorm.available_providers() else "reference"
        assert capped.startswith(f"scaled_dot_product_attention: {served}, ")
        assert "one fused op" in capped and "torch's own operator is not used: " in capped and "softcap" in capped


def test_explain_says_that_nan_was_seen(generator):
    q, k = torch.randn(1, 2, 4, 8, generator=generator), torch.randn(1, 2, 4, 8, generator=generator)
    assert "torch's own operator:" in fusednorm.explain(scaled_dot_product_attention, q, k, k, is_causal=True)
    k[:, :, 3] = torch.nan
    said = fusednorm.explain(scaled_dot_product_attention, q, k, k, is_causal=True)
    assert "torch's own operator is not used: NaN, Inf or huge" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.2}], ids=str)
def test_automatic_choice_is_torchs_result_to_the_last_bit(options, dtype, generator, as_on):
    as_on("intel")
    q, k, v = (torch.randn(2, 2, 9, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    dy = torch.randn(2, 2, 9, 16, generator=generator).to(dtype)
    differentiated = dtype == torch.float32 or "cpu" not in fusednorm.available_providers()
    results = []
    for function in (scaled_dot_product_attention, F.scaled_dot_product_attention):
        with torch.no_grad():
            results.append([function(q, k, v, **options)])
        if differentiated:
            out = function(q, k, v, **options)
            assert torch.equal(out, results[-1][0])
            results[-1] += torch.autograd.grad(out, (q, k, v), dy)
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.skipif("cpu" not in fusednorm.available_providers(), reason="no native kernels here that would be faster")
def test_automatic_choice_differentiates_16_bit_operands_by_the_native_kernels():
    q = torch.randn(1, 2, 4, 8).bfloat16().requires_grad_()
    said = fusednorm.explain(scaled_dot_product_attention, q, q, q)
    assert said.startswith("scaled_dot_product_attention: cpu, one fused op each way")
    assert "torch's own operator is not used: it was measured to be slower than ours" in said


@pytest.mark.skipif("cpu" not in fusednorm.available_providers(), reason="no native kernels here that would be faster")
@pytest.mark.parametrize(
    ("vendor", "dtype", "queries", "keys", "needs_grad", "served"),
    [
        ("intel", torch.float32, 256, 256, False, "torch"),
        ("intel", torch.float32, 256, 256, True, "torch"),
        ("intel", torch.bfloat16, 256, 256, False, "torch"),
        ("", torch.float32, 256, 256, True, "torch"),
        ("amd", torch.float32, 15, 256, False, "torch"),
        ("amd", torch.float32, 16, 256, False, "cpu"),
        ("amd", torch.float32, 64, 127, True, "torch"),
        ("amd", torch.float32, 64, 128, True, "cpu"),
        ("amd", torch.float32, 31, 512, True, "torch"),
        ("amd", torch.float16, 1, 8, False, "cpu"),
    ],
)
def test_automatic_choice_goes_by_processor_and_lengths(vendor, dtype, queries, keys, needs_grad, served, as_on):
    as_on(vendor)
    q, k = (torch.randn(1, 1, n, 8, dtype=dtype, requires_grad=needs_grad) for n in (queries, keys))
    assert fusednorm.explain(scaled_dot_product_attention, q, k, k).startswith(
        f"scaled_dot_product_attention: {served}, "
    )
    out = scaled_dot_product_attention(q, k, k)  # the fast path asks too
    with fusednorm.use_provider("cpu"):
        native = scaled_dot_product_attention(q, k, k)
    torchs = F.scaled_dot_product_attention(q, k, k)
    assert torch.equal(out, native if served == "cpu" else torchs)


@pytest.mark.skipif(not INTERPRETED, reason="without a GPU, where Triton's kernels take tensors of the CPU")
def test_automatic_choice_of_the_triton_kernels(monkeypatch):
    """As on a GPU: torch's operator where it is the same function and nothing was measured, else these kernels."""
    monkeypatch.setattr(fusednorm.dispatch.get("triton")[0], "for_tests", None)
    x = torch.randn(1, 1, 4, 16)

    def said(**options):
        return fusednorm.explain(scaled_dot_product_attention, x, x, x, **options)

    assert said().startswith("scaled_dot_product_attention: torch, torch's own operator: it means the same")
    assert "triton is not used: torch's own operator means the same here" in said()
    for options, why in (
        ({"softcap": 2.0}, "softcap"),
        ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, "key_mask"),
        ({"dropout_p": 0.5, "seed": 1}, "its dropout mask is not"),
    ):
        assert said(**options).startswith("scaled_dot_product_attention: triton, one fused op each way")
        assert "torch's own operator is not used: " in said(**options) and why in said(**options)
    with fusednorm.batch_invariant():
        assert said().startswith("scaled_dot_product_attention: triton, ") and "depends on the batch" in said()
    assert torch.equal(scaled_dot_product_attention(x, x, x), F.scaled_dot_product_attention(x, x, x))
