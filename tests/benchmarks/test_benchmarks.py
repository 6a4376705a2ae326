"""A run of the benchmark: verdicts, timers, comparison, report, planted providers; no GPU needed."""

import json
import re
import runpy
import sys
import time
import types
from unittest import mock

import pytest
import torch

import fusednorm
from benchmarks import baselines, cases, measure, run
from benchmarks.cases import OPS, Case
from benchmarks.report import pages as report
from fusednorm.dispatch import rules, tuned
from fusednorm.providers.reference import norm as reference
from fusednorm.tuning import store
from tests.helpers import dispatching, tuning_records

pytestmark = pytest.mark.usefixtures("ordinary_memory")
CPU = torch.device("cpu")
SMALL = "^(layer_norm|bias_dropout_add_rms_norm)/.*4x64"
FAST = ["--device", "cpu", "--threads", "1", "--seconds", "0.02", "--baselines", "none", "--quick"]
FORWARD, BACKWARD = "add_layer_norm_fwd", "add_layer_norm_bwd"


def test_run_writes_samples_environment_and_page(tmp_path):
    assert run.main([*FAST, "--only", SMALL, "--report", str(tmp_path)]) == 0
    result, page = json.loads((tmp_path / "benchmark.json").read_text()), (tmp_path / "benchmark.md").read_text()
    chosen = [case.name for case in cases.sweep("cpu", "quick") if re.match(SMALL, case.name)]
    assert [record["name"] for record in result["cases"]] == chosen and len(chosen) == 8
    for record in result["cases"]:
        assert record["status"] == "measured" and set(record["variants"]) == {"fused", "eager"}
        for variant in record["variants"].values():
            assert sum(0 < s < 1 for s in variant["samples"]) >= measure.SLOW_ROUNDS
        assert record["provider"] in fusednorm.available_providers()
        assert 0 < record["roofline_seconds"] < 1 and record["name"] in page
    assert result["environment"]["torch"] == torch.__version__
    assert result["environment"].keys() >= {"device", "triton", "python", "commit", "date", "load"}
    assert result["method"]["threads"] == 1
    assert set(result["baselines"]["absent"]) == set(baselines.BASELINES) - {"eager"}


@pytest.mark.parametrize("there", [False, True], ids=["no_file", "a_file"])
def test_untuned_is_ours_without_the_users_file(there, tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(tuned.SWITCH_VARIABLE)
    served, raw = [], tmp_path / "raw.json"
    if there:
        store.save(CPU, [tuning_records.record("4x64", "torch", "cpu")])
        ours = fusednorm.add_layer_norm
        noted = mock.Mock(side_effect=lambda *a, **k: served.append(tuned.file(CPU)) or ours(*a, **k))
        monkeypatch.setattr(fusednorm, "add_layer_norm", noted)
    rules.forget()
    arguments = [*FAST, "--only", "^add_layer_norm/forward/float32/4x64", "--baselines", "untuned", "--json", str(raw)]
    assert run.main(arguments) == 0
    result = json.loads(raw.read_text())
    (of,) = result["cases"]
    assert ("untuned" in of["variants"]) == there
    if there:
        assert of["provider"] == "torch" and None in served and any(served)
    else:
        assert "no file of `fusednorm tune`" in result["baselines"]["absent"]["untuned"]
    monkeypatch.undo()
    rules.forget()


def test_a_case_without_memory_costs_the_others_nothing(monkeypatch, tmp_path, capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(fusednorm, "layer_norm", mock.Mock(side_effect=error))
    raw = tmp_path / "raw.json"
    assert run.main([*FAST, "--only", "^(layer|rms)_norm/.*float32/4x64", "--json", str(raw)]) == 0
    found = {r["name"].split("/")[0]: (r["status"], len(r["variants"])) for r in json.loads(raw.read_text())["cases"]}
    assert found == {"layer_norm": ("out of memory", 0), "rms_norm": ("measured", 2)}
    assert "Tried to allocate 2.00 GiB" in capsys.readouterr().out


def test_wrong_dropout_mask_is_noticed(monkeypatch):
    real = fusednorm.add_layer_norm
    monkeypatch.setattr(fusednorm, "add_layer_norm", lambda *a, seed, **k: real(*a, seed=(seed or 0) + 1, **k))
    assert not measure.check(Case("bias_dropout_add_layer_norm", (4, 64), "float32", "forward"), CPU).ok


@pytest.mark.parametrize("op", OPS)
def test_check_accepts_the_hand_written_reference(op):
    with fusednorm.use_provider("reference"):
        families = {"attention": cases.TINY_ATTENTION, "layer": cases.TINY_LAYER, "adaptive": cases.TINY_ADAPTIVE}
        shape = families.get(OPS[op].family, cases.TINY)
        verdict = measure.check(Case(op, shape, "bfloat16", "both"), CPU)
    assert verdict.ok, verdict.detail


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.family == "layer"])
def test_wrong_layer_is_noticed(op, monkeypatch):
    """One that leaves out a bias, deep inside."""

    def without(forward):
        def call(self, *args, **kwargs):
            with mock.patch.dict(self.linear1._parameters, bias=0 * self.linear1.bias):
                return forward(self, *args, **kwargs)

        return call

    case = Case(op, cases.TINY_LAYER, "float32", "both")
    assert measure.check(case, CPU).ok
    for layer in (fusednorm.TransformerEncoderLayer, fusednorm.TransformerDecoderLayer):
        monkeypatch.setattr(layer, "forward", without(layer.forward))
    assert not measure.check(case, CPU).ok


def test_a_layer_drops_elements_when_it_is_timed_and_not_when_it_is_checked():
    op = OPS["encoder_layer"]
    leaves = measure.problem(Case(op.name, cases.TINY_LAYER, "float32", "both"), CPU).leaves
    checked = [op.fused(leaves, seed=0)()[0] for _ in range(2)]
    timed = [op.fused(leaves)()[0] for _ in range(2)]
    assert torch.equal(*checked) and not torch.equal(*timed)
    assert not torch.equal(op.eager(leaves)()[0], op.eager(leaves)()[0])


@pytest.mark.parametrize(
    "op", [name for name, op in OPS.items() if getattr(op, "activation", "") == "relu" and op.family == "layer"]
)
def test_no_relu_of_a_measured_layer_is_near_its_kink(op, monkeypatch):
    """Where one rounding turns a hidden unit of one token on, gradients differ by more than any budget."""
    relu, hidden = torch.nn.functional.relu, []
    op = OPS[op]
    leaves = measure.problem(Case(op.name, (4, 32, 128), "float32", "both"), CPU).leaves
    monkeypatch.setattr(torch.nn.functional, "relu", lambda u: relu(hidden.append(u) or u))
    op.twin(leaves, None)
    assert len(hidden) == 1 and hidden[0].shape == (4, 32, 512)
    assert hidden[0].abs().min() > 0.1 and 0.2 < (hidden[0] > 0).double().mean() < 0.8


def test_kept_bytes_of_a_layer_count_each_storage_once():
    op = OPS["encoder_layer"]
    leaves = measure.problem(Case(op.name, cases.TINY_LAYER, "float32", "both"), CPU).leaves
    for leaf in leaves.values():
        leaf.requires_grad_()
    x = torch.randn(3, 5)
    assert op.kept_bytes(leaves, lambda: ((leaves["x"] * 2).exp().exp(),)) == 2 * 4 * leaves["x"].numel()
    assert op.kept_bytes({**leaves, "y": x}, lambda: (leaves["linear1.bias"].sum() * x,)) == 0  # an input's own
    assert 0 < op.kept_bytes(leaves, op.fused(leaves)) < op.kept_bytes(leaves, op.eager(leaves))


def test_cpu_timer_interleaves_and_orders_what_differs():
    order = []

    def spin(name, seconds):
        def call():
            order.append(name)
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        return call

    found = measure.CpuTimer().measure({"a": spin("a", 3e-4), "b": spin("b", 9e-4)}, 0.02)
    assert report.ratio({"variants": {"fused": found["a"], "eager": found["b"]}})[0] > 1.5
    rounds = order[-2 * len(found["a"]["samples"]) :]
    pairs = {tuple(rounds[i : i + 2]) for i in range(0, len(rounds), 2)}
    assert pairs == {("a", "b"), ("b", "a")}


def test_what_is_left_out_is_named(monkeypatch, tmp_path):
    raw = tmp_path / "raw.json"
    arguments = [*FAST, "--only", "^layer_norm/forward/float32/", "--json", str(raw)]
    monkeypatch.setattr(measure, "available_memory", lambda device: 1 << 20)
    assert run.main(arguments) == 0
    found = json.loads(raw.read_text())
    assert set(found["left_out"]) == {f"layer_norm/forward/float32/{s}" for s in ("64x1024", "1024x1024")}
    assert run.main([*arguments, "--limit", "1e-9"]) == 1
    assert "time was up" in json.loads(raw.read_text())["left_out"]["layer_norm/forward/float32/4x64"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "("], "no regular expression"),
        (["--baselines", "liger"], "unknown 'liger'"),
        (["--compare", "absent.json"], "FileNotFoundError"),
        (["--report", "{file}"], "file"),
        (["--json", "{file}/x.json"], "file"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_measured(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("it measured first"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        run.main(["--device", "cpu", *(word.format(file=tmp_path / "file") for word in arguments)])
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_lists_its_cases_from_a_checkout(capsys, monkeypatch):
    assert run.main(["--only", "no such operation"]) == 2
    assert "--list" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--list", "--only", "^rms_norm/forward/float32"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(run.__file__, run_name="__main__")
    line = next(line for line in capsys.readouterr().out.splitlines() if "/4x64 " in line)
    assert ended.value.code == 0 and line.split()[1::2] == ["rms_norm/forward/float32/4x64", "2304", "1024", "0.44"]


# --- planted providers, measured from end to end: a slow one is flagged, a wrong one gets no figure ---


@pytest.fixture
def plant(monkeypatch):
    """Puts the reference into the table under the name `planted`, with ops of one's own in place of some of its."""

    def replace(**ops):
        module = types.ModuleType("fusednorm_test_benchmarks_planted")
        own = {FORWARD: getattr(reference, FORWARD), BACKWARD: getattr(reference, BACKWARD)}
        vars(module).update(own | ops, unavailable_reason=lambda: None, refusal=lambda op, *args: None)
        dispatching.plant(monkeypatch, "planted", module)

    return replace


def measured(only, raw, *options):
    """The exit status of a run with the planted provider, and its records by name."""
    status = run.main([*FAST, "--provider", "planted", "--only", only, "--json", str(raw), *map(str, options)])
    return status, {record["name"]: record for record in json.loads(raw.read_text())["cases"]}


def slow(op):
    def waiting(*args):
        time.sleep(1e-2)
        return getattr(reference, op)(*args)

    return waiting


@pytest.mark.parametrize(("op", "direction"), [(FORWARD, "forward"), (BACKWARD, "both")])
def test_a_kernel_that_became_slow_is_flagged(op, direction, plant, tmp_path, capsys):
    name = f"rms_norm/{direction}/float32/4x64"
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    rounds = ("--seconds", 0.6)  # many: the interval of a few samples holds what a busy machine does to one of them
    plant()
    status, records = measured(f"^{name}$", before, *rounds)
    assert status == 0 and records[name]["provider"] == "planted"
    assert "Compared" not in capsys.readouterr().out
    plant(**{op: slow(op)})
    status, records = measured(f"^{name}$", after, "--compare", before, *rounds)
    assert status == 3
    assert min(records[name]["variants"]["fused"]["samples"]) > 1e-2
    out = capsys.readouterr().out
    assert "1 changed beyond the spread, 1 for the worse." in out
    assert [name in line for line in out.splitlines() if "SLOWER" in line] == [True]
    plant()
    assert measured(f"^{name}$", before, "--compare", after, *rounds)[0] == 0  # faster again: no regression
    assert "1 changed beyond the spread, 0 for the worse." in capsys.readouterr().out


def spoiled(op, index, spoil):
    """An op whose result number `index` is spoiled."""

    def wrong(*args):
        results = list(getattr(reference, op)(*args))
        results[index] = spoil(results[index])
        return tuple(results)

    return wrong


def one_element(t):
    if not t.numel():
        return t
    t = t.clone()
    t.view(-1)[-1] += 0.25
    return t


WRONG = {
    "normed": (FORWARD, spoiled(FORWARD, 0, one_element)),
    "residual_out": (FORWARD, spoiled(FORWARD, 1, one_element)),
    "NaN": (FORWARD, spoiled(FORWARD, 0, lambda t: t * float("nan"))),
    "dx": (BACKWARD, spoiled(BACKWARD, 0, one_element)),
    "dresidual": (BACKWARD, spoiled(BACKWARD, 1, one_element)),
    "dweight": (BACKWARD, spoiled(BACKWARD, 2, one_element)),
    "dbias": (BACKWARD, spoiled(BACKWARD, 3, lambda t: 2 * t)),
    "dx_bias": (BACKWARD, spoiled(BACKWARD, 4, one_element)),
    "no launch": (FORWARD, mock.Mock(side_effect=RuntimeError("launch failed"))),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_provider_gets_no_figure(fault, plant, tmp_path, capsys):
    op, wrong = WRONG[fault]
    plant(**{op: wrong})
    status, records = measured("^bias_dropout_add_layer_norm/.*/float32/4x64$", tmp_path / "raw.json")
    assert status == 1
    forward, both = (records[f"bias_dropout_add_layer_norm/{d}/float32/4x64"] for d in ("forward", "both"))
    verdict = "failed" if fault == "no launch" else "wrong"
    assert (both["status"], both["variants"]) == (verdict, {})
    expected = ("measured", True) if op == BACKWARD else (verdict, False)
    assert (forward["status"], bool(forward["variants"])) == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if "_layer_norm/both" in line]
    assert lines and all(verdict.upper() in line and " us" not in line for line in lines)
    said = {"NaN": "max|normed - fp64|", "no launch": "RuntimeError: launch failed"}.get(fault, f"max|{fault} - fp64|")
    assert all(said in line for line in lines)


def test_a_kernel_that_became_wrong_is_flagged_and_has_no_figure(plant, tmp_path, capsys):
    only, before = "^rms_norm/forward/float32/4x64$", tmp_path / "before.json"
    plant()
    assert measured(only, before)[0] == 0
    plant(**{FORWARD: spoiled(FORWARD, 0, one_element)})
    status, records = measured(only, tmp_path / "after.json", "--compare", before)
    assert status == 1 and [record["variants"] for record in records.values()] == [{}]
    said = capsys.readouterr().out.rpartition("Compared")[2]
    assert "1 changed beyond the spread, 1 for the worse." in said and "WRONG" in said.partition("Conclusion")[0]
