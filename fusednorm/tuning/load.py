"""The CPU time that other processes took while something was measured.

The load average is no measure of that: it looks back a minute, and so still holds whatever ran just before.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import torch

BUSY = 0.10  # share of the cores' time taken by others above which figures are not to be trusted
SHORTEST = 0.5  # seconds: the kernel counts hundredths on each core, which over less says nothing


class BackgroundLoad:
    """Starts when it is made; `share` tells what part of the cores' time other processes took since then."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self.proc = proc
        self.cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        self.start = self._reading()

    def _reading(self) -> tuple[float, float, float] | None:
        """Now, and the seconds that the cores were busy and that we kept them so; None where nobody tells."""
        try:
            busy = busy_seconds(self.proc / "stat", self.cores)
            return time.perf_counter(), busy, own_seconds(self.proc, os.getpid())
        except (OSError, ValueError, LookupError, AttributeError):
            return None

    def share(self) -> float | None:
        """None where the system does not tell, where its counters contradict each other, or too little time went by."""
        end = self._reading()
        if self.start is None or end is None:
            return None
        wall, busy, own = (after - before for before, after in zip(self.start, end))
        share = (busy - own) / (max(wall, 1e-9) * len(self.cores))
        return None if wall < SHORTEST or share < -BUSY else min(max(share, 0.0), 1.0)


def busy_seconds(stat: Path, cores: set[int]) -> float:
    """Time the cores did not idle, since the system started: what the hypervisor took from them ("steal") too."""
    wanted, ticks, found = {f"cpu{core}" for core in cores}, 0, 0
    for line in stat.read_text().splitlines():
        name, *counts = line.split()
        if name in wanted:
            user, nice, system, _idle, _waiting, *interrupts = map(int, counts[:8])
            ticks, found = ticks + user + nice + system + sum(interrupts), found + 1
    if found != len(wanted):
        raise LookupError(f"{stat} tells of {found} of {len(wanted)} cores")
    return ticks / os.sysconf("SC_CLK_TCK")


def own_seconds(proc: Path, pid: int) -> float:
    """CPU time of a process and all its descendants, those that ended included."""
    parents, ticks = {}, {}
    for path in proc.glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # the name before it may hold anything
        except (OSError, UnicodeDecodeError):  # it ended meanwhile
            continue
        parents[int(path.parent.name)] = int(fields[1])
        ticks[int(path.parent.name)] = sum(map(int, fields[11:15]))  # utime, stime, and those of reaped children
    total = ticks[pid]
    for process in ticks:
        above = parents[process]
        while above not in (pid, 0) and above in parents:
            above = parents[above]
        total += ticks[process] if above == pid else 0
    return total / os.sysconf("SC_CLK_TCK")


def share_text(share: float | None) -> str:
    return "not known here" if share is None else f"{share:.0%} of the cores' time"


def warning(share: float | None, figures: str = "these figures") -> str | None:
    """What a report says where others took too much; None where they did not, or nobody knows."""
    if share is None or share <= BUSY:
        return None
    return (
        f"THE MACHINE WAS BUSY: other processes took {share:.0%} of its cores' time while this was measured "
        f"(more than {BUSY:.0%}): do not trust {figures}."
    )


def available_memory(device: torch.device) -> int | None:
    """Free bytes on the device, or None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
