"""Automatic choice by crossovers: from the file of a device to the provider of a call."""

from __future__ import annotations

import json
import logging
import math
import warnings

import pytest
import torch
from torch._dynamo import testing

import fusednorm
from benchmarks.publish import crossovers
from fusednorm import _once, dispatch
from fusednorm.dispatch import crossovers as choice
from fusednorm.dispatch import rules
from fusednorm.providers.reference import activation as reference_activation
from fusednorm.providers.reference import norm as reference
from tests.helpers.dispatching import plant


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A table for the CPU: `first` (the reference under another name) for many elements in wide rows, or else torch."""
    module = type(reference)("fusednorm_test_first")
    module.unavailable_reason = lambda: None
    module.refusal = lambda op, *args: "no float64" if args[0].x.dtype == torch.float64 else None
    module.add_layer_norm_fwd, module.add_layer_norm_bwd = reference.add_layer_norm_fwd, reference.add_layer_norm_bwd
    module.bias_act_dropout_fwd = reference_activation.bias_act_dropout_fwd
    plant(monkeypatch, "first", module)
    monkeypatch.setitem(dispatch.registry._reasons, "cpu", "it is left out")
    monkeypatch.setattr(_once, "_said", {"no CPU library"})  # that it is missing is known
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    steps = [[1, 1, "torch"], [256, 1, "torch"], [256, 4096, "first"]]
    measured = ("bias_dropout_add_layer_norm/{}/forward", "bias_gelu_dropout/{}/both")
    table = {
        "device": "a CPU",
        "source": "benchmarks/results/a/raw.json, benchmarks/results/b/other.json",
        "worst_loss": 0.05,
        "steps": {
            **{name.format(s): steps for name in measured for s in (4, 8)},
            "bias_dropout_add_layer_norm/4/both": [[1, 1, "first"]],
        },
    }
    (tmp_path / f"{choice.device_key(torch.device('cpu'))}.json").write_text(crossovers.text(table))
    rules.forget()
    yield
    rules.forget()


def served(rows, columns, dtype=torch.float32, **options):
    x = torch.randn(rows, columns, dtype=dtype)
    options = {"x_bias": torch.randn(columns, dtype=dtype)} | options
    text = fusednorm.explain(fusednorm.add_layer_norm, x, x, columns, **options)
    return text.split()[1].strip(","), text


@pytest.mark.parametrize(
    ("rows", "columns", "options", "provider"),
    [
        *[(4, 64, {}, "torch"), (500, 255, {}, "torch"), (15, 256, {}, "torch")],
        *[(16, 256, {}, "first"), (10_000, 1024, {}, "first")],
        # who draws a mask does not hang on the grad mode: the step of both ways decides
        *[(4, 64, {name: 0.1}, "first") for name in ("dropout_p", "drop_path_p")],
        # what was not measured goes by the order of the table: another operation, a mixture of dtypes, no rows
        *[(4, 64, {"x_bias": None}, "first"), (4, 64, {"residual_dtype": torch.float64}, "first")],
        (0, 64, {}, "first"),
    ],
)
def test_the_last_step_that_a_call_reaches_decides(planted, rows, columns, options, provider):
    assert served(rows, columns, **options)[0] == provider


def test_a_call_with_gradients_goes_by_what_was_measured_of_both_ways(planted):
    trained = torch.randn(64, requires_grad=True)
    assert served(4, 64)[0] == "torch"
    assert served(4, 64, x_bias=trained)[0] == "first"
    with torch.no_grad():
        assert served(4, 64, x_bias=trained)[0] == "torch"


@pytest.mark.parametrize(
    ("shape", "activation", "dropout_p", "provider"),
    [
        ((4, 64), "gelu", 0.1, "torch"),
        ((2, 2, 64), "relu", 0.1, "torch"),  # one operation whatever the activation
        ((8, 8, 1024), "silu", 0.1, "first"),
        ((4, 64), "gelu", 0.0, "first"),  # never measured
    ],
)
def test_an_activation_goes_by_what_was_measured_of_it(planted, shape, activation, dropout_p, provider):
    x = torch.randn(shape)
    said = fusednorm.explain(fusednorm.bias_act_dropout, x, x.new_ones(shape[-1]), activation, dropout_p)
    assert said.startswith(f"bias_act_dropout: {provider},"), said


def test_explain_cites_the_step(planted):
    said = served(4, 64)[1]
    assert "first is not used: torch was measured fastest, to within 5 %, for add_layer_norm with" in said
    assert "of 4-byte elements, forward alone, below 256 columns, on a CPU (raw.json, other.json)" in said


@pytest.mark.parametrize(
    ("rows", "columns", "limits"),
    [
        (1, 8, "below 32 elements and below 64 columns"),
        (4, 8, "from 32 to 127 elements and below 64 columns"),
        (100, 8, "from 128 elements on and below 64 columns"),
        (1, 64, "from 64 columns on"),
        (1, 0, "at every size"),
    ],
)
def test_a_reason_names_the_limits_of_the_step(rows, columns, limits, file):
    steps = [[1, 1, "cpu"], [1, 32, "torch"], [1, 128, "cpu"], [64, 1, "torch"]] if columns else [[1, 1, "cpu"]]
    file.write_text(json.dumps(WHOLE | {"steps": {"rms_norm/2/both": steps}}))
    found = choice.fastest(file.stem, "rms_norm", 2, True, rows, columns or 1)
    assert f", forward and backward, {limits}, on a CPU (raw.json)" in found.why


def test_batch_invariant_does_not_look_at_shapes(planted):
    with fusednorm.batch_invariant():
        assert served(4, 64)[0] == "first"
        with fusednorm.batch_invariant(False):
            assert served(4, 64)[0] == "torch"
        assert served(4, 64)[0] == "first"
    assert served(4, 64)[0] == "torch"
    assert fusednorm.batch_invariant()(served)(4, 64)[0] == "first"  # as a decorator


def test_what_the_fastest_refuses_goes_by_the_order_of_the_table(planted):
    name, text = served(64, 1024, torch.float64)
    assert name == "torch" and "no float64" in text and "measured" not in text


def test_an_explicit_request_does_not_look_at_the_table(planted):
    with fusednorm.use_provider("first"):
        assert served(4, 64)[0] == "first"


def test_a_reason_is_logged_once_for_a_shape(planted, caplog):
    caplog.set_level(logging.INFO, logger="fusednorm")
    for _ in range(3):
        x = torch.randn(4, 64)
        fusednorm.add_layer_norm(x, x, 64, x_bias=torch.randn(64))
    assert len([r for r in caplog.records if "to within 5 %" in r.getMessage()]) == 1


def test_a_compiled_call_does_not_depend_on_measured_shapes(planted):
    counter = testing.CompileCounter()
    torch._dynamo.reset()
    run = torch.compile(
        lambda x, b: fusednorm.add_layer_norm(x, x, 64, x_bias=b)[0], backend=counter, fullgraph=True, dynamic=True
    )
    for rows in (4, 5, 700):
        run(torch.randn(rows, 64), torch.randn(64))
    assert counter.frame_count == 1


# --- a damaged file ---

WHOLE = {
    "device": "a CPU",
    "source": "raw.json",
    "worst_loss": 0.02,
    "steps": {"add_layer_norm/4/forward": [[1, 1, "torch"]]},
}


def with_steps(*steps):
    return json.dumps(WHOLE | {"steps": {"add_layer_norm/4/forward": steps}})


DAMAGED = {
    "empty": "",
    "half": json.dumps(WHOLE)[:60],
    "no object": "[1, 2]",
    "null": "null",
    **{f"no {key}": json.dumps({k: v for k, v in WHOLE.items() if k != key}) for key in WHOLE},
    "a device of another type": json.dumps(WHOLE | {"device": None}),
    "a loss of text": json.dumps(WHOLE | {"worst_loss": "0.02"}),
    "a loss below zero": json.dumps(WHOLE | {"worst_loss": -0.02}),
    "a loss that is no number": json.dumps(WHOLE | {"worst_loss": math.nan}),
    "steps of another type": json.dumps(WHOLE | {"steps": [1]}),
    "no steps for an operation": with_steps(),
    "a step too short": with_steps([1, 1]),
    "a step too long": with_steps([1, 1, "torch", 2.0]),
    "a step of text": with_steps(["1", "1", "torch"]),
    "a step of fractions": with_steps([1, 1, "torch"], [1, 2.5, "cpu"]),
    "a step without a provider": with_steps([1, 1, None]),
    "a step of zeros": with_steps([0, 0, "torch"]),
    "a step of negative elements": with_steps([1, 1, "torch"], [2, -2, "cpu"], [2, 1, "cpu"]),
    "a first step above one": with_steps([1, 64, "torch"]),
    "a width without its first step": with_steps([1, 1, "torch"], [64, 128, "cpu"]),
    "steps that descend": with_steps([1, 1, "torch"], [1, 64, "cpu"], [1, 32, "torch"]),
    "a step twice": with_steps([1, 1, "torch"], [1, 1, "cpu"]),
    "deep": "[" * 100_000,
    "no text": b"\xff\xfe\x00{",
    "a folder": None,
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    monkeypatch.setattr(_once, "_said", set())
    rules.forget()
    yield tmp_path / f"{choice.device_key(torch.device('cpu'))}.json"
    rules.forget()


def warned(file):
    """The warnings of three calls, after which it is as if there were no file."""
    x = torch.randn(4, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            rules.forget()  # other shapes of the same process
            fusednorm.add_layer_norm(x, x, 64)
            said = fusednorm.explain(fusednorm.add_layer_norm, x, x, 64)
    assert "measured" not in said
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_is_named_once_and_not_gone_by(content, file):
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (message,) = warned(file)
    assert str(file) in message and "order" in message


def test_a_whole_file_and_none_are_silent(file):
    assert not warned(file)
    file.write_text(json.dumps(WHOLE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rules.forget()
        assert "torch was measured fastest, to within 2 %" in served(4, 64, x_bias=None)[1]
