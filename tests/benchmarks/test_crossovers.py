"""From raw results to the crossovers that automatic choice goes by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.publish import crossovers
from benchmarks.report.files import read_result
from fusednorm.dispatch import crossovers as choice
from fusednorm.dispatch import fastpath
from fusednorm.providers.cpu import library as cpu

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
    """The provider of each shape measured."""
    steps = crossovers.table(results, ["raw.json"])["steps"]
    return {(name, r, c): choice.decisive(steps[name], r, c)[0].provider for name, r, c in crossovers.speeds(results)}


def line(times):
    """The steps for `layer_norm` without gradients, and their loss, by the times of torch and Triton at each shape."""
    records = [record("layer_norm", shape, "forward", "triton", *pair) for shape, pair in times.items()]
    made = crossovers.table([result(*records)], ["raw.json"])
    return made["steps"]["layer_norm/2/forward"], pytest.approx(made["worst_loss"], abs=2e-3)


def test_the_fastest_provider_of_a_shape_wins():
    triton = result(record("add_layer_norm", (4096, 1024), "forward", "triton", 90, 30))
    cpu = result(record("add_layer_norm", (4096, 1024), "forward", "torch", 90, 45))
    assert winners(triton, cpu) == {("add_layer_norm/2/forward", 4096, 1024): "triton"}


def test_each_direction_has_its_own_winner():
    slow = result(
        record("layer_norm", (4, 64), "forward", "triton", 6, 12),
        record("layer_norm", (4, 64), "both", "triton", 60, 20),
        record("layer_norm", (4, 64), "backward", "triton", 60, 600),  # no call is a backward alone
    )
    assert winners(slow) == {
        ("layer_norm/2/forward", 4, 64): "torch",
        ("layer_norm/2/both", 4, 64): "triton",
    }


def test_a_stumble_of_the_machine_decides_nothing():
    lucky = record("layer_norm", (1, 1024), "both", "triton", 70, 10)
    lucky["variants"]["eager"]["inclusive"][3] = 8e-6  # what eager takes when every thread has its core
    assert winners(result(lucky)) == {("layer_norm/2/both", 1, 1024): "triton"}
    lucky["variants"]["fused"]["inclusive"][5] = 9e-6
    unlucky = record("layer_norm", (4, 64), "both", "triton", 10, 70)
    unlucky["variants"]["fused"]["inclusive"][3] = 11e-6
    assert winners(result(unlucky)) == {("layer_norm/2/both", 4, 64): "torch"}
    assert crossovers.speeds([result(unlucky)])["layer_norm/2/both", 4, 64]["triton"] == pytest.approx(1 / 1.1)


def test_a_shape_disturbed_for_all_its_samples_decides_nothing():
    found = line({(1, 1024): (80, 10), (4, 1024): (10, 20), (4096, 1024): (100, 10)})
    assert found == ([(1, 1, "torch"), (1, 131072, "triton")], 0.0)


def test_each_step_begins_between_two_measured_sizes():
    found = line({(1, 64): (10, 20), (4, 64): (10, 20), (16, 64): (20, 10), (64, 64): (40, 10)})
    assert found == ([(1, 1, "torch"), (1, 512, "triton")], 0.0)


def test_narrow_rows_have_steps_of_their_own():
    narrow = {(4, 16): (10, 20), (64, 16): (10, 20), (4096, 16): (20, 40)}
    assert line(narrow | {(1, 64): (10, 5), (16, 64): (10, 5)}) == ([(1, 1, "torch"), (32, 1, "triton")], 0.0)
    steps, _ = line(narrow | {(1, 64): (10, 20), (16, 64): (10, 5), (1, 256): (10, 20), (16, 256): (10, 5)})
    assert steps == [(1, 1, "torch"), (32, 1, "torch"), (32, 512, "triton")]


def test_a_small_loss_is_no_step():
    assert line({(1, 64): (10, 10.4), (16, 64): (10, 5)}) == ([(1, 1, "triton")], 0.04)
    assert line({(1, 64): (10, 10.6), (16, 64): (10, 5)})[0] == [(1, 1, "torch"), (1, 256, "triton")]


def test_a_loss_that_no_steps_avoid_is_stated():
    """Shapes of one size, at which Triton and torch are the faster in turn."""
    contrary = {(1, 4096): (10, 5), (64, 64): (10, 10), (4, 1024): (10, 12), (16, 256): (10, 5), (256, 16): (10, 12)}
    steps, loss = line(contrary)
    assert steps[-1][2] == "triton" and loss == 0.2


def test_equal_times_leave_a_call_with_the_kernel():
    assert winners(result(record("layer_norm", (64, 64), "forward", "triton", 10, 10.1))) == {
        ("layer_norm/2/forward", 64, 64): "triton"
    }


def test_the_slower_of_two_dtypes_of_a_size_counts():
    both = result(
        record("layer_norm", (4, 64), "forward", "triton", 10, 5, "float16"),
        record("layer_norm", (4, 64), "forward", "triton", 10, 20, "bfloat16"),
    )
    assert winners(both) == {("layer_norm/2/forward", 4, 64): "torch"}


def test_a_provider_not_measured_in_every_dtype_is_no_candidate():
    whole = [record("layer_norm", (4, 64), "forward", "triton", 10, 9, dtype) for dtype in ("float16", "bfloat16")]
    half = record("layer_norm", (4, 64), "forward", "cpu", 10, 1)
    assert winners(result(*whole), result(half))["layer_norm/2/forward", 4, 64] == "triton"


def test_eager_dropout_is_no_candidate():
    lost = result(record("bias_dropout_add_layer_norm", (4, 64), "forward", "triton", 10, 20))
    assert winners(lost) == {("bias_dropout_add_layer_norm/2/forward", 4, 64): "triton"}


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
        "worst_loss": 0.0,
        "steps": {"layer_norm/2/forward": [[1, 1, "torch"]]},
    }
    capsys.readouterr()
    assert crossovers.main([str(raw)]) == 0
    assert "No step changes" in capsys.readouterr().out


COMMITTED = sorted(path.stem for path in choice.FOLDER.glob("*.json"))
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("device", COMMITTED)
def test_a_committed_table_is_made_from_raw_results_and_keeps_to_its_bound(device):
    table = choice.table(device)
    sources = table.source.split(", ")
    results = [read_result(ROOT / source) for source in sources]
    committed = (choice.FOLDER / f"{device}.json").read_text()
    assert crossovers.text(crossovers.table(results, sources)) == committed and len(committed.splitlines()) < 100
    assert table.worst_loss <= 0.06
    for (name, rows, columns), speed in crossovers.speeds(results).items():
        operation, itemsize, direction = name.split("/")
        found = choice.fastest(device, operation, int(itemsize), direction == "both", rows, columns)
        assert max(speed.values()) / speed[found.provider] - 1 <= table.worst_loss, (name, rows, columns)


def test_a_gpus_table_is_named_by_its_architecture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    choice._architecture.cache_clear()
    assert choice.device_key(torch.device("cuda", 3)) == "sm_90" == crossovers.device_key(result())
    choice._architecture.cache_clear()


@pytest.mark.parametrize(("maker", "key"), [("amd", "cpu_amd"), ("intel", "cpu"), ("", "cpu")])
def test_a_cpus_table_is_named_by_its_maker(maker, key, monkeypatch):
    monkeypatch.setattr(cpu, "vendor", lambda: maker)
    here = choice.device_key(torch.device("cpu"))
    there = crossovers.device_key(result(device_type="cpu", vendor=maker, shortcut=fastpath.load()[0] is not None))
    assert here == there == (key if fastpath.load()[0] is not None else "cpu_without_fastpath")
