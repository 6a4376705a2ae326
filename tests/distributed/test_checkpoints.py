"""Checkpoints of torch.distributed.checkpoint: between numbers of processes and strategies, and after a fault.

The example is run as its users run it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fresh import ROOT
from processes import wait_for
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import examples.distributed as example

EXAMPLE = [str(ROOT / "examples" / "distributed.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ALONE = "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"  # it loads in one process


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


def finished(*command: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    command = (*TORCHRUN, *command)
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment(), cwd=ROOT)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def make(strategy: str | None) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 9)  # what is loaded replaces it
    model = example.LanguageModel(width=32, layers=1)
    if strategy is not None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = example.parallelize(model, strategy, mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        tensors = {"": parameter, **optimizer.state[parameter]}
        for key, tensor in tensors.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found[f"{name.removeprefix('module.')}.{key}"] = whole.detach().clone()
    return found


def train_and_save(folder: Path, strategy: str) -> dict[str, torch.Tensor]:
    model, optimizer = make(strategy)
    for step in range(2):
        example.loss_of(model, example.batch(step, 0, 2, torch.device("cpu"))).backward()
        optimizer.step()
    example.save(folder, 2, model, optimizer)
    return state(model, optimizer)


def load(folder: Path, strategy: str | None) -> tuple[int, dict[str, torch.Tensor]]:
    model, optimizer = make(strategy)
    return example.resume(folder, model, optimizer), state(model, optimizer)


@pytest.mark.filterwarnings(ALONE)
@pytest.mark.parametrize(("saver", "loader"), [("tp", "fsdp"), ("fsdp", "tp"), ("ddp", "tp")])
def test_a_checkpoint_of_two_processes_loads_into_four_and_into_one(two, four, tmp_path, saver, loader):
    saved = two(train_and_save, tmp_path, saver)[0]
    assert len(saved) == 4 * len(list(example.LanguageModel(layers=1).parameters()))  # with AdamW's step and moments
    for step, loaded in [*four(load, tmp_path, loader), load(tmp_path, None)]:
        assert step == 2 and loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)


@pytest.mark.filterwarnings(ALONE)
def test_a_key_that_a_checkpoint_lacks_is_named(two, tmp_path):
    two(train_and_save, tmp_path, "ddp")
    model, optimizer = make(None)
    model.last.register_parameter("x_bias", torch.nn.Parameter(torch.zeros(32)))
    optimizer.add_param_group({"params": [model.last.x_bias]})
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: \S*last\.x_bias"):
        example.resume(tmp_path, model, optimizer)


def one_of_two(rank: int, port: str, folder: Path) -> subprocess.Popen[str]:
    """What torchrun starts, without torchrun, which itself would end the others."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    variables = environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    options = ["--strategy", "fsdp", "--steps", "100000", "--save-every", "2", "--checkpoint", str(folder)]
    command = [sys.executable, *EXAMPLE, *options, "--timeout", "30"]
    return subprocess.Popen(command, env=variables, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_killed_process_ends_the_others_and_the_last_checkpoint_loads(tmp_path):
    port = free_port()
    processes = [one_of_two(rank, port, tmp_path) for rank in range(2)]
    try:
        wait_for(lambda: len(list(tmp_path.glob("step-*/.metadata"))) > 1, seconds=120)
        processes[1].send_signal(signal.SIGKILL)
        fault = processes[0].communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    processes[1].stderr.close()
    assert processes[0].returncode > 0
    assert re.search(r"Connection (closed|reset) by peer|Broken pipe", fault), fault[-2000:]
    # it goes on from the newest checkpoint that is complete, under another strategy
    last = max(int(path.parent.name.removeprefix("step-")) for path in tmp_path.glob("step-*/.metadata"))
    options = ["--strategy", "tp", "--steps", str(last + 2), "--checkpoint", str(tmp_path)]
    run = finished("--nproc-per-node", "2", "--master-port", free_port(), *EXAMPLE, *options)
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"tp, 2 processes, steps {last} to {last + 2}: loss" in run.stdout
    assert (tmp_path / f"step-{last + 2}" / ".metadata").exists()


def test_torchrun_tells_how_many_processes_have_come():
    meeting = ["--master-addr", "127.0.0.1", "--master-port", free_port(), "--rdzv-conf", "timeout=3"]
    run = finished("--nnodes", "2", "--node-rank", "0", "--nproc-per-node", "1", *meeting, *EXAMPLE)
    assert run.returncode != 0 and "1/2 clients joined" in run.stderr


def test_the_example_without_torchrun_says_how_to_start_it(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit, match=r"torchrun --nproc-per-node 2 examples/distributed\.py"):
        example.main([])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", example.STRATEGIES)
def test_the_example_learns_on_four_processes(strategy, tmp_path):
    options = ["--strategy", strategy, "--steps", "150", "--dropout", "0"]
    run = finished("--nproc-per-node", "4", "--master-port", free_port(), *EXAMPLE, *options, seconds=600)
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout.partition(": loss ")[2].split()[0]) < 2.8  # a guess has log(32), 3.47
