"""A child process under supervision: its group, its reports, and how often it is started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import gone, wait_for

from fusednorm.tuning import supervise
from fusednorm.tuning.supervise import Child, Lost, Supervised

ROOT = Path(__file__).resolve().parents[2]
HANG = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("then", "limit", "ended"),
    [
        ("child.wait()", 2.0, (None, True)),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN); child.wait()", 2.0, (None, True)),
        ("", 30.0, (0, False)),
    ],
    ids=["interrupted", "ignores_interrupts", "leaves_a_child_behind"],
)
def test_a_command_is_bounded_and_its_whole_group_dies(then, limit, ended, tmp_path):
    start, log, child = time.monotonic(), tmp_path / "log", f"[sys.executable, '-S', '-c', {HANG!r}]"
    program = (
        f"import signal, subprocess, sys; child = subprocess.Popen({child}); print('child', child.pid, flush=True)"
    )
    command = [sys.executable, "-S", "-c", f"{program}\n{then}"]
    assert supervise.run(command, log, {}, limit, lambda: None) == ended
    assert time.monotonic() - start < 6
    child = int(re.search(r"^child (\d+)$", log.read_text(), re.M)[1])
    wait_for(lambda: gone(child))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.parametrize("kind", ["command", "function"])
def test_a_child_dies_with_a_parent_that_is_killed(kind, tmp_path):
    """It leads a group of its own, which a signal to the parent's group does not reach."""
    parent = f"""
import sys, time
from fusednorm.tuning.supervise import Child
if {kind!r} == "command":
    child = Child.of_command([sys.executable, "-S", "-c", "import time; time.sleep(60)"], open("/dev/null", "wb"), {{}})
else:
    child = Child.of_function(lambda: time.sleep(60))
time.sleep(0.5)
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid) + ".")
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("."))
    child = int((tmp_path / "pid").read_text().rstrip("."))
    assert not gone(child) and os.getpgid(child) == child
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: gone(child))


def test_a_command_that_does_not_exist_is_said_in_the_log(tmp_path):
    ended = supervise.run(["/no/such/command"], tmp_path / "log", {}, 5.0, lambda: None)
    assert ended == (None, False)
    assert supervise.tail(tmp_path / "log")[-1].startswith("[Errno 2]")


def test_an_interrupted_command_still_writes_what_it_has(tmp_path):
    program = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what it has')"
    ended = supervise.run([sys.executable, "-S", "-c", program], tmp_path / "log", {}, 3.0, lambda: None)
    assert ended == (None, True) and supervise.tail(tmp_path / "log")[-1] == "what it has"


REPORTING = """
import json, sys
reports = open({path!r}, "a")
def put(*message): print(json.dumps(message), file=reports, flush=True)
{body}
"""


def supervised(tmp_path: Path, body: str, **options) -> Supervised:
    """A child that runs `body`, with the steps done and lost in `left_out`."""

    def start(of: Supervised) -> Child:
        program = REPORTING.format(path=str(of.reports), body=f"left_out = {[*of.done, *of.lost]!r}\n{body}")
        with of.output.open("ab") as output:
            return Child.of_command([sys.executable, "-S", "-c", program], output, {})

    return Supervised(start, lambda step: 10.0, tmp_path, **options)


def followed(tmp_path: Path, body: str, **options) -> tuple[list, Supervised]:
    """All its messages."""
    of, messages = supervised(tmp_path, body, **options), []
    while of.running:
        time.sleep(supervise.POLL)
        messages += of.poll()
    return messages, of


STEPS = """
for step in "abc":
    if step in left_out: continue
    put("trying", step)
    if step == "b": print("its last words", flush=True); sys.exit(4)
    put("case", {"name": step})
put("end", None)
"""


def test_a_step_that_ends_its_process_is_lost_and_the_others_are_done(tmp_path):
    messages, of = followed(tmp_path, STEPS)
    kinds = [(kind, content.step if kind == "lost" else content["name"]) for kind, content in messages]
    assert kinds == [("case", "a"), ("lost", "b"), ("case", "c")]
    (lost,) = (content for kind, content in messages if kind == "lost")
    assert isinstance(lost, Lost) and lost.reason == "its process ended with exit code 4"
    assert (of.done, of.lost) == (["a", "c"], {"b": lost.reason})
    assert "its last words" in of.output.read_text()


def test_it_is_started_no_oftener_than_allowed(tmp_path):
    dies = "step = str(len(left_out))\nput('trying', step)\nsys.exit(1)"
    messages, of = followed(tmp_path, dies, restarts=3)
    assert list(of.lost) == ["0", "1", "2", "3"]
    assert messages[-1] == ("stopped", "its process ended with exit code 1")


@pytest.mark.parametrize("said", ["", "put('end', None)"], ids=["nothing_said", "after_its_end"])
def test_a_process_that_crashes_before_it_tries_anything_is_not_started_again(said, tmp_path):
    messages, _ = followed(tmp_path, f"{said}\nimport os; os.kill(os.getpid(), 11)")
    assert messages == [("stopped", "its process ended with exit code -11")]


def test_stopping_hands_over_what_was_said(tmp_path):
    of = supervised(tmp_path, "put('case', {'name': 'a'})\nput('trying', 'b')\nimport time; time.sleep(60)")
    wait_for(lambda: "trying" in of.reports.read_text())
    assert of.stop() == [("case", {"name": "a"})] and of.step == "b" and not of.running
    assert of.stop() == []
