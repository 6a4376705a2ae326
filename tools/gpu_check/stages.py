"""Stages of a check on a machine that may be taken away: each bounded, each result on disk as soon as it is known.

A stage runs commands one after another, each within its time (`supervise.run`). The time that a stage leaves goes to
the later ones.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report.files import replace
from fusednorm.tuning import supervise
from fusednorm.tuning.supervise import tail

PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"
RUNNING, CUT_OFF, NOT_RUN = "running", "cut off", "not run"
GOOD = (PASSED, SKIPPED)
SHORTEST = 2.0  # seconds under which a stage is not begun
REPORT_EVERY = 15.0


@dataclass(frozen=True)
class Stage:
    """`commands` makes the argument lists from the seconds there are; `share` is how many are kept for the stage."""

    name: str
    log: str
    share: float
    commands: Callable[[float], Sequence[Sequence[str]]]
    files: tuple[str, ...] = ()  # written besides the log
    env: Mapping[str, str] = field(default_factory=dict)
    skip: str = ""  # why it need not run here
    most: float = math.inf  # seconds, whatever is left
    brief: float | None = None  # seconds kept for each command after the first; None: all commands have equal shares


def say(text: str) -> None:
    print(text, flush=True)


class Run:
    """Runs stages inside `seconds` and keeps summary.json and summary.md in `folder` true at every moment."""

    def __init__(self, stages: Sequence[Stage], folder: Path, seconds: float, facts: Mapping[str, Any]) -> None:
        self.stages, self.folder, self.seconds, self.facts = list(stages), folder, seconds, dict(facts)
        self.start = time.monotonic()
        self.finished = self.stopped = False
        self.results = [
            {"name": s.name, "status": NOT_RUN, "reason": "", "seconds": 0.0, "limit": 0, "log": s.log, "tail": []}
            for s in self.stages
        ]

    @property
    def passed(self) -> bool:
        return self.finished and all(result["status"] in GOOD for result in self.results)

    def stop(self, *_: object) -> None:
        """End the stage under way and the run, which then raises KeyboardInterrupt. May be a signal's handler: it only
        leaves word, so that no process and no result is lost between two lines."""
        self.stopped = True

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def run(self) -> bool:
        """Whether every stage passed or had a good reason not to run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in {name for stage in self.stages for name in (stage.log, *stage.files)}:
            (self.folder / name).unlink(missing_ok=True)
        for stage, result in zip(self.stages, self.results, strict=True):
            if stage.skip:
                result |= {"status": SKIPPED, "reason": stage.skip, "log": ""}
        self.write()
        for index, stage in enumerate(self.stages):
            if not stage.skip:
                self._run_stage(index, stage)
        self.finished = True
        self.write()
        say("\n" + self.table())
        say(f"\n{self.verdict()} Read {self.folder / 'summary.md'} first; what each stage printed is beside it.")
        return self.passed

    def _limit(self, index: int) -> float:
        """What is left, less what is kept for the later stages; a share of it where not all fits any more."""
        later = sum(stage.share for stage in self.stages[index + 1 :] if not stage.skip)
        mine, left = self.stages[index].share, self.left() - 1.0
        limit = left - later if left >= mine + later else left * mine / (mine + later)
        return min(limit, self.stages[index].most)

    def _run_stage(self, index: int, stage: Stage) -> None:
        result, log, limit = self.results[index], self.folder / stage.log, self._limit(index)
        if limit < SHORTEST:
            result |= {"reason": "no time was left", "log": ""}
            say(f"{stage.name}: not run, no time is left")
            self.write()
            return
        begun, spoken = time.monotonic(), [time.monotonic()]
        result |= {"status": RUNNING, "limit": round(limit)}
        self.write()
        say(f"{stage.name}: at most {limit:.0f} s; {self.left():.0f} s are left in all")
        position = log.stat().st_size if log.exists() else 0

        def tick() -> None:
            if self.stopped:
                raise KeyboardInterrupt
            if time.monotonic() - spoken[0] > REPORT_EVERY:
                spoken[0] = time.monotonic()
                elapsed, last = spoken[0] - begun, tail(log, position)[-1:]
                say(
                    f"  {stage.name}: {elapsed:.0f} s of {limit:.0f} s; {self.left():.0f} s left in all  | {_end(last)}"
                )

        status, reasons = CUT_OFF, []
        try:
            commands = stage.commands(limit)
            statuses = []
            for number, command in enumerate(commands):
                later, share = len(commands) - number - 1, limit - (time.monotonic() - begun)
                share = share / (later + 1) if stage.brief is None else max(share - later * stage.brief, 0.0)
                ended = supervise.run(command, log, stage.env, share, tick)
                statuses.append(TIMED_OUT if ended.timed_out else PASSED if ended.code == 0 else FAILED)
                if ended.timed_out:
                    reasons.append(f"{_short(command)}: its {share:.0f} s were up")
                elif ended.code != 0:
                    reasons.append(f"{_short(command)}: exit status {ended.code}")
            status = next((s for s in (FAILED, TIMED_OUT) if s in statuses), PASSED)
        finally:
            seconds = round(time.monotonic() - begun, 1)
            result |= {"status": status, "reason": "; ".join(reasons), "seconds": seconds, "tail": tail(log, position)}
            self.write()
            say(f"{stage.name}: {status} in {seconds:.0f} s  | {_end(result['tail'])}")

    # --- the summary ---

    def verdict(self) -> str:
        if not self.finished:
            return "The check is still running, or was cut off."
        bad = [result["name"] for result in self.results if result["status"] not in GOOD]
        return f"Not well: {', '.join(bad)}." if bad else "All is well."

    def table(self) -> str:
        rows = [("stage", "result", "seconds", "allowed", "what it says")]
        for r in self.results:
            ran = r["status"] not in (SKIPPED, NOT_RUN)
            said = "; ".join(filter(None, (r["reason"], _end(r["tail"]) if ran else "")))
            numbers = (f"{r['seconds']:.0f}", str(r["limit"])) if ran else ("-", "-")
            rows.append((r["name"], r["status"], *numbers, said.replace("|", "/")))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["| " + " | ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[4]]) + " |" for row in rows]
        rule = "|" + "|".join("-" * (width + 2) for width in [*widths, 12]) + "|"
        return "\n".join([lines[0], rule, *lines[1:]])

    def write(self) -> None:
        used = round(time.monotonic() - self.start, 1)
        record = {"format": 1, **self.facts, "finished": self.finished, "passed": self.passed, "seconds": used}
        replace(self.folder / "summary.json", json.dumps(record | {"stages": self.results}, indent=1) + "\n")
        facts = [f"- {key}: {value}" for key, value in self.facts.items()]
        facts += [f"- seconds: {used:.0f} of {self.seconds:.0f}"]
        text = ["# GPU check", f"**{self.verdict()}**", "\n".join(facts), self.table()]
        for r in self.results:
            if r["tail"]:
                text += [f"## {r['name']}: {r['status']}", f"The end of `{r['log']}`:"]
                text += ["```text\n" + "\n".join(r["tail"]).replace("```", "'''") + "\n```"]
        replace(self.folder / "summary.md", "\n\n".join(text) + "\n")


def _end(lines: Sequence[str]) -> str:
    return lines[-1][:160] if lines else ""


def _short(command: Sequence[str]) -> str:
    """What a reader tells commands by: no interpreter, no folders, no later options."""
    words = [os.path.basename(word) for word in command if word not in (sys.executable, "-u", "-m")]
    return " ".join(words[:3])[:80]
