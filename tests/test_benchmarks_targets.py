"""The table of targets: it follows the committed data, and says of planted results what they are."""

from __future__ import annotations

import json

import pytest
from test_benchmarks_kept import measured
from test_benchmarks_report import record

from benchmarks import keep, targets

LARGE = {"shape": (32768, 4096), "dtype": "bfloat16"}
STEP = {"op": "encoder_layer", "shape": (4, 2048, 1024), "dtype": "bfloat16", "direction": "both"}


def verdicts(*records, device="NVIDIA H200"):
    """Of each target that these records stand for: figure, case, how many, verdict."""
    rows = targets.rows(measured(*records, device=device))
    return {row[0]: tuple(row[2:]) for row in rows if row[-1] != "not measured"}


def the(found, beginning):
    """The one target whose text begins so."""
    (value,) = [value for text, value in found.items() if text.startswith(beginning)]
    return value


def test_table_follows_the_committed_data():
    """After a change of the raw data: PYTHONPATH=. python3 benchmarks/targets.py"""
    assert targets.TABLE.read_text(encoding="utf-8") == targets.page(keep.newest())


def test_nothing_measured_is_neither_met_nor_missed():
    rows = targets.rows(measured(record("bias_relu"), device="NVIDIA H200"))
    assert len(rows) == len(targets.GPU) and all(row[2:] == ["", "", "0", "not measured"] for row in rows)


@pytest.mark.parametrize(("seconds", "verdict"), [(9.6e-6, "met"), (9.4e-6, "MISSED")])
def test_share_of_the_copy(seconds, verdict):
    """Ours takes 10 us."""
    found = verdicts(record("add_layer_norm", roofline_seconds=seconds, **LARGE))
    assert found == {
        targets.GPU[0].text: (f"{seconds / 1e-5:.0%}", "add_layer_norm/forward/bfloat16/32768x4096", "1", verdict)
    }


def test_a_share_that_no_memory_can_have_counts_for_nothing():
    assert verdicts(record("add_layer_norm", roofline_seconds=3e-5, **LARGE)) == {}


@pytest.mark.parametrize("left_out", [{"shape": (1024, 4096)}, {"shape": (1 << 20, 64)}, {"dtype": "float32"}])
def test_small_or_narrow_rows_and_other_dtypes_are_not_meant(left_out):
    assert verdicts(record("add_layer_norm", **LARGE | left_out)) == {}


def test_the_worst_of_all_cases_decides():
    slow = record("rms_norm", shape=(64, 65536), eager=0.9)
    found = verdicts(record(shape=(64, 65536), eager=3.0), slow, record("rms_norm", shape=(1024, 65536), eager=1.2))
    assert found == {targets.GPU[5].text: ("0.90x", slow["name"], "3", "MISSED")}


def test_what_differs_by_less_than_the_spread_is_told_apart():
    found = verdicts(record(shape=(64, 65536), eager=0.99, spread=0.01))
    assert the(found, "LayerNorm and RMSNorm, every")[-1] == "within the spread"
    assert the(verdicts(record(shape=(64, 65536), eager=1.01)), "LayerNorm and RMSNorm, every")[-1] == "met"


@pytest.mark.parametrize(("more", "figure", "verdict"), [(1.5e-6, "+1.5 us", "met"), (3e-6, "+3.0 us", "MISSED")])
def test_host_time_is_a_difference_in_microseconds(more, figure, verdict):
    variants = {"fused": {"samples": [1e-6] * 11}, "eager": {"samples": [2e-6] * 11}}
    variants["fused"]["inclusive"], variants["eager"]["inclusive"] = [1e-5 + more] * 11, [1e-5] * 11
    found = verdicts(record(variants=variants))
    assert the(found, "their forward, host time less") == (figure, "layer_norm/forward/float32/4x64", "1", verdict)
    assert the(found, "the same, host time included")[-1] == "MISSED"  # by ratio it is slower, on the host
    assert the(found, "LayerNorm and RMSNorm under 1 MiB")[-1] == "met"  # and not on the device


def test_each_baseline_is_a_comparison_of_its_own():
    whole = record("bias_dropout_add_layer_norm", direction="both", eager=2.6, **LARGE)
    for name, times in (("compile", 1.4), ("compile-max-autotune", 1.2)):
        whole["variants"][name] = {"samples": [times * t for t in whole["variants"]["fused"]["samples"]]}
    found = verdicts(whole)
    assert the(found, "bias + dropout")[::3] == ("2.60x", "met")
    assert the(found, "the same, against torch.compile")[::2] == ("1.20x", "2")
    assert the(found, "the same, against torch.compile")[-1] == "MISSED"


@pytest.mark.parametrize(("kept", "figure", "verdict"), [(55, "55%", "met"), (70, "70%", "MISSED")])
def test_training_step_of_a_layer_and_what_it_keeps(kept, figure, verdict):
    found = verdicts(record(**STEP, eager=1.6, kept_bytes={"fused": kept, "eager": 100}))
    assert the(found, "training step")[0::3] == ("1.60x", "met")
    assert the(found, "what it keeps")[0::3] == (figure, verdict)


def test_median_over_a_cpus_sweep():
    three = [record("add_layer_norm", shape=(rows, 64), eager=e) for rows, e in ((8, 0.5), (16, 1.4), (32, 2.0))]
    found = verdicts(*three, device="a processor")
    assert the(found, "add + LayerNorm, median") == ("1.40x", "", "3", "met")
    assert the(found, "add + LayerNorm, worst") == ("0.50x", three[0]["name"], "3", "MISSED")


def test_table_of_a_run_is_printed(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(measured(record("add_layer_norm", eager=1.5))))
    assert targets.main([str(path)]) == 0
    assert " 1.50x | add_layer_norm/forward/float32/4x64 |" in capsys.readouterr().out


def test_check_tells_an_old_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(targets, "TABLE", tmp_path / "targets.md")
    assert targets.main(["--check"]) == 1 and targets.main([]) == 0 and targets.main(["--check"]) == 0
