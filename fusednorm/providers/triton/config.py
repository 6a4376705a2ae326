"""A launch configuration of a Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

REGISTERS = 65536  # of a multiprocessor
MAX_PROGRAMS = 8  # of a persistent grid, for each multiprocessor: each writes a row of partial sums


class Config(NamedTuple):
    block_m: int
    block_n: int
    chunks: int  # tiles a row is held in; 0 = the wide form, which reads the row again
    warps: int
    per_sm: int  # programs that fit on a multiprocessor: how many registers the compiler may use follows

    @property
    def stages(self) -> int:
        """Tiles on their way at once: these kernels have no inner loop."""
        return 1

    @property
    def registers(self) -> int:
        """The most registers a thread may have. Stated, because ptxas left to itself spills to reach an occupancy."""
        return min(255, REGISTERS // (32 * self.warps * self.per_sm) // 8 * 8)


class Pinned(NamedTuple):
    """A configuration whose programs are more or fewer on a multiprocessor with the registers of another one.

    Another tuple than any `Config`: launches are kept by it, and a `Config` states registers that follow from `per_sm`.
    """

    block_m: int
    block_n: int
    chunks: int
    warps: int
    per_sm: int
    registers: int

    @property
    def stages(self) -> int:
        return 1


Form = Config | Pinned
MOST_ELEMENTS = 64  # of a program, a thread: registers end there
MOST_WARPS, LEAST_REGISTERS = 32, 24


def form_of(numbers: Sequence[int]) -> Form:
    """A form by its numbers, as a file keeps it.

    Raises:
        ValueError: no program can be launched so.
    """
    if len(numbers) not in (5, 6) or not all(type(number) is int for number in numbers):
        raise ValueError(f"a form of Triton's has five or six integers, not {numbers}")
    form: Form = Config(*numbers) if len(numbers) == 5 else Pinned(*numbers)
    powers = (form.block_m, form.block_n, form.warps)
    if min(*powers, form.per_sm) < 1 or form.chunks < 0 or any(number & (number - 1) for number in powers):
        raise ValueError(f"{form}: sizes are powers of two")
    if form.warps > MOST_WARPS or elements(form) > MOST_ELEMENTS * 32 * form.warps:
        raise ValueError(f"{form}: more than a program holds")
    if not LEAST_REGISTERS <= form.registers <= 255:
        raise ValueError(f"{form}: a thread has {LEAST_REGISTERS} to 255 registers")
    return form


def elements(form: Form) -> int:
    """That a program holds at a time."""
    return form.block_m * form.block_n * max(form.chunks, 1)


PARTIALS = Config(128, 32, 0, 8, 3)  # of the kernel that sums them; block_m: as many at a step
SAMPLE_PARTIALS = Config(32, 128, 0, 8, 3)  # where some are of one sample: a sample has few
