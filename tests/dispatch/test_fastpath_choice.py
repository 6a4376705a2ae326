"""Which calls automatic choice gives to the shortcut: requests, what was measured, and a norm with nothing to add."""

from __future__ import annotations

import pytest
import torch

import fusednorm
from fusednorm import dispatch
from fusednorm.dispatch import fastpath as _shortcut

_missing = _shortcut.load()[1]
pytestmark = pytest.mark.skipif(bool(_missing), reason=f"no shortcut: {_missing}")


def test_shortcut_stands_aside_for_other_requests_and_while_decisions_are_recorded():
    assert dispatch.unavailable_reason("cpu") is None and dispatch.shortcut is not None
    with fusednorm.use_provider("reference"):
        assert dispatch.shortcut is None
    with dispatch.recording():
        assert dispatch.shortcut is None
    assert dispatch.shortcut is not None and dispatch.shortcut_asked
    with fusednorm.batch_invariant():
        assert not dispatch.shortcut_asked
    assert dispatch.shortcut_asked


def test_shortcut_goes_by_what_was_measured(monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch.choice, "torch_on_cpu", lambda *question: asked.append(question) or True)
    x, weight = torch.randn(6, 4, 8), torch.randn(8, requires_grad=True)
    assert dispatch.shortcut.add_norm(x, x, 8, weight, None, 1e-5, None, 0.0, None, True, True) is None
    assert dispatch.shortcut.add_norm(x, None, 8, None, weight, 1e-5, None, 0.5, None, False, True) is None
    with torch.no_grad():
        assert dispatch.shortcut.rms_norm(x.bfloat16(), 8, None, None, True) is None
    assert asked == [
        ("add_rms_norm", torch.float32, 192, 8, True),
        ("bias_dropout_add_layer_norm", torch.float32, 192, 8, True),
        ("rms_norm", torch.bfloat16, 192, 8, False),
    ]


def test_automatic_choice_is_the_same_with_the_shortcut_and_without_for_a_norm_with_nothing_to_add(monkeypatch):
    """What is computed anew, as in a checkpoint, may not take the shortcut, and keeps what was kept the first time."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.ones(8)
    names = []
    for _ in range(2):
        outputs = fusednorm.add_layer_norm(x, None, 8, weight)[0], fusednorm.layer_norm(x, 8, weight)
        names.append([output.grad_fn.name() for output in outputs])
        monkeypatch.setattr(dispatch, "shortcut", None)
    assert names == [["NativeLayerNormBackward0"] * 2] * 2
    assert "torch's own operators" in fusednorm.explain(fusednorm.add_layer_norm, x, None, 8, weight)
