"""Automatic choice fed by measurement: from raw results to a table, from the table to the provider of a call."""

from __future__ import annotations

import json
import logging
import sys
import warnings

import pytest
import torch
from torch._dynamo import testing

import fusednorm
from benchmarks.publish import crossovers
from fusednorm import _once, dispatch
from fusednorm.dispatch import crossovers as choice
from fusednorm.dispatch import fastpath as _shortcut
from fusednorm.providers.cpu import norm as cpu
from fusednorm.providers.reference import activation as reference_activation
from fusednorm.providers.reference import norm as reference

DEVICE = {"device_type": "cuda", "device": "a GPU", "capability": "9.0"}


def record(op, shape, direction, provider, eager, ours, dtype="bfloat16"):
    """Times in microseconds, host included; device times say the opposite and must not count."""
    variants = {
        name: {"samples": [1.0 / time] * 9, "inclusive": [time * 1e-6] * 9}
        for name, time in (("eager", eager), ("fused", ours))
    }
    how = "one fused op each way"
    facts = {"op": op, "shape": list(shape), "direction": direction, "dtype": dtype, "provider": provider, "how": how}
    return facts | {"status": "measured", "variants": variants}


def result(*records, **environment):
    return {"environment": DEVICE | environment, "cases": list(records)}


def winners(*results):
    shapes = crossovers.table(results, ["raw.json"])["shapes"]
    return {(name, r, c): (provider, times) for name, entries in shapes.items() for r, c, provider, times in entries}


def test_the_fastest_provider_of_a_shape_wins():
    triton = result(record("add_layer_norm", (4096, 1024), "forward", "triton", 90, 30))
    cpu = result(record("add_layer_norm", (4096, 1024), "forward", "torch", 90, 45))
    assert winners(triton, cpu) == {("add_layer_norm/2/forward", 4096, 1024): ("triton", 3.0)}


def test_each_direction_has_its_own_winner():
    slow = result(
        record("layer_norm", (4, 64), "forward", "triton", 6, 12),
        record("layer_norm", (4, 64), "both", "triton", 60, 20),
        record("layer_norm", (4, 64), "backward", "triton", 60, 600),  # no call is a backward alone
    )
    assert winners(slow) == {
        ("layer_norm/2/forward", 4, 64): ("torch", 2.0),
        ("layer_norm/2/both", 4, 64): ("triton", 3.0),
    }


def test_a_stumble_of_the_machine_decides_nothing():
    lucky = record("layer_norm", (1, 1024), "both", "triton", 70, 10)
    lucky["variants"]["eager"]["inclusive"][3] = 8e-6  # what eager takes when every thread has its core
    assert winners(result(lucky)) == {("layer_norm/2/both", 1, 1024): ("triton", 1.0)}
    lucky["variants"]["fused"]["inclusive"][5] = 9e-6
    unlucky = record("layer_norm", (4, 64), "both", "triton", 10, 70)
    unlucky["variants"]["fused"]["inclusive"][3] = 11e-6
    assert winners(result(unlucky)) == {("layer_norm/2/both", 4, 64): ("torch", 1.1)}


def test_equal_times_leave_a_call_with_the_kernel():
    assert winners(result(record("layer_norm", (64, 64), "forward", "triton", 10, 10.1))) == {
        ("layer_norm/2/forward", 64, 64): ("triton", 0.99)
    }


def test_the_slower_of_two_dtypes_of_a_size_counts():
    both = result(
        record("layer_norm", (4, 64), "forward", "triton", 10, 5, "float16"),
        record("layer_norm", (4, 64), "forward", "triton", 10, 20, "bfloat16"),
    )
    assert winners(both) == {("layer_norm/2/forward", 4, 64): ("torch", 2.0)}


def test_a_provider_not_measured_in_every_dtype_is_no_candidate():
    whole = [record("layer_norm", (4, 64), "forward", "triton", 10, 9, dtype) for dtype in ("float16", "bfloat16")]
    half = record("layer_norm", (4, 64), "forward", "cpu", 10, 1)
    assert winners(result(*whole), result(half))["layer_norm/2/forward", 4, 64][0] == "triton"


def test_eager_dropout_is_no_candidate():
    lost = result(record("bias_dropout_add_layer_norm", (4, 64), "forward", "triton", 10, 20))
    assert winners(lost) == {("bias_dropout_add_layer_norm/2/forward", 4, 64): ("triton", 1.0)}


def test_cases_without_a_figure_do_not_count():
    wrong = record("layer_norm", (4, 64), "forward", "triton", 10, 1) | {"status": "wrong", "variants": {}}
    assert winners(result(wrong)) == {}


def test_results_of_two_devices_are_refused():
    with pytest.raises(ValueError, match="several devices"):
        crossovers.table([result(), result(device="another")], [])


def test_command_says_what_changes_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choice, "FOLDER", tmp_path / "choice")
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps(result(record("layer_norm", (4, 64), "forward", "triton", 6, 12))))
    assert crossovers.main([str(raw)]) == 0
    assert "torch" in capsys.readouterr().out and not choice.FOLDER.exists()
    assert crossovers.main([str(raw), "--write"]) == 0
    assert json.loads((tmp_path / "choice" / "sm_90.json").read_text()) == {
        "device": "a GPU",
        "source": "raw.json",
        "shapes": {"layer_norm/2/forward": [[4, 64, "torch", 2.0]]},
    }
    capsys.readouterr()
    assert crossovers.main([str(raw)]) == 0
    assert "No shape changes" in capsys.readouterr().out


def test_every_committed_table_names_known_providers_and_operations():
    for path in choice.FOLDER.glob("*.json"):
        table = choice.table(path.stem)
        assert table is not None and table.shapes
        for name, entries in table.shapes.items():
            operation, itemsize, direction = name.split("/")
            assert operation in crossovers.OPS and itemsize in "248" and direction in crossovers.DIRECTIONS
            assert entries and all(m.provider in dispatch.PROVIDERS and m.ratio > 0 for m in entries)


# --- from the table to a call ---


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A table for the CPU: `first` (the reference under another name) for wide rows, torch for narrow ones."""
    module = type(reference)("fusednorm_test_first")
    module.unavailable_reason = lambda: None
    module.refusal = lambda op, *args: "no float64" if args[0].x.dtype == torch.float64 else None
    module.add_layer_norm_fwd, module.add_layer_norm_bwd = reference.add_layer_norm_fwd, reference.add_layer_norm_bwd
    module.bias_act_dropout_fwd = reference_activation.bias_act_dropout_fwd
    monkeypatch.setitem(sys.modules, module.__name__, module)
    every = {"first": (module.__name__,), **{name: dispatch.PROVIDERS[name] for name in ("torch", "reference")}}
    monkeypatch.setattr(dispatch, "PROVIDERS", every)
    for cache in ("_modules", "_serving", "_functions", "_reasons"):
        monkeypatch.setattr(dispatch, cache, {})
    monkeypatch.setattr(_once, "_said", set())
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    entries = [[4, 64, "torch", 2.0], [64, 1024, "first", 3.0]]
    measured = ("bias_dropout_add_layer_norm/{}/forward", "bias_gelu_dropout/{}/both")
    table = {
        "device": "a CPU",
        "source": "raw.json",
        "shapes": {
            **{name.format(s): entries for name in measured for s in (4, 8)},
            "bias_dropout_add_layer_norm/4/both": [[4, 64, "first", 2.0]],
        },
    }
    (tmp_path / f"{choice.device_key(torch.device('cpu'))}.json").write_text(crossovers.text(table))
    choice.forget()
    yield
    choice.forget()


def served(rows, columns, dtype=torch.float32, **options):
    x = torch.randn(rows, columns, dtype=dtype)
    options = {"x_bias": torch.randn(columns, dtype=dtype)} | options
    text = fusednorm.explain(fusednorm.add_layer_norm, x, x, columns, **options)
    return text.split()[1].strip(","), text


@pytest.mark.parametrize(
    ("rows", "columns", "provider"),
    [(4, 64, "torch"), (1, 100, "torch"), (64, 1024, "first"), (10_000, 1024, "first"), (50, 800, "first")],
)
def test_the_nearest_measured_shape_decides(planted, rows, columns, provider):
    assert served(rows, columns)[0] == provider


def test_a_call_with_gradients_goes_by_what_was_measured_of_both_ways(planted):
    trained = torch.randn(64, requires_grad=True)
    assert served(4, 64)[0] == "torch"
    assert served(4, 64, x_bias=trained)[0] == "first"
    with torch.no_grad():
        assert served(4, 64, x_bias=trained)[0] == "torch"


def test_the_grad_mode_does_not_decide_who_draws_a_mask(planted):
    assert served(4, 64, dropout_p=0.1)[0] == served(4, 64, drop_path_p=0.1)[0] == "first"


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


def test_explain_cites_the_entry(planted):
    text = served(4, 64)[1]
    assert "first is not used: torch was measured to be 2.00 times as fast at 4 x 64" in text
    assert "a CPU (raw.json)" in text


def test_batch_invariant_does_not_look_at_shapes(planted):
    with fusednorm.batch_invariant():
        assert served(4, 64)[0] == "first"
        with fusednorm.batch_invariant(False):
            assert served(4, 64)[0] == "torch"
        assert served(4, 64)[0] == "first"
    assert served(4, 64)[0] == "torch"


def test_batch_invariant_decorates(planted):
    assert fusednorm.batch_invariant()(served)(4, 64)[0] == "first"


def test_an_operation_never_measured_goes_by_the_order_of_the_table(planted):
    assert served(4, 64, x_bias=None)[0] == "first"


def test_a_mixture_of_dtypes_goes_by_the_order_of_the_table(planted):
    assert served(4, 64)[0] == "torch"
    assert served(4, 64, residual_dtype=torch.float64)[0] == "first"


def test_what_the_fastest_refuses_goes_by_the_order_of_the_table(planted):
    name, text = served(64, 1024, torch.float64)
    assert name == "torch" and "no float64" in text and "measured" not in text


def test_an_explicit_request_does_not_look_at_the_table(planted):
    with fusednorm.use_provider("first"):
        assert served(4, 64)[0] == "first"


def test_empty_calls_are_served(planted):
    assert served(0, 64)[0] == "first"


def test_a_reason_is_logged_once_for_a_shape(planted, caplog):
    caplog.set_level(logging.INFO, logger="fusednorm")
    for _ in range(3):
        x = torch.randn(4, 64)
        fusednorm.add_layer_norm(x, x, 64, x_bias=torch.randn(64))
    assert len([r for r in caplog.records if "2.00 times as fast" in r.getMessage()]) == 1


def test_a_compiled_call_does_not_depend_on_measured_shapes(planted):
    counter = testing.CompileCounter()
    torch._dynamo.reset()
    run = torch.compile(
        lambda x, b: fusednorm.add_layer_norm(x, x, 64, x_bias=b)[0], backend=counter, fullgraph=True, dynamic=True
    )
    for rows in (4, 5, 700):
        run(torch.randn(rows, 64), torch.randn(64))
    assert counter.frame_count == 1


def test_a_gpus_table_is_named_by_its_architecture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    choice._architecture.cache_clear()
    assert choice.device_key(torch.device("cuda", 3)) == "sm_90" == crossovers.device_key(result())
    choice._architecture.cache_clear()


@pytest.mark.parametrize(("maker", "key"), [("amd", "cpu_amd"), ("intel", "cpu"), ("", "cpu")])
def test_a_cpus_table_is_named_by_its_maker(maker, key, monkeypatch):
    monkeypatch.setattr(cpu, "vendor", lambda: maker)
    here = choice.device_key(torch.device("cpu"))
    there = crossovers.device_key(result(device_type="cpu", vendor=maker, shortcut=_shortcut.load()[0] is not None))
    assert here == there == (key if _shortcut.load()[0] is not None else "cpu_without_shortcut")


# --- a damaged file ---

WHOLE = {"device": "a CPU", "source": "raw.json", "shapes": {"add_layer_norm/4/forward": [[4, 64, "torch", 2.0]]}}
DAMAGED = {
    "empty": "",
    "half": json.dumps(WHOLE)[:60],
    "no object": "[1, 2]",
    "null": "null",
    "no shapes": json.dumps({"device": "a CPU", "source": "raw.json"}),
    "no source": json.dumps({k: v for k, v in WHOLE.items() if k != "source"}),
    "shapes of another type": json.dumps(WHOLE | {"shapes": [1]}),
    "an entry too short": json.dumps(WHOLE | {"shapes": {"add_layer_norm/4/forward": [[4, 64, "torch"]]}}),
    "an entry of text": json.dumps(WHOLE | {"shapes": {"add_layer_norm/4/forward": [["4", "64", "torch", "2"]]}}),
    "an entry of zeros": json.dumps(WHOLE | {"shapes": {"add_layer_norm/4/forward": [[0, 0, "torch", 2.0]]}}),
    "no entries": json.dumps(WHOLE | {"shapes": {"add_layer_norm/4/forward": []}}),
    "deep": "[" * 100_000,
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    monkeypatch.setattr(_once, "_said", set())
    choice.forget()
    yield tmp_path / f"{choice.device_key(torch.device('cpu'))}.json"
    choice.forget()


def warned(file):
    """The warnings of three calls, after which it is as if there were no file."""
    x = torch.randn(4, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            choice.forget()  # other shapes of the same process
            fusednorm.add_layer_norm(x, x, 64)
            said = fusednorm.explain(fusednorm.add_layer_norm, x, x, 64)
    assert "measured" not in said
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("text", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_file_is_named_once_and_not_gone_by(text, file):
    file.write_text(text)
    (message,) = warned(file)
    assert str(file) in message and "order" in message


@pytest.mark.parametrize("kind", ["folder", "bytes"])
def test_a_file_that_cannot_be_read_is_named_once(kind, file):
    if kind == "folder":
        file.mkdir()
    else:
        file.write_bytes(b"\xff\xfe\x00{")
    (message,) = warned(file)
    assert str(file) in message


def test_a_whole_file_and_none_are_silent(file):
    assert not warned(file)
    file.write_text(json.dumps(WHOLE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.forget()
        assert "torch was measured to be 2.00 times as fast at 4 x 64" in served(4, 64, x_bias=None)[1]
