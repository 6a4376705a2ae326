"""A provider is chosen in dispatch/resolve.py and nowhere else, and once for each signature of a call."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fusednorm
from fusednorm import dispatch
from fusednorm.dispatch import eager, settings

PACKAGE = Path(fusednorm.__file__).parent
# What a choice is made of: whether a provider takes a call, whether it is preferred, and who is asked for.
QUESTIONS = {"refusal", "reluctance", "preference", "why_not_torch", "check_request", "_first"}


def askers() -> dict[str, set[str]]:
    """Which files call each of the questions."""
    found: dict[str, set[str]] = {question: set() for question in QUESTIONS}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in QUESTIONS:
                    found[name].add(path.relative_to(PACKAGE).as_posix())
    return found


def test_only_dispatch_asks_who_can_and_who_should_serve():
    found = askers()
    assert all("dispatch/resolve.py" in files for files in found.values())
    for question, files in found.items():
        outside = {file for file in files if not file.startswith(("dispatch/", "providers/"))}
        assert not outside, f"{question} is asked in {outside}"


def test_the_walk_sees_a_question():
    tree = ast.parse("x = registry.refusal(1)")
    assert [node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call)] == ["refusal"]
    assert len(list(PACKAGE.rglob("*.py"))) > 80


def entered(call) -> list[tuple[str, str]]:
    """(file, function) of every frame of the package in a call."""
    found = []

    def profile(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            found.append((path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def calls(grad: bool) -> dict[str, object]:
    x, r, w = torch.randn(4, 64), torch.randn(4, 64), torch.ones(64)
    q = torch.randn(2, 2, 8, 16)
    mask = torch.ones(2, 8, dtype=torch.bool)
    for tensor in (x, r, w, q):
        tensor.requires_grad_(grad)
    attention = fusednorm.scaled_dot_product_attention
    return {
        "rms_norm": lambda: fusednorm.rms_norm(x, 64, w),
        "add_layer_norm": lambda: fusednorm.add_layer_norm(x, r, 64, w, w),
        "add_rms_norm": lambda: fusednorm.add_rms_norm(x, r, (64,), w, dropout_p=0.1),
        "bias_act_dropout": lambda: fusednorm.bias_act_dropout(x, w, "silu"),
        "bias_act_dropout with a mask": lambda: fusednorm.bias_act_dropout(x, w, "gelu", 0.1),
        "attention": lambda: attention(q, q, q),
        "causal attention": lambda: attention(q, q, q, is_causal=True),
        "attention with a key mask": lambda: attention(q, q, q, key_mask=mask),
    }


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("name", calls(False))
@pytest.mark.parametrize("provider", [None, "torch", "reference"])
def test_a_signature_is_decided_once(name, grad, provider):
    call = calls(grad)[name]
    with settings.without_fastpath():
        if provider is not None:
            with fusednorm.use_provider(provider):
                first, second = entered(call), entered(call)
        else:
            first, second = entered(call), entered(call)
    decided = first.count(("dispatch/resolve.py", "_decide"))
    if (provider, name) == ("torch", "rms_norm"):  # called at once, as the settings say
        assert decided == 0
    else:
        assert 1 <= decided <= 2  # both, where what the operands hold decides
    assert {file for file, _ in second if file.startswith("dispatch/")} == {"dispatch/eager.py"}


def test_what_the_operands_hold_is_looked_at_in_every_call():
    """A plan made for harmless operands does not serve others."""
    q = torch.randn(1, 2, 8, 16)
    hidden = q.clone()
    hidden[:, :, -1] = torch.nan
    with settings.without_fastpath():
        for _ in range(2):
            for operand in (q, hidden):
                out = fusednorm.scaled_dot_product_attention(q, operand, operand, is_causal=True)
                assert out[:, :, :-1].isfinite().all()


@pytest.mark.parametrize(
    ("changed", "served"),
    [
        (lambda q: q.transpose(2, 3).contiguous().transpose(2, 3), "strides"),
        (lambda q: q.double(), "dtype"),
        (lambda q: q.clone().requires_grad_(), "gradients"),
        (lambda q: q[:, :, :5], "shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_plan_serves_no_other_signature(changed, served):
    q = torch.randn(1, 2, 8, 16)
    with settings.without_fastpath():
        fusednorm.scaled_dot_product_attention(q, q, q, is_causal=True)
        other = changed(q)
        out = fusednorm.scaled_dot_product_attention(other, other, other, is_causal=True)
        expected = torch.nn.functional.scaled_dot_product_attention(*[other.detach().double()] * 3, is_causal=True)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
        assert out.requires_grad == other.requires_grad


def test_a_plan_knows_which_tensors_are_the_same():
    """A guard takes each tensor once; with (q, k, k) and (q, q, k) it would see the same two."""
    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 5, 16)
    attention = fusednorm.scaled_dot_product_attention
    with settings.without_fastpath(), fusednorm.use_provider("cpu"):
        found = [attention(*given, window=(2, 2)) for given in ((q, k, k), (q, q, q), (q, k, k))]
        assert entered(lambda: attention(q, k, k, window=(2, 2))).count(("dispatch/resolve.py", "_decide")) == 0
        expected = attention(q.clone(), k.clone(), k.clone(), window=(2, 2))
        assert torch.equal(found[0], expected) and torch.equal(found[2], expected)
        with pytest.raises(ValueError, match="value"):
            attention(q, q, k, window=(2, 2))


def test_without_the_guards_of_torch_compile_every_call_is_resolved_anew(monkeypatch):
    assert eager.TensorGuards is not None  # of this torch
    monkeypatch.setattr(eager, "TensorGuards", None)
    x = torch.randn(3, 8)
    with settings.without_fastpath():
        for _ in range(2):
            seen = entered(lambda: fusednorm.add_layer_norm(x, x.clone(), 8))
            assert seen.count(("dispatch/resolve.py", "_decide")) == 1
        assert not settings.current.plans


def test_plans_that_differ_in_strides_alone_are_bounded():
    with settings.without_fastpath():
        for columns in range(8, 8 + 2 * eager.MAX_ALIKE):
            x = torch.randn(4, columns)[:, :8]
            torch.testing.assert_close(
                fusednorm.add_layer_norm(x, x.clone(), 8)[0], torch.nn.functional.layer_norm(x + x, (8,))
            )
        assert [len(alike) for alike in settings.current.plans.values()] == [eager.MAX_ALIKE]


@pytest.mark.parametrize(
    "arguments",
    [(64.0,), ((64.0,),), ((True,),), (64, None, None, True), (64, None, None, "1e-5")],
    ids=["float", "tuple of a float", "tuple of a bool", "bool eps", "text eps"],
)
def test_a_plan_does_not_let_through_what_equals_a_good_argument(arguments):
    x = torch.randn(4, 1 if arguments[0] == (True,) else 64)
    with settings.without_fastpath():
        fusednorm.add_layer_norm(x, x, x.shape[-1], eps=1.0)
        with pytest.raises((TypeError, ValueError)):
            fusednorm.add_layer_norm(x, x, *arguments)


@pytest.mark.parametrize("twice", [False, True])
def test_a_kept_plan_does_not_serve_fake_tensors_and_make_fx(twice):
    """Their modes are no part of what a guard sees. A tensor given twice has a look-up of its own."""
    x, weight = torch.randn(3, 16), torch.randn(16)
    other = x if twice else x + 1

    def call(x):
        return fusednorm.add_layer_norm(x, x if twice else other, 16, weight)[0]

    with settings.without_fastpath(), fusednorm.use_provider("reference"):
        call(x)
        call(x)
        assert settings.current.plans
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert type(call(x)) is FakeTensor
        nodes = [node.target for node in make_fx(call)(x).graph.nodes]
        assert torch.ops.fusednorm.add_layer_norm_fwd.default in nodes, nodes


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(eager, "MAX_PLANS", 8)
    with settings.without_fastpath():
        for rows in range(1, 40):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(
                fusednorm.add_layer_norm(x, x, 8)[0], torch.nn.functional.layer_norm(x + x, (8,))
            )
        assert len(dispatch.settings.current.plans) <= 8


def test_a_block_begins_and_ends_without_plans():
    x = torch.randn(3, 8)
    with settings.without_fastpath():
        fusednorm.add_layer_norm(x, x, 8)
        assert settings.current.plans
        with fusednorm.use_provider("torch"):
            assert not settings.current.plans
            with fusednorm.batch_invariant():
                fusednorm.add_layer_norm(x, x, 8)
            assert not settings.current.plans
