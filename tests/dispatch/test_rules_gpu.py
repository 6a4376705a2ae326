"""Who serves small calls on a GPU where nothing was measured; no GPU is needed to choose."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fusednorm
from fusednorm import dispatch
from fusednorm._options import from_flat
from fusednorm.dispatch import crossovers as choice
from fusednorm.dispatch import rules
from fusednorm.dispatch.resolve import Request, resolve

MIB = 1 << 20


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Fake tensors on CUDA, Triton's kernels for them, no CUDA library, and nothing measured."""
    monkeypatch.setattr(choice, "_architecture", lambda index: "sm_00")
    monkeypatch.setitem(dispatch.registry._reasons, "triton", None)
    monkeypatch.setitem(dispatch.registry._reasons, "cuda", "it is not built")
    monkeypatch.setattr(dispatch.fastpath, "load", lambda: (None, "it is not built"))
    for module in dispatch.get("triton"):
        monkeypatch.setattr(module, "refusal", lambda op, *args: None)
    monkeypatch.setattr(dispatch.get("triton")[0], "for_tests", None)
    monkeypatch.setattr(dispatch.get("triton")[0], "runs_on", lambda: "cuda")
    rules.forget()
    with FakeTensorMode():
        yield
    rules.forget()


def rows(mib: int, needs_grad: bool = False) -> torch.Tensor:
    return torch.empty(mib * MIB // 4 // 1024, 1024, device="cuda", requires_grad=needs_grad)


def vector() -> torch.Tensor:
    return torch.empty(1024, device="cuda")


def chosen(op: str, *args) -> str:
    return resolve(Request(op, op, *from_flat(op, args))).provider


def norm_args(x, **changed):
    args = {
        "x": x, "residual": x, "weight": None, "bias": None, "x_bias": None, "layer_scale": None, "seed": None,
        "normalized_ndim": 1, "eps": 1e-5, "dropout_p": 0.0, "drop_path_p": 0.0, "normed_dtype": x.dtype,
        "residual_dtype": x.dtype, "rms": False, "zero_centered_weight": False, "store_residual": True,
    }  # fmt: skip
    return tuple((args | changed).values())


def norm_call(x):
    return from_flat("add_layer_norm_fwd", norm_args(x))


@pytest.mark.parametrize(
    ("mib", "needs_grad", "served"),
    [(1, False, "torch"), (32, False, "torch"), (33, False, "triton"), (64, True, "torch"), (65, True, "triton")],
)
def test_norms_and_activations(mib, needs_grad, served, on_a_gpu):
    x = rows(mib, needs_grad)
    for changed in ({}, {"residual": None, "rms": True}, {"zero_centered_weight": True}):
        assert chosen("add_layer_norm_fwd", *norm_args(x, **changed)) == served
    assert chosen("bias_act_dropout_fwd", x, vector(), None, "gelu", 0.0) == served


@pytest.mark.parametrize(("mib", "served"), [(1, "torch"), (48, "torch"), (65, "triton")])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_the_grad_mode_does_not_decide_who_draws_a_mask(grad, mib, served, on_a_gpu):
    """Reentrant checkpointing makes a call without gradients, and again with them: both need the same mask."""
    x = rows(mib, grad)
    for changed in ({"dropout_p": 0.1}, {"drop_path_p": 0.1}):
        assert chosen("add_layer_norm_fwd", *norm_args(x, **changed)) == served
    assert chosen("bias_act_dropout_fwd", x, vector(), None, "gelu", 0.1) == served


def test_a_seeded_mask_is_not_computed_in_python(on_a_gpu):
    x, seed = rows(1), torch.empty(1, dtype=torch.int64, device="cuda")
    assert chosen("add_layer_norm_fwd", *norm_args(x, dropout_p=0.1, seed=seed)) == "triton"
    assert chosen("bias_act_dropout_fwd", x, vector(), seed, "gelu", 0.1) == "triton"


def test_a_measurement_overrides_the_rule(on_a_gpu, monkeypatch):
    steps = {"add_layer_norm/4/forward": [choice.Step(1, 1, "triton")]}
    measured = functools.cache(lambda key: choice.Table("a GPU", "a file", 0.0, steps))
    monkeypatch.setattr(choice, "table", measured)
    rules.fastest.cache_clear()
    assert chosen("add_layer_norm_fwd", *norm_args(rows(1))) == "triton"
    assert chosen("add_layer_norm_fwd", *norm_args(rows(1), rms=True)) == "torch"


def test_batch_invariant_does_not_go_by_bytes(on_a_gpu):
    with fusednorm.batch_invariant():
        assert chosen("add_layer_norm_fwd", *norm_args(rows(1))) == "triton"


def test_normed_is_kept_by_our_kernel(on_a_gpu):
    """Memory-efficient calls do not fall through torch's operators to the reference."""
    op, call = "add_layer_norm_fwd", norm_call(rows(1))
    assert resolve(Request(op, op, *call, ("torch", "it keeps z"))).provider == "triton"


def test_explain_says_so(on_a_gpu):
    preference = rules.preference(*norm_call(rows(1)))
    assert preference[:2] == (
        "torch",
        "nothing was measured on this GPU, and a call of up to 32 MiB waits for the host",
    )


@pytest.mark.gpu
def test_without_triton_the_fast_path_leads_masks_of_ours_to_cuda(monkeypatch):
    monkeypatch.setitem(dispatch.registry._reasons, "triton", "absent")
    dispatch.settings.forget()
    q, k, v = torch.randn(3, 2, 2, 5, 8, device="cuda", requires_grad=True).unbind()
    padded = fusednorm.scaled_dot_product_attention(q, k, v, key_mask=torch.ones(2, 5, dtype=torch.bool, device="cuda"))
    causal = fusednorm.scaled_dot_product_attention(q, k, v, is_causal=True)
    dispatch.settings.forget()
    assert padded.grad_fn.name() == "FusedAttentionBackward" != causal.grad_fn.name()
