"""Work in a process of its own, which is replaced when a kernel kills it or never returns.

After a fault of a kernel no call of its process reaches the GPU any more, and a kernel that waits for what never comes
is ended with its process alone. So the work tells what it is about to try; what was being tried when it ended is left
out by the next process, which goes on.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

Message = tuple[str, Any]
Step = tuple[str, str]  # of a case, one variant; "" stands for all of them, side by side
Work = Callable[[set[str], Mapping[Step, str]], Iterator[Message]]

_END: Message = ("end", None)


def _run(work: Work, done: set[str], lost: Mapping[Step, str], sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that writes the result
    for message in work(done, lost):
        sender.send(message)
    sender.send(_END)


def supervised(work: Work, patience: float) -> Iterator[Message]:
    """The messages of `work`, which is given the cases that are done, and why a step was lost.

    It announces a step by ("trying", step), hands over a case by ("case", record), and says ("lost", reason) where it
    cannot go on. A process that ends or says nothing for `patience` seconds loses its step. ("stopped", reason) comes
    last where a process was lost before it tried anything. Processes are forked: this one must not have used the GPU.
    """
    context = multiprocessing.get_context("fork")
    done: set[str] = set()
    lost: dict[Step, str] = {}
    while True:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(work, done, lost, sender), daemon=True)
        process.start()
        sender.close()  # the process has the other end: when it is gone, reading says so
        step: Step | None = None
        reason = f"no answer in {patience:g} s"
        try:
            while receiver.poll(patience):
                message = receiver.recv()
                kind, content = message
                if message == _END:
                    return
                if kind == "lost":
                    reason = content
                    break
                if kind == "trying":
                    step = content
                    continue
                if kind == "case":
                    step = None
                    done.add(content["name"])
                yield message
        except EOFError:
            process.join()
            reason = f"its process ended with exit code {process.exitcode}"
        finally:
            process.kill()
            process.join(10)
            receiver.close()
        if step is None:
            yield "stopped", reason
            return
        lost[step] = reason
