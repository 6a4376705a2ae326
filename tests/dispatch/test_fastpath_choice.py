"""Which calls automatic choice gives to the fast path: requests, what was measured, and a norm with nothing to add."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from fastpath_calls import NEEDS_FASTPATH

import fusednorm
from fusednorm import dispatch
from fusednorm._activations import ACTIVATIONS

pytestmark = NEEDS_FASTPATH


@pytest.fixture
def torch_is_fastest(monkeypatch):
    """As if torch had been measured to be fastest; yields the questions that are asked, without the device."""
    asked = []

    def fastest(device, *question):
        asked.append(question)
        return dispatch.rules.Preference("torch", "measured")

    monkeypatch.setattr(dispatch.rules.crossovers, "fastest", functools.lru_cache(fastest))
    dispatch.rules.forget()
    yield asked
    monkeypatch.undo()
    dispatch.rules.forget()


def test_the_fast_path_stands_aside_for_other_requests_and_while_decisions_are_recorded():
    assert dispatch.unavailable_reason("cpu") is None and dispatch.settings.current.fastpath is not None
    with fusednorm.use_provider("reference"):
        assert dispatch.settings.current.fastpath is None
    with dispatch.recording():
        assert dispatch.settings.current.fastpath is None
    assert dispatch.settings.current.fastpath is not None and dispatch.settings.current.fastpath_mode
    with fusednorm.batch_invariant():
        assert not dispatch.settings.current.fastpath_mode
    assert dispatch.settings.current.fastpath_mode


NO_BRANCH = (None,) * 5  # x_bias, layer_scale, gate, scale, shift


def test_the_fast_path_goes_by_what_was_measured(torch_is_fastest):
    x, weight = torch.randn(6, 4, 8), torch.randn(8, requires_grad=True)
    fast = dispatch.settings.current.fastpath
    normed, z = fast.add_norm(x, x, 8, weight, None, 1e-5, *NO_BRANCH, 0.0, None, True, True)
    assert torch.equal(z, x + x) and torch.equal(normed, torch.rms_norm(z, (8,), weight, 1e-5))  # torch's, from C++
    assert normed.grad_fn.name() == torch.rms_norm(z, (8,), weight, 1e-5).grad_fn.name()
    assert fast.add_norm(x, None, 8, None, weight, 1e-5, *NO_BRANCH, 0.5, None, False, True) is None
    with torch.no_grad():
        assert torch.equal(fast.rms_norm(x.bfloat16(), 8, None, None, True), torch.rms_norm(x.bfloat16(), (8,)))
    assert torch_is_fastest == [
        ("add_rms_norm", 4, True, 24, 8),
        ("bias_dropout_add_layer_norm", 4, True, 24, 8),
        ("rms_norm", 2, False, 24, 8),
    ]


def test_the_fast_path_of_activations_goes_by_what_was_measured(torch_is_fastest):
    x, bias = torch.randn(6, 4, 8), torch.randn(8, requires_grad=True)

    def taken(bias, activation="relu", dropout_p=0.0):
        return dispatch.settings.current.fastpath.bias_act_dropout(x, bias, activation, dropout_p, None, True)

    assert taken(bias, "silu").grad_fn.name() == "SiluBackward0"
    assert taken(bias, "silu", 0.5) is None
    assert taken(bias.detach().double()) is None  # torch would take the wider dtype
    assert torch_is_fastest == [
        ("bias_silu", 4, True, 24, 8),
        ("bias_gelu_dropout", 4, True, 24, 8),
        ("bias_relu", 4, False, 24, 8),
    ]


def test_automatic_choice_is_the_same_with_the_fast_path_and_without_for_a_norm_with_nothing_to_add():
    """What is computed anew, as in a checkpoint, may not take the fast path, and keeps what was kept the first time."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    by_torch = []
    for context in (contextlib.nullcontext(), dispatch.settings.without_fastpath()):
        with context:
            outputs = fusednorm.add_layer_norm(x, None, 8, weight)[0], fusednorm.layer_norm(x, 8, weight)
        by_torch.append([output.grad_fn.name() == "NativeLayerNormBackward0" for output in outputs])
    torchs = "torch's own operators" in fusednorm.explain(fusednorm.add_layer_norm, x, None, 8, weight)
    assert by_torch == [[torchs] * 2] * 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_is_served_alike_with_the_fast_path_and_without(activation):
    """Torch's operators are faster for GELU, and for the gradients of SiLU."""
    x, bias = torch.randn(4, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64, requires_grad=True)
    take = dispatch.settings.current.fastpath.bias_act_dropout
    by_torch = {True: activation in ("gelu", "silu"), False: activation == "gelu"}
    for needs_grad, expected in by_torch.items():
        given = bias.requires_grad_(needs_grad)
        decision = fusednorm.explain(fusednorm.bias_act_dropout, x, given, activation)
        assert decision.startswith(f"bias_act_dropout: {'torch' if expected else 'cpu'},"), decision
    fast = take(x, bias.requires_grad_(), activation, 0.0, None, True)
    assert ("BiasAct" not in fast.grad_fn.name()) == by_torch[True], fast.grad_fn.name()
    with fusednorm.batch_invariant():  # goes by no measurement
        assert "cpu, one fused op" in fusednorm.explain(fusednorm.bias_act_dropout, x, bias, activation)
        assert "BiasAct" in fusednorm.bias_act_dropout(x, bias, activation).grad_fn.name()
