"""Compiles Triton's forms of many cases into Triton's cache, on all cores, while others are measured.

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
from fusednorm.providers.triton.config import Form
from fusednorm.tuning.forms import triton_form, triton_forms
from tools.tune.cases import kernel_of, norm_of


def launches(case: Case, form: Form) -> list[Any]:
    """Every launch of the case, as `tools.codegen.compile` notes them. No row count is compiled in."""
    from tools.codegen import compile, norm_calls

    op, backward = norm_of(case), case.direction == "backward"
    switches = {"rms": op.rms, "residual": op.add, "x_bias": op.epilogue, "dropout": op.epilogue}
    words = {name for name, on in switches.items() if on}
    call = norm_calls.whole(words, backward=backward, dtype=case.torch_dtype, layout="aligned")
    noted: list[compile.Launch] = []
    with compile.launches(noted.append), triton_form(kernel_of(case).place("triton"), form):
        norm_calls.norm_call(call, case.shape[-1])
    return [launch for launch in noted if ("fwd" in launch.kernel) != backward]


def _compile(case: Case, form: Form, arch: int) -> None:
    for launch in launches(case, form):
        launch.compiled(arch)


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
            self._pool.submit(_compile, case, form, arch)
            for case in cases
            for base, others in [triton_forms(kernel_of(case))]
            for form in (base, *others)
        ]

    @property
    def count(self) -> int:
        return len(self._compiled)

    def wait(self) -> list[str]:
        """What every failure said."""
        return [repr(error) for error in (done.exception() for done in self._compiled) if error is not None]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
