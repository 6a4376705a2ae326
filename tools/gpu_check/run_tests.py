"""Run the tests that a GPU runs, in several processes, and lose none of them to one that crashes or hangs.

    python3 -m tools.gpu_check.run_tests --xml tests.xml

Those are the tests marked gpu, and those of the norm that have a device as a parameter. Most of their time goes into
compiling kernels, so they are dealt out to several processes; tests marked alone come first, in one. A kernel that
faults leaves its process without a working device: the rest of its tests go to a new one, as they do after a crash or
a test that does not end. Needs pytest and nothing besides. With --device cpu the same files run without a GPU.

Exit status: 0; 1 when a test failed or none ran; 130 when interrupted. Both files are then complete as far as it came.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
NORM_TESTS = ("test_norm.py", "test_edges.py", "test_peer_faults_norm.py")
BROKEN_DEVICE = 71  # a worker's exit status
LONGEST_TEST = 90.0  # seconds, compilation included
LONGEST_SILENCE = 180.0  # of a worker between tests: it imports torch and collects the tests
RESTARTS = 25  # of one worker
TEXT_LIMIT = 6000  # characters of a failure


# --- in a worker, as a plugin of pytest ---


class Recorder:
    """Takes a worker's part of the tests and writes down each start and result at once."""

    def __init__(self, device: str, phase: str, shard: int, shards: int, results: str, done: list[str]) -> None:
        self.device, self.phase, self.shard, self.shards, self.done = device, phase, shard, shards, set(done)
        self.file = open(results, "a", encoding="utf-8")  # noqa: SIM115 - open while the process lives
        self.current: dict[str, Any] = {}

    def put(self, **record: Any) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def _wanted(self, item: pytest.Item) -> bool:
        if item.get_closest_marker("slow"):
            return False
        if self.device == "cpu" or item.get_closest_marker("gpu"):
            return True
        parameters = getattr(item, "callspec", None)
        return parameters is not None and parameters.params.get("place", ("", ""))[1] == self.device

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        wanted = [item for item in items if self._wanted(item)]
        self.put(selected=len(wanted))
        if self.device != "cpu":
            wanted = [i for i in wanted if (i.get_closest_marker("alone") is not None) == (self.phase == "alone")]
        # tests that differ in the provider alone share their kernels, so one worker takes them
        groups: dict[str, int] = {}
        for item in wanted:
            groups.setdefault(_without_place(item), len(groups))
        items[:] = [
            item
            for item in wanted
            if groups[_without_place(item)] % self.shards == self.shard and item.nodeid not in self.done
        ]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.put(id=report.nodeid, outcome="failed", seconds=0.0, text=str(report.longrepr)[-TEXT_LIMIT:])
        elif report.skipped:
            self.put(id=report.nodeid, outcome="skipped", seconds=0.0, text=_skip_reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.current = {"outcome": "passed", "seconds": 0.0, "text": ""}
        self.put(id=nodeid, outcome="started")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.current["seconds"] += report.duration
        if report.failed:
            self.current |= {"outcome": "failed", "text": self.current["text"] + report.longreprtext[-TEXT_LIMIT:]}
        elif report.skipped and self.current["outcome"] == "passed":
            self.current |= {"outcome": "skipped", "text": getattr(report, "wasxfail", "") or _skip_reason(report)}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.put(id=nodeid, **self.current)
        if self.device == "cuda" and self.current["outcome"] == "failed":
            import torch

            try:
                torch.cuda.synchronize()
            except Exception:  # every later call would fail with the same error
                pytest.exit("the device is unusable in this process", returncode=BROKEN_DEVICE)


def _without_place(item: pytest.Item) -> str:
    place = getattr(item, "callspec", None) and item.callspec.params.get("place")
    return item.nodeid.replace("-".join(place), "") if place else item.nodeid


def _skip_reason(report: Any) -> str:
    where = report.longrepr
    return where[2].removeprefix("Skipped: ") if isinstance(where, tuple) else str(where)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(**json.loads(os.environ["FUSEDNORM_GPU_TESTS"])), "gpu-recorder")


# --- the processes ---


class Worker:
    """One pytest at a time over one part of the tests, begun again when it breaks."""

    def __init__(self, files: list[str], device: str, phase: str, shard: int, shards: int, folder: Path) -> None:
        self.files, self.shards = files, shards
        self.options = {"device": device, "phase": phase, "shard": shard, "shards": shards}
        self.path, self.output = folder / f"{phase}-{shard}.jsonl", folder / f"{phase}-{shard}.txt"
        self.path.touch()
        self.position, self.done, self.starts, self.progress = 0, [], 0, True
        self.current: str | None = None
        self.failed_to_collect = False
        self.since = time.monotonic()
        self.start()

    def start(self) -> None:
        self.starts, self.progress, self.since = self.starts + 1, False, time.monotonic()
        options = self.options | {"results": str(self.path), "done": self.done}
        env = os.environ | {"FUSEDNORM_GPU_TESTS": json.dumps(options), "PYTHONHASHSEED": "0"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        if self.shards > 1:
            env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.shards))
        if self.options["device"] == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "pytest", "-p", "tools.gpu_check.run_tests", "-p", "no:cacheprovider", "-q"]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--tb=short", *self.files], cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT
            )

    def news(self) -> list[dict[str, Any]]:
        """What was written down since the last call; `current` is the test under way."""
        with self.path.open("rb") as file:
            file.seek(self.position)
            *lines, _ = file.read().split(b"\n")
        self.position += sum(len(line) + 1 for line in lines)
        found = [json.loads(line) for line in lines]
        for record in found:
            if record.get("outcome") == "started":
                self.current = record["id"]
            elif "id" in record:
                self.current, self.progress = None, True
                self.done.append(record["id"])
                self.failed_to_collect |= "::" not in record["id"] and record["outcome"] == "failed"
            self.since = time.monotonic()
        return [record for record in found if record.get("outcome") != "started"]

    def lost(self, why: str) -> dict[str, Any]:
        """The record of the test under way (or of the worker itself), which nobody else will write."""
        name = self.current or f"worker {self.options['phase']}-{self.options['shard']}"
        text = f"{why}\n{self.output.read_text(encoding='utf-8', errors='replace')[-TEXT_LIMIT:]}"
        self.progress, self.current = self.progress or self.current is not None, None
        self.done.append(name)
        return {"id": name, "outcome": "failed", "seconds": round(time.monotonic() - self.since, 1), "text": text}

    def step(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether it goes on, and the news."""
        status = self.process.poll()
        found = self.news()
        allowed = LONGEST_TEST if self.current else LONGEST_SILENCE
        if status is None and time.monotonic() - self.since < allowed:
            return True, found
        if status is None:
            self.process.kill()
            self.process.wait()
            found += [*self.news(), self.lost(f"did not end in {allowed:g} s")]
        elif status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            return False, found
        elif status != BROKEN_DEVICE and (self.current or not self.failed_to_collect):
            found.append(self.lost(f"the process ended with status {status}"))
        if not self.progress or self.starts > RESTARTS or self.failed_to_collect:
            return False, found
        self.start()
        return True, found


class Board:
    """Every result so far: printed as it comes, counted, and written as JUnit's XML at the end."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.selected, self.started, self.spoken = 0, time.monotonic(), time.monotonic()

    def take(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            if "selected" in record:
                self.selected = max(self.selected, record["selected"])
                continue
            if record["id"] in self.records:  # every worker collects every file
                continue
            self.records[record["id"]] = record
            reason = f"  ({record['text']})" if record["outcome"] == "skipped" else ""
            print(f"{record['outcome'].upper():<8}{record['seconds']:7.2f}s {record['id']}{reason}")
            if record["outcome"] == "failed":
                print("    " + record["text"].replace("\n", "\n    "))
        if time.monotonic() - self.spoken > 10:
            self.spoken = time.monotonic()
            print(self.totals() if self.selected else "collecting the tests")
        sys.stdout.flush()

    def totals(self) -> str:
        counts = Counter(record["outcome"] for record in self.records.values())
        parts = ", ".join(f"{counts[o]} {o}" for o in ("failed", "passed", "skipped") if counts[o] or o != "skipped")
        return f"{len(self.records)} of {self.selected} tests in {time.monotonic() - self.started:.0f} s: {parts}"

    def good(self) -> bool:
        outcomes = {record["outcome"] for record in self.records.values()}
        return "failed" not in outcomes and "passed" in outcomes and len(self.records) >= self.selected

    def ending(self) -> None:
        failed = [record["id"] for record in self.records.values() if record["outcome"] == "failed"]
        reasons = Counter(r["text"] for r in self.records.values() if r["outcome"] == "skipped")
        slowest = sorted(self.records.values(), key=lambda record: -record["seconds"])[:5]
        print("\nslowest:", *(f"{r['seconds']:7.2f}s {r['id']}" for r in slowest), sep="\n  ")
        print("\n".join(f"skipped {count}: {reason}" for reason, count in reasons.most_common(20)))
        print("\n".join(f"FAILED {name}" for name in failed[:200]))

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


def test_files() -> list[str]:
    """The norm's tests, and every file with a test marked gpu."""
    marked = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in p.read_text("utf-8")]
    return [str(path) for path in dict.fromkeys([*marked, *(ROOT / "tests" / name for name in NORM_TESTS)])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="test files (default: see above)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: all cores but two, at most 12")
    parser.add_argument("--xml", type=Path, metavar="FILE", help="write JUnit's XML here")
    arguments = parser.parse_args(argv)
    cores, cpu = os.cpu_count() or 1, arguments.device == "cpu"
    shards = arguments.workers or max(1, min(cores // 2 if cpu else cores - 2, 12))
    files, board, workers = arguments.files or test_files(), Board(), []
    phases = [("all", shards)] if cpu else [("alone", 1), ("beside", shards)]
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            for phase, count in phases:
                workers = [Worker(files, arguments.device, phase, i, count, Path(folder)) for i in range(count)]
                while workers:
                    time.sleep(0.1)
                    steps = [(worker, *worker.step()) for worker in workers]
                    for _, _, news in steps:
                        board.take(news)
                    workers = [worker for worker, goes_on, _ in steps if goes_on]
        except KeyboardInterrupt:
            status = 130
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            for worker in workers:
                board.take(worker.news())
                under_way = f", {time.monotonic() - worker.since:.0f} s into {worker.current}" if worker.current else ""
                print(f"interrupted{under_way}")
                with contextlib.suppress(ProcessLookupError):
                    worker.process.kill()
            for worker in workers:
                worker.process.wait()
    board.ending()
    if arguments.xml:
        board.write_xml(arguments.xml)
    print(board.totals(), flush=True)
    return status or (0 if board.good() else 1)


if __name__ == "__main__":
    sys.exit(main())
