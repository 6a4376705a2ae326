"""The command ``fusednorm bench``: what it times, what it checks before, and what it refuses."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from fusednorm import use_provider
from fusednorm.__main__ import main
from fusednorm.dispatch import settings
from fusednorm.tuning import bench, calls, eager
from fusednorm.tuning.calls import ATTENTIONS, OPERATION_NAMES, CallClass, build
from fusednorm.tuning.measure import results_of
from tests.helpers.tuning_records import CPU

SMALL = ["--shape", "8x64", "--device", "cpu", "--seconds", "0.1"]


def rows_of(arguments: list[str], capsys) -> tuple[int, list[dict]]:
    status = main(["bench", *arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)["cases"]


@pytest.mark.parametrize("operation", OPERATION_NAMES)
def test_eager_computes_what_ours_does(operation: str, monkeypatch):
    """Without dropout in both, since torch's masks are others."""
    for module in (calls, eager):
        monkeypatch.setattr(module, "P", 0.0)
    of = CallClass(operation, "float64", True, (2, 2, 8, 8, 16) if operation in ATTENTIONS else (6, 32))
    call = build(of, CPU)
    theirs = eager.eager(of, call, CPU)()
    ours = results_of(call, use_provider("reference"))
    assert len(theirs) == len(ours) > len(call.leaves)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operation", [name for name in OPERATION_NAMES if "dropout" in name])
def test_eager_drops_where_ours_does(operation: str):
    of = CallClass(operation, "float32", False, (64, 256))
    call = build(of, CPU)
    out = eager.eager(of, call, CPU)()[-1]
    residual = call.leaves[1] if operation.startswith("bias_dropout_add") else torch.zeros(())
    assert (out == residual).double().mean().item() == pytest.approx(calls.P, abs=0.02)


def test_the_table_has_both_directions_and_who_served(capsys):
    state = torch.get_rng_state()
    assert main(["bench", "add_rms_norm", "bias_act_dropout", *SMALL]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fusednorm ") and "beside eager PyTorch" in lines[0]
    assert lines[2].split()[:4] == ["operator", "shape", "dtype", "direction"]
    assert [line.partition("  ")[0] for line in lines[3:7]] == ["add_rms_norm"] * 2 + ["bias_gelu_dropout"] * 2
    assert "forward + backward" in lines[4] and "forward + backward" not in lines[3]
    assert "bias_gelu_dropout: dropout(gelu(x + bias)), p = 0.1." in lines


def test_the_json_has_times_ratio_and_interval(capsys):
    status, rows = rows_of(["layer_norm", *SMALL, "--dtype", "bf16", "--dtype", "fp64"], capsys)
    assert status == 0
    assert [(r["dtype"], r["direction"]) for r in rows] == [
        *(("bfloat16", way) for way in ("forward", "forward + backward")),
        *(("float64", way) for way in ("forward", "forward + backward")),
    ]
    for row in rows:
        assert row["shape"] == row["checked_shape"] == [8, 64]
        assert row["eager_us"] > 0 and row["ours_us"] > 0 and row["provider"] in ("cpu", "torch")
        low, high = row["interval"]
        assert low <= row["ratio"] <= high


def test_a_slow_provider_is_seen_to_be_slow(plant, capsys):
    with use_provider(plant("snail", "slow")):
        _, rows = rows_of(["add_layer_norm", *SMALL], capsys)
    for row in rows:
        assert row["provider"] == "snail" and row["ours_us"] > 2000 > row["eager_us"] and row["interval"][1] < 1


def test_a_wrong_result_is_not_timed(plant, capsys):
    with use_provider(plant("liar", "wrong")):
        assert main(["bench", "add_layer_norm", *SMALL]) == 1
    said = capsys.readouterr().out
    assert "Not timed:" in said and "its error against float64 is" in said and "times as fast" not in said


def test_what_memory_does_not_hold_is_not_timed(capsys):
    status, (forward, _) = rows_of(["rms_norm", "--shape", "4194304x4194304", "--device", "cpu"], capsys)
    assert status == 1 and "GB are free" in forward["fault"]


def test_large_cases_are_checked_on_fewer_rows(monkeypatch, capsys):
    monkeypatch.setattr(bench, "MOST_CHECKED", 100 * 64)
    _, rows = rows_of(["rms_norm", *SMALL, "--shape", "200x64"], capsys)
    assert [row["checked_shape"] for row in rows] == [[8, 64]] * 2 + [[64, 64]] * 2


def test_an_interrupt_shows_what_was_measured(monkeypatch, capsys):
    measured = bench.measured

    def interrupted(of, *args):
        if of.needs_grad:
            raise KeyboardInterrupt
        return measured(of, *args)

    monkeypatch.setattr(bench, "measured", interrupted)
    assert main(["bench", "rms_norm", *SMALL]) == 130
    said = capsys.readouterr().out.splitlines()
    assert said[3].startswith("rms_norm") and said[4] == "" and said[-1] == "The run was interrupted."


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_typical_cases_are_those_of_the_device(device: str):
    found = bench.chosen_classes(torch.device(device), (), (), ())
    assert {of.operation for of in found} == {*bench.TYPICAL_OPERATIONS}
    assert {of.dtype for of in found} == ({"float32"} if device == "cpu" else {"bfloat16"})
    assert len(found) == 4 * len(bench.TYPICAL_OPERATIONS) == len({*found})


def test_each_shape_goes_to_the_operators_that_take_it():
    shapes = [[2, 3, 64], [2, 8, 16, 64], [2, 8, 1, 16, 64]]
    found = bench.chosen_classes(CPU, ["norms", "attention"], shapes, [torch.float64])
    sizes = {(of.operation in ATTENTIONS, of.shape) for of in found}
    assert sizes == {(False, (6, 64)), (True, (2, 8, 16, 16, 64)), (True, (2, 8, 1, 16, 64))}
    only = bench.chosen_classes(CPU, (), shapes[:1], ())
    assert {of.operation for of in only} == {*bench.TYPICAL_OPERATIONS} - {*ATTENTIONS}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add_layernorm"], "did you mean add_layer_norm?"),
        (["varlen_attention"], "'varlen_attention' is none of layer_norm"),
        (["rms_norm", "--shape", "2x8x512x64"], "--shape: 2x8x512x64 is no shape of rms_norm; norms and activations"),
        (["attention", "--shape", "4096x64"], "attention takes batch x heads x length x head_dim, as 2x8x512x64"),
        (["rms_norm", "attention", "--shape", "4x64"], "--shape: none is given for attention; attention takes"),
        (["rms_norm", "--shape", "0x64"], "--shape: 0x64 is no shape of rms_norm"),
        (["--shape", "7"], "--shape: 7 is no shape of any operator"),
        (["--shape", "4,64"], "'4,64' is not a list of sizes joined by x"),
        (["--dtype", "int8"], "'int8' is none of float32"),
        (["--seconds", "0"], "'0' is no number of seconds above 0, as in 60"),
        (["--seconds", "soon"], "'soon' is no number of seconds above 0, as in 60"),
        (["--device", "nowhere"], "--device: "),
        (["--device", "meta"], "expected the CPU or a CUDA GPU, got meta"),
    ],
)
def test_arguments_that_are_wrong(arguments: list[str], words: str, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments])
    assert words in capsys.readouterr().err


def test_fewer_rows_are_checked_by_the_provider_that_is_timed(monkeypatch):
    """Automatic choice may take another one for them."""
    of, real, requested = CallClass("rms_norm", "float32", False, (4096, 64)), bench.results_of, []

    def results(call, request):
        with request:
            requested.append(settings.current.provider)
            return real(call, contextlib.nullcontext())

    monkeypatch.setattr(bench, "MOST_CHECKED", of.elements - 1)
    monkeypatch.setattr(bench, "prior", lambda asked, device: "torch" if asked == of else "reference")
    monkeypatch.setattr(bench, "results_of", results)
    case = bench.measured(of, CPU, bench.timer_for(CPU), 0.01)
    assert (case.fault, case.provider) == ("", "torch") and case.checked != of.shape
    assert requested and requested[2::3] == ["torch"] * (len(requested) // 3)


def test_a_report_says_only_what_was_done():
    of = CallClass("rms_norm", "float32", False, (4, 8))
    nothing = str(
        bench.Bench({"fusednorm": "0", "torch": "2", "device": "x"}, [bench.Case(of, fault="no")], None, False)
    )
    assert "compared with float64" not in nothing
    assert "Time that other processes took meanwhile: not known here." in nothing
    whole = bench.Case(of, "cpu", of.shape, 2.0, 1.0, (2.0, 1.9, 2.1))
    facts = {"fusednorm": "0", "torch": "2", "device": "x"}
    assert "fewer rows" not in str(bench.Bench(facts, [whole], 0.0, False))
    fewer = bench.Case(of, "cpu", (2, 8), 2.0, 1.0, (2.0, 1.9, 2.1))
    assert "compared on fewer rows, by the same provider" in str(bench.Bench(facts, [whole, fewer], 0.0, False))
