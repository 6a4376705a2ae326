"""What tools of the system say of the machine and of the code. Imports no torch: what is broken may be that."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Answer(NamedTuple):
    well: bool
    out: str = ""
    errors: str = ""  # printed there, or why it printed nothing

    @property
    def text(self) -> str:
        return (self.out + self.errors).strip()


def ask(*command: str, seconds: float = 20) -> Answer:
    """What a command printed. No failure raises."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Answer(False, errors=f"no answer in {seconds:g} s")
    except OSError as error:
        return Answer(False, errors=error.strerror or str(error))
    return Answer(done.returncode == 0, done.stdout, done.stderr)


def commit() -> str | None:
    """The commit that is checked out, "+changes" after it where the files are others; None where nobody knows."""
    head, changes = ask("git", "rev-parse", "--short=12", "HEAD"), ask("git", "status", "--porcelain")
    return head.out.strip() + ("+changes" if changes.out.strip() else "") if head.well and changes.well else None


def cpu_name() -> str:
    names = (line.partition(":")[2].strip() for line in lines("/proc/cpuinfo") if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lines(path: str | os.PathLike[str]) -> list[str]:
    """None of a file that cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
