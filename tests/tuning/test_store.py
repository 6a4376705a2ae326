"""The user's file: what it holds, how it is written, and every reason not to use it."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fresh import python

import fusednorm
from fusednorm._once import _said
from fusednorm.dispatch import rules, tuned
from fusednorm.tuning import store
from tests.helpers.tuning_records import record

CPU = torch.device("cpu")


def chosen(rows: int, columns: int, function=fusednorm.add_layer_norm) -> str:
    x = torch.randn(rows, columns)
    tensors = (x, x) if function is fusednorm.add_layer_norm else (x,)
    return fusednorm.explain(function, *tensors, columns)


@pytest.fixture
def quiet():
    """No warning was given yet."""
    before = set(_said)
    _said.clear()
    yield
    _said.clear()
    _said.update(before)


def test_what_was_measured_decides_and_explain_cites_it(cache: Path):
    path = store.save(CPU, [record("8x64", "torch", "cpu"), record("64x64", "cpu")])
    assert path.parent == cache and path == tuned.path_of(CPU) and "threads" in path.name
    said = chosen(8, 64)
    assert said.startswith("add_layer_norm: torch")
    assert re.search(
        r"cpu is not used: torch was measured fastest, 1.50 times as fast as the next of cpu, at 8 x 64", said
    )
    assert str(path) in said
    assert chosen(64, 64).startswith("add_layer_norm: cpu")
    assert str(path) not in chosen(9, 64)  # two shapes are too few to decide over others


def test_steps_decide_between_measured_shapes():
    shapes = {"4x64": "torch", "16x64": "torch", "64x64": "torch", "1024x64": "cpu", "4096x64": "cpu"}
    store.save(CPU, [record(shape, best, "cpu" if best == "torch" else "torch", 2.0) for shape, best in shapes.items()])
    assert chosen(32, 64).startswith("add_layer_norm: torch") and chosen(2048, 64).startswith("add_layer_norm: cpu")
    assert "near 2048 x 64" in chosen(2048, 64).replace("\n", " ") or chosen(2048, 64).startswith("add_layer_norm: cpu")


def test_the_fast_path_goes_by_it_too(monkeypatch):
    x, weight, bias = torch.randn(16, 64), torch.ones(64), torch.zeros(64)

    def by_ours() -> bool:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiled:
            normed = fusednorm.layer_norm(x, 64, weight, bias)
        torch.testing.assert_close(normed, torch.layer_norm(x, (64,), weight, bias))
        return any("fusednorm_cpu" in event.name for event in profiled.events())

    shipped = by_ours()
    store.save(CPU, [record("16x64", "torch" if shipped else "cpu", operation="layer_norm")])
    fusednorm.layer_norm(x, 64)
    assert by_ours() is not shipped
    x = torch.randn(32, 64)
    assert by_ours() is shipped  # nothing was measured of this shape
    monkeypatch.setenv(tuned.SWITCH_VARIABLE, "0")
    rules.forget()
    x = torch.randn(16, 64)
    fusednorm.layer_norm(x, 64)
    assert by_ours() is shipped


def test_merged_with_what_was_there():
    store.save(CPU, [record("8x64", "torch", "cpu"), record("16x64", "cpu")])
    path = store.save(CPU, [record("8x64", "cpu"), record("32x64", "cpu")])
    assert [r["name"].split("/")[-1] for r in json.loads(path.read_text())["records"]] == ["8x64", "16x64", "32x64"]
    assert chosen(8, 64).startswith("add_layer_norm: cpu")
    assert not [p for p in path.parent.iterdir() if p.suffix not in (".json", ".lock")]


def test_requests_and_this_process_come_before_the_file():
    store.save(CPU, [record("8x64", "torch", "cpu")])
    with fusednorm.use_provider("cpu"):
        assert chosen(8, 64).startswith("add_layer_norm: cpu")
    tuned.process["cpu", "add_layer_norm/4/forward", 8, 64] = tuned.Point(
        "cpu", 1.2, ("cpu", "torch"), "in this process"
    )
    rules.forget()
    assert chosen(8, 64).startswith("add_layer_norm: cpu")


def damaged(path: Path, how: str) -> str:
    """Change a file, and the words that the warning has to have."""
    content = json.loads(path.read_text())
    if how == "no JSON":
        path.write_text(path.read_text()[:-40])
        return "cannot be read"
    if how == "a list":
        path.write_text("[1]")
        return "format is 'list'"
    if how == "another format":
        content["format"] = 99
    elif how in ("torch", "device", "threads", "fusednorm", "instructions"):
        content["machine"][how] = "another"
    elif how == "another provider":
        content["points"]["add_layer_norm/4/forward"][0][2] = "nobody"
    elif how == "a step that is none":
        content["steps"] = {"add_layer_norm/4/forward": [[5, 1, "cpu"]]}
    elif how == "a nonsense point":
        content["points"] = {"add_layer_norm/4/forward": [["8", 64, "cpu", 1.0]]}
    elif how == "no points":
        del content["points"]
    path.write_text(json.dumps(content))
    return {"another format": "format is 99", "torch": "measured with torch another"}.get(how, "not used")


MACHINE = ["torch", "device", "threads", "fusednorm", "instructions"]
CONTENT = [
    "no JSON",
    "a list",
    "another format",
    "another provider",
    "a step that is none",
    "a nonsense point",
    "no points",
]


@pytest.mark.parametrize("how", [*MACHINE, *CONTENT])
def test_a_file_that_does_not_fit_is_left_out_with_one_warning(how: str, quiet):
    path = store.save(CPU, [record("8x64", "torch", "cpu")])
    words = damaged(path, how)
    with pytest.warns(RuntimeWarning, match=re.escape(str(path))) as warned:
        rules.forget()
        assert chosen(8, 64).startswith("add_layer_norm: cpu")  # as shipped
    message = str(warned[0].message)
    assert words in message and "fusednorm tune" in message and "FUSEDNORM_TUNED=0" in message
    rules.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen(8, 64)
    before = path.read_text()
    store.save(CPU, [record("16x64", "cpu")])  # measured anew: what did not fit is replaced
    assert path.read_text() != before and [r["name"] for r in json.loads(path.read_text())["records"]] == [
        "add_layer_norm/float32/forward/16x64"
    ]


def test_a_folder_that_is_a_file(cache: Path):
    cache.write_text("in the way")
    with pytest.raises(store.CannotWrite, match="FUSEDNORM_CACHE_DIR"):
        store.save(CPU, [record("8x64", "cpu")])
    assert cache.read_text() == "in the way" and chosen(8, 64).startswith("add_layer_norm: cpu")


def test_a_full_disk_leaves_the_file_as_it_was(monkeypatch):
    path = store.save(CPU, [record("8x64", "cpu")])
    before = path.read_text()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(store.CannotWrite, match="No space left"):
        store.save(CPU, [record("16x64", "cpu")])
    assert path.read_text() == before and sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".lock"]


def test_no_home_folder_is_no_error(monkeypatch, quiet):
    monkeypatch.delenv(tuned.FOLDER_VARIABLE)

    def nowhere(*args, **kwargs):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("platformdirs.user_cache_dir", nowhere)
    with pytest.warns(RuntimeWarning, match="FUSEDNORM_CACHE_DIR"):
        rules.forget()
        assert chosen(8, 64).startswith("add_layer_norm: cpu")


def test_another_process_holds_the_lock(monkeypatch):
    import filelock

    path = store.save(CPU, [record("8x64", "cpu")])
    monkeypatch.setattr(store, "PATIENCE", 0.1)
    with filelock.FileLock(f"{path}.lock"), pytest.raises(store.CannotWrite, match="another process has held"):
        store.save(CPU, [record("16x64", "cpu")])


_WRITER = """
import sys, torch
from fusednorm.tuning import store
from tests.helpers.tuning_records import record
times = {"median": 10.0, "low": 9.0, "high": 11.0}
for rows in map(int, sys.argv[1:]):
    name = f"add_layer_norm/float32/forward/{rows}x64"
    record = {"name": name, "rejected": {}, "prior": "torch", "providers": {"cpu": times}, "best": "cpu", "ratios": {}}
    store.save(torch.device("cpu"), [record])
"""


def test_two_processes_at_once_lose_nothing():
    rows = [[str(8 * i + k) for i in range(1, 9)] for k in (0, 1)]
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, *some]) for some in rows]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    kept = json.loads(tuned.path_of(CPU).read_text())["records"]
    assert len(kept) == 16


def test_a_process_without_kernels_for_gpus_keeps_and_reads_it():
    program = f"""
import torch, fusednorm
from fusednorm.tuning import store
store.save(torch.device("cpu"), [{record("8x64", "torch", "cpu")}])
x = torch.randn(8, 64)
print(fusednorm.explain(fusednorm.add_layer_norm, x, x, 64))
"""
    assert python("-c", program).startswith("add_layer_norm: torch")


def test_a_new_process_reads_it():
    store.save(CPU, [record("8x64", "torch", "cpu")])
    program = (
        "import torch, fusednorm; x = torch.randn(8, 64); print(fusednorm.explain(fusednorm.add_layer_norm, x, x, 64))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.startswith("add_layer_norm: torch")


@pytest.mark.parametrize("function", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_what_is_torchs_the_fast_path_gives_as_eager_does(
    function: str, dtype: torch.dtype, grad: bool, with_weight: bool
):
    x, residual = (torch.randn(8, 64, dtype=dtype, requires_grad=grad) for _ in range(2))
    weight = torch.randn(64, dtype=dtype, requires_grad=grad) if with_weight else None
    norm = torch.nn.functional.rms_norm if "rms" in function else torch.nn.functional.layer_norm
    adds = function.startswith("add_")
    tuned.process["cpu", tuned.line(function, dtype.itemsize, grad), 8, 64] = tuned.Point("torch", 1.1, (), "here")
    rules.forget()
    ours = getattr(fusednorm, function)
    tensors = (x, residual) if adds else (x,)

    def both(call) -> list[torch.Tensor]:
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [t for t in (*tensors, weight) if t is not None]
        return [*outputs, *(torch.autograd.grad([o.sum() for o in outputs], leaves) if grad else ())]

    def eager():
        z = residual + x if adds else x
        normed = norm(z, (64,), weight)
        return (normed, z) if adds else normed

    both(lambda: ours(*tensors, 64, weight))  # the fast path serves from the second call on
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiled:
        found = both(lambda: ours(*tensors, 64, weight))
    assert not any("fusednorm_cpu" in event.name for event in profiled.events())
    assert all(torch.equal(a, b) for a, b in zip(found, both(eager), strict=True))
