"""The table of targets: it follows the committed data, and says of planted results what they are."""

from __future__ import annotations

import types
from itertools import pairwise

import pytest
import torch

from benchmarks import measure, run
from benchmarks.baselines import BASELINES
from benchmarks.cases import targets as cases_targets
from benchmarks.publish import add_result, targets
from tests.benchmarks.test_kept import measured
from tests.benchmarks.test_report import record

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


@pytest.fixture(scope="module")
def kept():
    return add_result.newest(for_targets=True)


def test_table_follows_the_committed_data(kept):
    """After a change of the raw data: python3 -m benchmarks.publish.targets"""
    assert targets.TABLE.read_text(encoding="utf-8") == targets.page(kept)


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


@pytest.mark.parametrize(
    "left_out", [{"shape": (1024, 4096)}, {"shape": (1 << 20, 64)}, {"dtype": "float32"}, {"roofline_seconds": 3e-5}]
)
def test_small_or_narrow_rows_and_other_dtypes_and_shares_that_no_memory_can_have_are_not_meant(left_out):
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
    three = [record("add_layer_norm", shape=(rows, 64), eager=e) for rows, e in ((8, 0.5), (16, 1.75), (32, 2.0))]
    found = verdicts(*three, device="a processor")
    assert the(found, "add + LayerNorm, float32, median") == ("1.75x", "", "3", "met")
    assert the(found, "add + LayerNorm, worst") == ("0.50x", three[0]["name"], "3", "MISSED")


def test_check_tells_an_old_table(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "TABLE", tmp_path / "targets.md")
    monkeypatch.setattr(add_result, "newest", lambda for_targets: kept)
    assert targets.main(["--check"]) == 1 and targets.main([]) == 0 and targets.main(["--check"]) == 0


# --- the sweep that measures what the targets are about ---


def stand_in(case, baselines):
    """A record of the case as it comes from a GPU, with those of the baselines that run.py would compare it with."""
    made = record(case.op, case.shape, case.dtype, case.direction, input_bytes=case.input_bytes)
    names = [name for name in ("eager", *baselines) if cases_targets.compares(case, name)]
    samples = dict(made["variants"]["eager"])
    made["variants"] = {name: samples | {"inclusive": samples["samples"]} for name in ("fused", *names)}
    return made | ({"kept_bytes": {"fused": 1, "eager": 2}} if case.op == "encoder_layer" else {})


@pytest.mark.parametrize("libraries", [False, True], ids=["torch_alone", "with_peers"])
def test_every_target_of_a_gpu_is_measured_by_its_sweep(libraries):
    default = run.parse(["--baselines", "peers,compile", "--device", "cpu"]).baselines
    there = [name for name in default if libraries or BASELINES[name][0] is None]
    of = measured(*(stand_in(case, there) for case in cases_targets.every()), device="NVIDIA H200")
    missing = [row[0] for row in targets.rows(of) if row[-1] == "not measured"]
    assert missing == [text for text in (t.text for t in targets.GPU) if "quack" in text and not libraries]


def test_nothing_is_measured_that_no_target_is_about():
    """Neither a case nor a baseline of one."""

    def comparisons(made):
        return sum(len(list(target.figures(made))) for target in targets.GPU)

    for case in cases_targets.every():
        made = stand_in(case, BASELINES)
        for name in made["variants"].keys() - {"fused", "eager"}:
            fewer = {key: value for key, value in made["variants"].items() if key != name}
            assert comparisons(made | {"variants": fewer}) < comparisons(made), (case.name, name)
        assert comparisons(made), case.name


def test_the_sweep_fits_minutes_and_begins_with_what_matters():
    chosen, groups = cases_targets.every(), cases_targets.GROUPS
    sizes = {"add": 21, "epilogue": 6, "attention": 12, "layer": 1, "plain": 480}
    assert {name: len(cases) for name, cases in groups.items()} == sizes
    assert len({case.name for case in chosen}) == len(chosen) <= 570
    assert [case.op for case in chosen[:21]] == ["add_layer_norm"] * 21
    assert {case.input_bytes for case in groups["add"] + groups["epilogue"]} == {64 << 20, 256 << 20}
    assert max(case.memory_needed for case in chosen) < 0.8 * (75 << 30)  # run.py leaves out what may not fit
    dtypes = [case.dtype for case in groups["plain"]]
    assert dtypes == sorted(dtypes, key=["bfloat16", "float16", "float32"].index)
    first = [case.shape for case in groups["plain"][4 : 4 + 18 * 4]]  # the tiny shape before them, four cases a shape
    assert {rows for rows, _ in first} == {1, 64, 1024, 4096, 65536}
    assert {width for _, width in first} == {1 << n for n in (6, 8, 10, 12, 13, 14, 15, 16, 18)}


def test_cases_that_share_inputs_and_float64_results_follow_one_another():
    keys = [(case.op, case.shape, case.dtype) for case in cases_targets.every()]
    changes = 1 + sum(a != b for a, b in pairwise(keys))
    assert changes == len(set(keys)) < len(keys)


@pytest.fixture
def nothing_measured(monkeypatch):
    """All of a run but the cases, of which each test makes records."""
    monkeypatch.setattr(run, "progress", iter)
    monkeypatch.setattr(measure, "available_memory", lambda device: None)
    monkeypatch.setattr(measure, "measure_roofline", lambda *_: measure.Roofline(((1, 1.0),), {}))


def test_only_what_its_target_names_runs_beside_a_case(nothing_measured, monkeypatch):
    arguments = run.parse(["--device", "cpu", "--baselines", "peers,compile"])
    arguments.level = "targets"  # as on a GPU
    beside, resets = {}, []

    def noted(case, device, timer, roofline, baselines, seconds):
        beside.setdefault(case.op, set()).add(tuple(baselines))
        return stand_in(case, baselines)

    monkeypatch.setattr(run, "run_case", noted)
    monkeypatch.setattr(torch, "_dynamo", types.SimpleNamespace(reset=lambda: resets.append(1)))
    result = run.run(arguments, cases_targets.every(), torch.device("cpu"), {})
    assert len(result["cases"]) == len(cases_targets.every()) and result["left_out"] == {}
    attention = {("eager", "sdpa-flash", "sdpa-cudnn")}
    assert beside == {
        "add_layer_norm": {("eager",)},
        "bias_dropout_add_layer_norm": {("eager", "compile")},
        "attention": attention,
        "attention_causal": attention,
        "encoder_layer": {("eager", "compile")},
        **{name: {("eager",)} for name in targets.NORMS},  # no other library without a GPU
    }
    assert len(resets) == 7


def test_what_the_time_was_too_short_for_is_named(nothing_measured, monkeypatch):
    arguments = run.parse(["--device", "cpu", "--limit", "50"])
    arguments.level, clock = "targets", [0.0]

    def ten_seconds(case, *_):
        clock[0] += 10
        return stand_in(case, ["eager"])

    monkeypatch.setattr(run, "run_case", ten_seconds)
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    result = run.run(arguments, cases_targets.every(), torch.device("cpu"), {})
    assert [r["op"] for r in result["cases"]] == ["add_layer_norm"] * 6
    assert set(result["left_out"].values()) == {"time was up (50 s)"} and len(result["left_out"]) == 514


def test_a_cpus_targets_are_about_its_default_sweep(capsys):
    arguments = run.parse(["--targets", "--device", "cpu"])
    assert (arguments.level, arguments.baselines) == ("default", list(run.PEERS))
    assert run.main(["--targets", "--device", "cpu", "--list", "--only", "^add_layer_norm"]) == 0
    listed = {line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]}
    assert len(listed) == 42 and "add_layer_norm/both/float16/4x262144" in listed


@pytest.mark.parametrize("asked", [None, "none", "all"])
def test_baselines_of_the_targets_on_a_gpu(asked, monkeypatch):
    monkeypatch.setattr(measure, "best_device", lambda: torch.device("cuda", 0))
    arguments = run.parse(["--targets", *(["--baselines", asked] if asked else [])])
    assert arguments.level == "targets"
    compiled = [name for name in arguments.baselines if name.startswith("compile")]
    assert compiled == {None: ["compile"], "none": [], "all": ["compile", "compile-max-autotune"]}[asked]
