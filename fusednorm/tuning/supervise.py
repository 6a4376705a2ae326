"""Child processes that may crash, hang or be cut off: each leads a group of its own, which ends with it.

`run` gives one command a time limit. `Supervised` restarts a child after each step that it does not survive. Such a
child reports by messages in a file, a line of JSON each, so that none is lost with the process:

("trying", step)   what it is about to do
("case", record)   what came of a case, whose "name" the next child is not to do again
("lost", reason)   it cannot go on, and loses the step
("end", None)      it did all there was

Any other message passes through.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

Message = tuple[str, Any]
Step = Any  # of a child's work: a test's name, or a case with one of its forms
POLL = 0.05
TAIL_LINES, TAIL_BYTES = 12, 1 << 16


def tail(path: Path, start: int = 0) -> list[str]:
    """The last lines with anything in them, of what was written from `start` on."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = (line.rpartition("\r")[2].rstrip()[:300] for line in text.split("\n"))
    return list(deque((line for line in lines if line), maxlen=TAIL_LINES))


# --- one process ---


class Child:
    """A process that leads a group of its own, of which nothing outlives `end`."""

    def __init__(self, pid: int, reap: Callable[[], int]) -> None:
        self.pid, self._reap = pid, reap

    @classmethod
    def of_command(
        cls, command: Sequence[str], output: BinaryIO, env: Mapping[str, str], cwd: Path | None = None
    ) -> Child:
        """Standard output and errors go to `output`; `env` is added to the environment.

        Raises:
            OSError: there is no such command.
        """
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_in_child,
        )
        return cls(process.pid, process.wait)

    @classmethod
    def of_function(cls, function: Callable[[], None]) -> Child:
        """A fork, which costs no imports. This process must not have used the GPU."""

        def lead() -> None:
            os.setsid()
            _in_child()
            function()

        process = get_context("fork").Process(target=lead, daemon=True)
        process.start()
        assert process.pid is not None

        def reap() -> int:
            process.join()
            assert process.exitcode is not None
            return process.exitcode

        return cls(process.pid, reap)

    def ended(self) -> bool:
        """Without reaping it: its number, which is its group's, is then not given to anybody else."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def end(self) -> int:
        """Kill what is left of the group; the exit code, or less than 0 for a signal."""
        for kill in (os.killpg, os.kill):  # a fork may not lead its group yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        return self._reap()


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _in_child() -> None:
    # A background job of a shell ignores interrupts, and its children would too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A group of its own would outlive a parent that is killed with its group.
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Ended(NamedTuple):
    code: int | None  # None: it did not begin, or did not end in time
    timed_out: bool = False


def run(command: Sequence[str], log: Path, env: Mapping[str, str], limit: float, tick: Callable[[], object]) -> Ended:
    """Run a command to its end or for `limit` seconds, its output added to `log`; `tick` is called all the while.

    When time is nearly up it is interrupted, as by Ctrl-C, so that it can still write what it has.
    """
    start = time.monotonic()
    interrupt_at = limit - min(10.0, limit / 5)
    with log.open("ab", buffering=0) as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        try:
            child = Child.of_command(command, output, env)
        except OSError as error:
            output.write(f"{error}\n".encode())
            return Ended(None)
    interrupted = False
    try:
        while not child.ended():
            elapsed = time.monotonic() - start
            if elapsed > limit:
                return Ended(None, True)
            if elapsed > interrupt_at and not interrupted:
                interrupted = True
                child.interrupt()
            tick()
            time.sleep(POLL)
    finally:
        code = child.end()
    return Ended(None, True) if interrupted else Ended(code)


# --- a child that is started again ---


def reporter(path: Path) -> Callable[[str, Any], None]:
    """What a child reports by; the file stays open while it lives."""
    file = path.open("a", encoding="utf-8")

    def put(kind: str, content: Any = None) -> None:
        file.write(json.dumps([kind, content]) + "\n")
        file.flush()

    return put


class Lost(NamedTuple):
    step: Step
    reason: str
    seconds: float


class Supervised:
    """One child at a time, started again without the cases that are done and told which steps were lost, and why.

    `start` makes a child from this object: it leaves out `done` and `lost`, reports to `reports` and may print to
    `output`. A child that ends, or says nothing for `patience` of its step, loses the step: ("lost", Lost) is then
    among the messages. One that never tried anything is not started again, and ("stopped", reason) comes last.
    """

    def __init__(
        self,
        start: Callable[[Supervised], Child],
        patience: Callable[[Step | None], float],
        folder: Path,
        name: str = "child",
        restarts: float = math.inf,
    ) -> None:
        self.name, self.reports, self.output = name, folder / f"{name}.jsonl", folder / f"{name}.txt"
        self.done: list[str] = []
        self.cases: list[Any] = []  # what came of them
        self.lost: dict[Step, str] = {}
        self.running = True
        self._start, self._patience, self._restarts, self._position = start, patience, restarts, 0
        self.reports.touch()
        self._begin()

    def _begin(self) -> None:
        self.step: Step | None = None
        self.since = time.monotonic()  # of the last message
        self._tried = self._finished = False
        self._gave_up = ""
        self._child = self._start(self)

    def _news(self) -> list[Message]:
        with self.reports.open("rb") as file:
            file.seek(self._position)
            *lines, _ = file.read().split(b"\n")
        self._position += sum(len(line) + 1 for line in lines)
        found = []
        for kind, content in map(json.loads, lines):
            self.since = time.monotonic()
            if kind == "trying":
                self.step, self._tried = tuple(content) if isinstance(content, list) else content, True
            elif kind == "lost":
                self._gave_up = content
            elif kind == "end":
                self._finished = True
            else:
                found.append((kind, content))
            if kind == "case":
                self.step = None
                self.done.append(content["name"])
                self.cases.append(content)
        return found

    def poll(self) -> list[Message]:
        """What there is since the last call. `running` tells whether more may come."""
        over, found, allowed = self._child.ended(), self._news(), self._patience(self.step)
        seconds = time.monotonic() - self.since
        if not over and not self._gave_up and seconds < allowed:
            return found
        code = self._child.end()
        found += self._news()
        if over and self._finished and code >= 0:
            self.running = False
            return found
        cause = f"its process ended with exit code {code}" if over else f"no answer in {allowed:g} s"
        reason = self._gave_up or cause
        if self.step is not None:
            self.lost[self.step] = reason
            found.append(("lost", Lost(self.step, reason, seconds)))
        if self._tried and self._restarts > 0:
            self._restarts -= 1
            self._begin()
        else:
            self.running = False
            found.append(("stopped", reason))
        return found

    def stop(self) -> list[Message]:
        """End the child; what it had still said."""
        if not self.running:
            return []
        self.running = False
        self._child.end()
        return self._news()


def supervised(work: Callable[[set[str], Mapping[Step, str]], Iterator[Message]], patience: float) -> Iterator[Message]:
    """The messages of `work`, which is given the names of the cases that are done, and why a step was lost.

    It runs in a fork, so this process must not have used the GPU. Steps and their losses are no messages here.
    """
    with tempfile.TemporaryDirectory() as folder:

        def start(of: Supervised) -> Child:
            def report() -> None:
                put = reporter(of.reports)
                for kind, content in work(set(of.done), of.lost):
                    put(kind, content)
                put("end", None)

            return Child.of_function(report)

        watched = Supervised(start, lambda step: patience, Path(folder))
        try:
            while watched.running:
                time.sleep(POLL)
                yield from ((kind, content) for kind, content in watched.poll() if kind != "lost")
        finally:
            watched.stop()
