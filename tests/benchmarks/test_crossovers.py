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
from fusednorm.tuning import store

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


def small(eager, ours, provider="triton", dtype="bfloat16", op="layer_norm"):
    return record(op, (4, 64), "forward", provider, eager, ours, dtype)


def result(*records, **environment):
    return {"environment": DEVICE | environment, "cases": list(records)}


def winners(*results):
    """The provider of each shape measured."""
    steps = crossovers.table(results, ["raw.json"])["steps"]
    return {(name, r, c): choice.decisive(steps[name], r, c)[0].provider for name, r, c in crossovers.speeds(results)}


WINNERS = {  # results, and who wins at the one shape
    "the fastest provider": ([[small(90, 30)], [small(90, 45, "cpu")]], "triton"),
    "the kernel, where times are equal": ([[small(10, 10.1)]], "triton"),
    "by the slower of two dtypes of a size": ([[small(10, 5, dtype="float16"), small(10, 20)]], "torch"),
    "who was measured in every dtype": (
        [[small(10, 9, dtype="float16"), small(10, 9)], [small(10, 1, "cpu")]],
        "triton",
    ),
    "not eager dropout, with another mask": ([[small(10, 20, op="bias_dropout_add_layer_norm")]], "triton"),
    "nobody, without a figure": ([[small(10, 1) | {"status": "wrong", "variants": {}}]], None),
}


@pytest.mark.parametrize("which", WINNERS)
def test_who_wins_at_a_shape(which):
    results, provider = WINNERS[which]
    assert list(winners(*(result(*records) for records in results)).values()) == ([provider] if provider else [])


def test_each_direction_has_its_own_winner():
    slow = result(
        small(6, 12),
        record("layer_norm", (4, 64), "both", "triton", 60, 20),
        record("layer_norm", (4, 64), "backward", "triton", 60, 600),  # no call is a backward alone
    )
    assert winners(slow) == {("layer_norm/2/forward", 4, 64): "torch", ("layer_norm/2/both", 4, 64): "triton"}


def test_a_stumble_of_the_machine_decides_nothing():
    lucky = record("layer_norm", (1, 1024), "both", "triton", 70, 10)
    lucky["variants"]["eager"]["inclusive"][3] = 8e-6  # what eager takes when every thread has its core
    assert winners(result(lucky)) == {("layer_norm/2/both", 1, 1024): "triton"}
    unlucky = small(10, 70)
    unlucky["variants"]["fused"]["inclusive"][3] = 11e-6
    assert winners(result(unlucky)) == {("layer_norm/2/forward", 4, 64): "torch"}
    assert crossovers.speeds([result(unlucky)])["layer_norm/2/forward", 4, 64]["triton"] == pytest.approx(1 / 1.1)


NARROW = {(4, 16): (10, 20), (64, 16): (10, 20), (4096, 16): (20, 40)}
STEPS = {  # times of torch and Triton at each shape; the steps and their loss
    "a shape disturbed for all its samples decides nothing": (
        {(1, 1024): (80, 10), (4, 1024): (10, 20), (4096, 1024): (100, 10)},
        ([(1, 1, "torch"), (1, 131072, "triton")], 0.0),
    ),
    "each begins between two measured sizes": (
        {(1, 64): (10, 20), (4, 64): (10, 20), (16, 64): (20, 10), (64, 64): (40, 10)},
        ([(1, 1, "torch"), (1, 512, "triton")], 0.0),
    ),
    "narrow rows have their own": (
        NARROW | {(1, 64): (10, 5), (16, 64): (10, 5)},
        ([(1, 1, "torch"), (32, 1, "triton")], 0.0),
    ),
    "so have wide ones": (
        NARROW | {(1, 64): (10, 20), (16, 64): (10, 5), (1, 256): (10, 20), (16, 256): (10, 5)},
        ([(1, 1, "torch"), (32, 1, "torch"), (32, 512, "triton")], 0.0),
    ),
    "a small loss is none": ({(1, 64): (10, 10.4), (16, 64): (10, 5)}, ([(1, 1, "triton")], 0.04)),
    # shapes of one size, at which Triton and torch are the faster in turn
    "a loss that none avoid is stated": (
        {(1, 4096): (10, 5), (64, 64): (10, 10), (4, 1024): (10, 12), (16, 256): (10, 5), (256, 16): (10, 12)},
        ([(1, 1, "torch"), (32, 1, "triton")], 0.2),
    ),
    "a larger loss is one": ({(1, 64): (10, 10.6), (16, 64): (10, 5)}, ([(1, 1, "torch"), (1, 256, "triton")], 0.0)),
}


@pytest.mark.parametrize("which", STEPS)
def test_steps(which):
    times, (steps, loss) = STEPS[which]
    records = [record("layer_norm", shape, "forward", "triton", *pair) for shape, pair in times.items()]
    made = crossovers.table([result(*records)], ["raw.json"])
    assert made["steps"] == {"layer_norm/2/forward": steps}
    assert made["worst_loss"] == pytest.approx(loss, abs=2e-3)


def test_results_of_two_devices_are_refused():
    with pytest.raises(ValueError, match="several devices"):
        crossovers.table([result(), result(device="another")], [])


def test_command_says_what_changes_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choice, "FOLDER", tmp_path / "choice")
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps(result(small(6, 12))))
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
    if crossovers.is_tuned(results[0]):
        (result,) = results
        made, found = crossovers.tuned_table(result, *sources), store.speeds(crossovers.records_of(result))
        speeds = {(line, *place): speed for line, places in found.items() for place, speed in places.items()}
    else:
        made, speeds = crossovers.table(results, sources), crossovers.speeds(results)
    assert crossovers.text(made) == committed and len(committed.splitlines()) < 100
    assert table.worst_loss <= 0.06 and speeds
    for (name, rows, columns), speed in speeds.items():
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


def test_a_file_of_tune_makes_the_same_kind_of_table(tmp_path, monkeypatch, capsys):
    from fusednorm.dispatch import tuned
    from fusednorm.tuning import store
    from tests.helpers.tuning_records import record

    monkeypatch.setenv(tuned.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(crossovers.choice, "FOLDER", tmp_path / "measured")
    shapes = {"4x64": "torch", "16x64": "torch", "64x64": "cpu", "256x64": "cpu"}
    records = [record(shape, best, "cpu" if best == "torch" else "torch") for shape, best in shapes.items()]
    path = store.save(torch.device("cpu"), records)
    assert crossovers.main([str(path), "--write"]) == 0
    (written,) = (tmp_path / "measured").iterdir()
    made = json.loads(written.read_text())
    assert made["steps"] == {"add_layer_norm/4/forward": [[1, 1, "torch"], [1, 2048, "cpu"]]}
    assert made["worst_loss"] == 0.0 and made["device"] == tuned.cpu_name()
    assert crossovers.choice.table.__wrapped__(written.stem).steps == {
        "add_layer_norm/4/forward": [(1, 1, "torch"), (1, 2048, "cpu")]
    }
    with pytest.raises(SystemExit):
        crossovers.main([str(path), str(path)])
    assert "expected one file of `fusednorm tune`" in capsys.readouterr().err
