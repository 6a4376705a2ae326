"""Processes that form a gloo group and run functions of tests, one after another: torch is imported once for all."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120.0  # of one function; a machine that does much else is slow

# Of float64 results: sums over parts are added in another order, which is worth 2**-53 for each of some thousand terms.
REORDERED = {"rtol": 1e-12, "atol": 1e-12}


def _serve(rank: int, world: int, meeting: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT / 2)
    dist.init_process_group("gloo", f"file://{meeting}", timeout=timeout, rank=rank, world_size=world)
    while (task := pipe.recv()) is not None:
        function, args = task
        torch.manual_seed(0)
        try:
            pipe.send((function(*args), ""))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function gives in each process. A failure in one fails here, and ends all."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results, faults = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(1 if faults else TIMEOUT):  # the others may wait for one that has failed
                faults.append(f"rank {rank} gave no answer")
                continue
            try:
                result, fault = pipe.recv()
            except (EOFError, OSError) as end:
                result, fault = None, f"it has ended: {end!r}"
            results.append(result)
            if fault:
                faults.append(f"rank {rank}:\n{fault}")
        if faults:
            self.close(kill=True)
            raise AssertionError("\n".join(faults))
        return results

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self._folder.name) / "meeting")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, meeting, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self, kill: bool = False) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if kill:
                process.kill()
            else:
                pipe.send(None)
            process.join(30)
            pipe.close()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._pipes = [], []
