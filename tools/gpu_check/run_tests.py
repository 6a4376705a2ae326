"""Run the tests that a GPU runs, in several processes, and lose none of them to one that crashes or hangs.

    python3 -m tools.gpu_check.run_tests --xml tests.xml

Those are the tests marked gpu, and all that have a provider and its device as a parameter. Tests marked alone come
first, in one process. Then each file has a process of its own, side by side. The tests of norms and of attention are
thousands and spend their time on compiling kernels, so a third of the processes shares each. Each process begins with
our kernels; torch's operators and the reference come after them. A kernel that faults leaves its process without a
working device: the rest of its tests go to a new one, as they do after a crash or a test that does not end.

Needs pytest and nothing besides. With --device cpu the same files run without a GPU, by automatic choice alone. The end
of the output counts the tests of every file.

Exit status: 0; 1 when a test failed or none ran; 130 when interrupted. Both files are then complete as far as it came.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest

from fusednorm.tuning.supervise import POLL, Child, Message, Supervised, reporter

ROOT = Path(__file__).resolve().parents[2]
SHARED = (("/norm/", "/reported/test_norm"), ("/attention/", "/reported/test_attention"))  # families of files
OF_A_GPU = re.compile(r"pytest\.mark\.gpu|\bcuda_forms\b|^ *def test\w*\([^)]*\b(place|using)\b", re.M)
LATER = {"automatic": 1, "torch": 2, "reference": 2}  # a provider's turn; ours are first
BROKEN_DEVICE = 71  # a process's exit status
LONGEST_TEST = 90.0  # seconds, compilation included
LONGEST_SILENCE = 180.0  # of a process between tests: it imports torch and collects the tests
RESTARTS = 25  # of one process
TEXT_LIMIT = 6000  # characters of a failure


# --- in a process that runs tests, as a plugin of pytest ---


class Part(NamedTuple):
    """The tests of some files that one process runs: in phase "alone", "beside" or "all", each `of`-th of them."""

    phase: str
    files: list[str]
    index: int = 0
    of: int = 1


class Recorder:
    """Leaves a process its part of the tests, and reports each start and result at once."""

    def __init__(self, device: str, part: list[Any], reports: str, done: list[str]) -> None:
        self.device, self.part, self.done, self.put = device, Part(*part), set(done), reporter(Path(reports))
        self.current: dict[str, Any] = {}

    def _wanted(self, item: pytest.Item) -> bool:
        provider, device = _place(item)
        # what is slow in Triton's interpreter is not so on a GPU
        if item.get_closest_marker("slow") and not (self.device == "cuda" and provider == "triton"):
            return False
        if self.device == "cpu":
            return provider in ("", "automatic")
        if (item.get_closest_marker("alone") is not None) != (self.part.phase == "alone"):
            return False
        return item.get_closest_marker("gpu") is not None or device == self.device

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # tests that differ in the provider alone share their kernels, so one process takes them
        groups: dict[str, int] = {}
        for item in filter(self._wanted, items):
            groups.setdefault(_without_place(item), len(groups))
        mine = [i for i in items if groups.get(_without_place(i), -1) % self.part.of == self.part.index]
        mine = [item for item in mine if self._wanted(item)]
        mine.sort(key=lambda item: 3 if item.get_closest_marker("slow") else LATER.get(_place(item)[0], 0))
        if not self.done:
            self.put("selected", Counter(_file(item.nodeid) for item in mine))
        items[:] = [item for item in mine if item.nodeid not in self.done]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed" and report.nodeid not in self.done:
            text = str(report.longrepr)[-TEXT_LIMIT:] if report.failed else _skip_reason(report)
            self.put("case", {"name": report.nodeid, "outcome": report.outcome, "seconds": 0.0, "text": text})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.current = {"name": nodeid, "outcome": "passed", "seconds": 0.0, "text": ""}
        self.put("trying", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.current["seconds"] += report.duration
        if report.failed:
            self.current |= {"outcome": "failed", "text": self.current["text"] + report.longreprtext[-TEXT_LIMIT:]}
        elif report.skipped and self.current["outcome"] == "passed":
            self.current |= {"outcome": "skipped", "text": getattr(report, "wasxfail", "") or _skip_reason(report)}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.put("case", self.current)
        if self.device == "cuda" and self.current["outcome"] == "failed":
            import torch

            try:
                torch.cuda.synchronize()
            except Exception:  # every later call would fail with the same error
                pytest.exit("the device is unusable in this process", returncode=BROKEN_DEVICE)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            self.put("end", None)


def _place(item: pytest.Item) -> tuple[str, str]:
    """The provider and the device that are a test's parameter."""
    parameters = getattr(item, "callspec", None)
    return parameters.params.get("place", ("", "")) if parameters is not None else ("", "")


def _without_place(item: pytest.Item) -> str:
    return item.nodeid.replace("-".join(_place(item)), "") if _place(item)[0] else item.nodeid


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _skip_reason(report: Any) -> str:
    where = report.longrepr
    return where[2].removeprefix("Skipped: ") if isinstance(where, tuple) else str(where)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(**json.loads(os.environ["FUSEDNORM_GPU_TESTS"])), "gpu-recorder")


# --- the processes ---


def begin(part: Part, number: int, device: str, workers: int, folder: Path) -> Supervised:
    env = {
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        **({"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))} if workers > 1 else {}),
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    }
    command = [sys.executable, "-m", "pytest", "-p", "tools.gpu_check.run_tests", "-p", "no:cacheprovider", "-q"]
    command += ["--tb=short", "--continue-on-collection-errors", *part.files]

    def start(of: Supervised) -> Child:
        done = [*of.done, *of.lost]
        options = {"device": device, "part": part, "reports": str(of.reports), "done": done}
        with of.output.open("wb") as output:
            return Child.of_command(command, output, env | {"FUSEDNORM_GPU_TESTS": json.dumps(options)}, ROOT)

    def patience(test: str | None) -> float:
        return LONGEST_TEST if test else LONGEST_SILENCE

    return Supervised(start, patience, folder, f"{part.phase}-{number}", RESTARTS)


class Board:
    """Every result so far: printed as it comes, counted, and written as JUnit's XML at the end."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.selected: Counter[str] = Counter()  # tests by file
        self.started, self.spoken = time.monotonic(), time.monotonic()

    def take(self, process: Supervised, messages: list[Message]) -> None:
        for kind, content in messages:
            if kind == "selected":
                self.selected += content
            elif kind == "case":
                self.add(**content)
            elif kind == "lost":
                self.add(content.step, "failed", content.seconds, _why(process, content.reason))
            elif kind == "stopped":
                self.add(process.name, "failed", 0.0, _why(process, content))
        if time.monotonic() - self.spoken > 10:
            self.spoken = time.monotonic()
            print(self.totals() if self.selected else "collecting the tests")
        sys.stdout.flush()

    def add(self, name: str, outcome: str, seconds: float, text: str) -> None:
        if name in self.records:  # what cannot be collected is told in each phase
            return
        self.records[name] = {"id": name, "outcome": outcome, "seconds": seconds, "text": text}
        reason = f"  ({text})" if outcome == "skipped" else ""
        print(f"{outcome.upper():<8}{seconds:7.2f}s {name}{reason}")
        if outcome == "failed":
            print("    " + text.replace("\n", "\n    "))

    def totals(self) -> str:
        counts = Counter(record["outcome"] for record in self.records.values())
        parts = ", ".join(f"{counts[o]} {o}" for o in ("failed", "passed", "skipped") if counts[o] or o != "skipped")
        seconds = time.monotonic() - self.started
        return f"{len(self.records)} of {self.selected.total()} tests in {seconds:.0f} s: {parts}"

    def good(self) -> bool:
        outcomes = {record["outcome"] for record in self.records.values()}
        return "failed" not in outcomes and "passed" in outcomes and len(self.records) >= self.selected.total()

    def by_folder(self) -> list[str]:
        """A line for each folder: its files, with the tests that ran, those that were to run, and what failed."""
        ran = Counter(_file(name) for name in self.records)
        failed = Counter(_file(name) for name, record in self.records.items() if record["outcome"] == "failed")
        folders: dict[str, list[str]] = {}
        for file in sorted(self.selected):
            said = f"{Path(file).stem.removeprefix('test_')} {ran[file]}/{self.selected[file]}"
            said += f" ({failed[file]} failed)" if failed[file] else ""
            folders.setdefault(Path(file).parent.as_posix().removeprefix("tests/"), []).append(said)
        return [f"{folder}: {', '.join(files)}" for folder, files in folders.items()]

    def ending(self) -> None:
        failed = [record["id"] for record in self.records.values() if record["outcome"] == "failed"]
        reasons = Counter(r["text"] for r in self.records.values() if r["outcome"] == "skipped")
        slowest = sorted(self.records.values(), key=lambda record: -record["seconds"])[:5]
        print("\nslowest:", *(f"{r['seconds']:7.2f}s {r['id']}" for r in slowest), sep="\n  ")
        print("\n".join(f"skipped {count}: {reason}" for reason, count in reasons.most_common(20)))
        print("\n".join(f"FAILED {name}" for name in failed[:200]))
        print(*self.by_folder(), sep="\n")

    def write_xml(self, path: Path) -> None:
        counts = Counter(record["outcome"] for record in self.records.values())
        numbers = {"tests": len(self.records), "failures": counts["failed"], "skipped": counts["skipped"], "errors": 0}
        suite = ElementTree.Element("testsuite", name="gpu", **{key: str(n) for key, n in numbers.items()})
        suite.set("time", f"{time.monotonic() - self.started:.1f}")
        for record in self.records.values():
            file, _, name = record["id"].partition("::")
            case = ElementTree.SubElement(suite, "testcase", classname=file, name=name, time=f"{record['seconds']:.3f}")
            if record["outcome"] != "passed":
                tag = {"failed": "failure", "skipped": "skipped"}[record["outcome"]]
                text = "".join(c for c in record["text"] if c >= " " or c in "\n\t")  # XML takes no control characters
                first = text.strip().rpartition("\n")[2][:200]
                ElementTree.SubElement(case, tag, message=first).text = text
        path.write_bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))


def _why(process: Supervised, reason: str) -> str:
    """A reason, and the end of what the process printed."""
    return f"{reason}\n{process.output.read_text(encoding='utf-8', errors='replace')[-TEXT_LIMIT:]}"


def test_files() -> list[str]:
    """Every file with a test marked gpu, or with one that has a provider and its device as a parameter."""
    return [str(p) for p in sorted((ROOT / "tests").rglob("test_*.py")) if OF_A_GPU.search(p.read_text("utf-8"))]


def parts(files: list[str], device: str, workers: int) -> list[list[Part]]:
    """What may run side by side, one phase after another; the longest first."""
    phase, beside, rest, of = "all" if device == "cpu" else "beside", list[Part](), list(files), max(1, workers // 3)
    for names in SHARED:
        family = [file for file in rest if any(name in file for name in names)]
        rest = [file for file in rest if file not in family]
        beside += [Part(phase, family, index, of) for index in range(of if family else 0)]
    beside += [Part(phase, [file]) for file in rest]
    return [beside] if device == "cpu" else [[Part("alone", files)], beside]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="test files (default: see above)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: all cores but two, at most 12")
    parser.add_argument("--xml", type=Path, metavar="FILE", help="write JUnit's XML here")
    arguments = parser.parse_args(argv)
    cores, device = os.cpu_count() or 1, arguments.device
    workers = arguments.workers or max(1, min(cores // 2 if device == "cpu" else cores - 2, 12))
    files = arguments.files or test_files()
    print(f"{len(files)} files with tests for a GPU", flush=True)
    board, running, status = Board(), list[Supervised](), 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            for waiting in parts(files, device, workers):
                number = 0
                while running or number < len(waiting):
                    while number < len(waiting) and len(running) < workers:
                        running.append(begin(waiting[number], number, device, workers, Path(folder)))
                        number += 1
                    time.sleep(POLL)
                    for process in running:
                        board.take(process, process.poll())
                    running = [process for process in running if process.running]
        except KeyboardInterrupt:
            status = 130
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            for process in running:
                board.take(process, process.stop())
                under_way = f", {time.monotonic() - process.since:.0f} s into {process.step}" if process.step else ""
                print(f"interrupted{under_way}")
    board.ending()
    if arguments.xml:
        board.write_xml(arguments.xml)
    print(board.totals(), flush=True)
    return status or (0 if board.good() else 1)


if __name__ == "__main__":
    sys.exit(main())
