"""Compiles Triton's variants of many cases into Triton's cache, on all cores, while others are measured.

One takes a second or two, and there are hundreds: compiled where they are first called, they would take most of the
time that a GPU is there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.cases import Case
from fusednorm._options import NormGradOptions, NormInputs, NormOptions, NormSaved
from fusednorm.providers.triton import norm as triton_norm
from fusednorm.providers.triton.config import Config
from tools.tune.forms import norm_of, replaced, triton_configs, triton_form
from tools.tune.variants import Pinned

ROWS = 8  # no row count is compiled in


def _call(case: Case) -> None:
    """The provider's forward or backward as the case's operation calls it, on CPU tensors."""
    op, n, dtype = norm_of(case), case.shape[-1], case.torch_dtype
    rows, vector, seed = (
        torch.zeros(ROWS, n, dtype=dtype),
        torch.zeros(n, dtype=dtype),
        torch.zeros(1, dtype=torch.int64),
    )
    z, bias = rows if op.add else None, None if op.rms else vector
    x_bias, seed_or_none, p = (vector, seed, 0.1) if op.epilogue else (None, None, 0.0)
    if case.direction == "forward":
        inputs = NormInputs(rows, z, vector, bias, x_bias, None, seed_or_none)
        triton_norm.add_layer_norm_fwd(inputs, NormOptions(1, 1e-5, p, 0.0, dtype, dtype, op.rms, False, op.add))
        return
    stats = torch.zeros(1 if op.rms else 2, ROWS)
    wanted = [True, op.epilogue, True, not op.rms, op.epilogue, False]  # of a bare add one gradient stands for both
    saved = NormSaved(rows, stats, vector, bias, None, x_bias, None, seed_or_none)
    options = NormGradOptions(1, p, 0.0, dtype, dtype, op.rms, False, False)
    triton_norm.add_layer_norm_bwd(rows, z, saved, options, wanted)


def launches(case: Case, config: Config | Pinned) -> list[tuple[Any, tuple[torch.dtype | None, ...]]]:
    """Every variant that the case launches, with its pointers' dtypes."""
    from fusednorm.providers.triton import launch as triton_launch

    noted = []

    def launch(self: Any, grid: Any, pointers: Any, numbers: Any) -> None:
        noted.append((self, tuple(None if t is None else t.dtype for t in pointers)))

    with replaced(triton_launch.Variant, "launch", launch), triton_form(case.direction, config)():
        _call(case)
    return noted


def _compile(case: Case, config: Config | Pinned, arch: int) -> None:
    from triton.backends.compiler import GPUTarget

    from fusednorm.providers.triton.launch import compile_kernel

    for variant, dtypes in launches(case, config):
        compile_kernel(
            *(variant.function, dtypes, variant.constants),
            warps=variant.warps,
            registers=variant.registers,
            aligned=variant.aligned,
            stages=variant.stages,
            target=GPUTarget("cuda", arch, 32),
        )


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # they are told to stop
    os.nice(10)
    torch.set_num_threads(1)


class Compiling:
    """Compiles in the background, in the order of the cases, until it is closed.

    What fails fails again where it is called.
    """

    def __init__(self, cases: Iterable[Case], arch: int, jobs: int) -> None:
        self._pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start)
        self._compiled = [
            self._pool.submit(_compile, case, config, arch) for case in cases for config in triton_configs(case)
        ]

    @property
    def count(self) -> int:
        return len(self._compiled)

    def wait(self) -> list[str]:
        """What every failure said."""
        return [repr(error) for error in (done.exception() for done in self._compiled) if error is not None]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
