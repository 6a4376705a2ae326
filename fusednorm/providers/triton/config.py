"""A launch configuration of a Triton kernel."""

from __future__ import annotations

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


PARTIALS = Config(128, 32, 0, 8, 3)  # of the kernel that sums them; block_m: as many at a step
