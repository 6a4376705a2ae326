"""The one command for a GPU machine: bounded stages, results kept when cut off, tests that survive a crash. No GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from backends import EMULATED
from processes import wait_for

from fusednorm.tuning.supervise import Child
from tools.gpu_check import check as gpu_check
from tools.gpu_check import run_tests as gpu_tests
from tools.gpu_check import stages as gpu_stages
from tools.gpu_check.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
HANG = "import time; time.sleep(60)"


def stage(name: str, *programs: str, share: float = 10, **options) -> Stage:
    return Stage(name, f"{name}.log", share, lambda _: [[sys.executable, "-c", p] for p in programs], **options)


def check(folder: Path, seconds: float, *stages: Stage) -> dict:
    """The summary of a run, by stage; its other entries under ''."""
    run = gpu_stages.Run(stages, folder, seconds, {"GPU": "none"})
    well = run.run()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["passed"] == well and summary["finished"]
    return {result["name"]: result for result in summary["stages"]} | {"": summary}


def test_results_and_exit_of_good_and_failing_stages(tmp_path):
    found = check(tmp_path, 60, stage("good", "print('fine')"), stage("absent", skip="nothing to do here"))
    assert found[""]["passed"]
    assert (found["good"]["status"], found["good"]["tail"][-1]) == ("passed", "fine")
    assert (found["absent"]["status"], found["absent"]["reason"]) == ("skipped", "nothing to do here")
    found = check(tmp_path, 60, stage("bad", "print('early'); raise SystemExit(3)", "print('late')"), stage("good", ""))
    assert not found[""]["passed"]
    assert found["bad"]["status"] == "failed" and "exit status 3" in found["bad"]["reason"]
    assert found["bad"]["tail"][-1] == "late"  # a command that fails does not keep the next from running
    assert found["good"]["status"] == "passed"
    text = (tmp_path / "summary.md").read_text()
    assert "Not well: bad." in text and "early" in text


def test_time_that_a_stage_leaves_goes_to_the_later_ones_and_a_stage_without_any_is_no_success(tmp_path):
    stages = [stage("one", "", share=20), stage("skipped", share=30, skip="why not"), stage("two", "", share=20)]
    found = check(tmp_path, 100, *stages)
    assert found["one"]["limit"] in (78, 79)  # all but a second and what the last one keeps
    assert found["two"]["limit"] > 90
    found = check(tmp_path, 21, stage("one", "", share=60), stage("two", "", share=20))
    assert found["one"]["limit"] in (14, 15)  # too little for both: in proportion
    found = check(tmp_path, 100, stage("one", "", share=20, most=7), stage("two", "", share=20))
    assert (found["one"]["limit"], found["two"]["limit"] > 90) == (7, True)
    found = check(tmp_path, 2.5, stage("one", "", share=10), stage("two", "", share=10))
    assert {found["one"]["status"], found["two"]["status"]} == {"not run"}
    assert not found[""]["passed"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_run_that_is_cut_off_keeps_what_it_has(how, tmp_path, monkeypatch):
    stages = [stage("environment", "print('the machine')"), stage("tests", HANG), stage("benchmark", "")]
    monkeypatch.setattr(gpu_check, "stages", lambda *_: stages)
    arguments = [str(tmp_path), "--device", "cpu", "--minutes", "1"]
    child = Child.of_function(lambda: sys.exit(gpu_check.main(arguments)))

    def statuses() -> list[str]:
        return [s["status"] for s in json.loads((tmp_path / "summary.json").read_text())["stages"]]

    wait_for((tmp_path / "summary.json").exists)
    wait_for(lambda: statuses() == ["passed", "running", "not run"])
    os.kill(child.pid, how)
    wait_for(child.ended)
    assert "the machine" in (tmp_path / "summary.md").read_text()
    assert statuses() == ["passed", "cut off" if how == signal.SIGTERM else "running", "not run"]
    assert json.loads((tmp_path / "summary.json").read_text())["finished"] is False
    assert child.end() == (130 if how == signal.SIGTERM else -signal.SIGKILL)


def test_a_brief_last_command_leaves_the_time_to_the_first(tmp_path):
    commands = ["", "", ""]
    found = check(tmp_path, 100, stage("equal", *commands, most=30), stage("brief", *commands, most=30, brief=2.0))
    assert [found[name]["status"] for name in ("equal", "brief")] == ["passed"] * 2
    for brief, first in ((None, 1.0), (0.2, 2.6)):
        begun = time.monotonic()
        (found, _) = check(tmp_path, 100, stage("slow", HANG, "", "", most=3, brief=brief)).values()
        assert found["status"] == "timed out" and f"its {first:.0f} s were up" in found["reason"]
        assert time.monotonic() - begun < 5


def test_environment_stage_end_to_end(tmp_path, capfd):
    assert gpu_check.main([str(tmp_path), "--device", "cpu", "--stages", "environment,sanitizer"]) == 0
    out = capfd.readouterr().out
    assert "All is well" in out and "without one" in out
    assert {path.name for path in tmp_path.iterdir()} == {"environment.txt", "summary.json", "summary.md"}
    assert f"torch {torch.__version__}" in (tmp_path / "environment.txt").read_text()
    assert "| environment | passed" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("device", "built", "seconds", "measured"),
    [("cuda", True, 60.0, True), ("cuda", True, 35.0, False), ("cuda", False, 60.0, False), ("cpu", True, 60.0, False)],
)
def test_attention_in_cuda_is_measured_where_it_is_built_and_time_is_left(
    device, built, seconds, measured, tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    if built:
        (tmp_path / "fusednorm").mkdir()
        (tmp_path / "fusednorm" / "libfusednorm_cuda.so").touch()
    (benchmark,) = (s for s in gpu_check.stages(tmp_path, device, []) if s.name == "benchmark")
    quick, *native = benchmark.commands(seconds)
    asked_for = ["--only", "^attention", "--provider", "cuda", "--limit", "8"]
    assert [command[-6:] for command in native] == [asked_for] * measured
    first = float(quick[quick.index("--limit") + 1])
    assert 13 <= first <= seconds - 15 - benchmark.brief * len(native)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_type(tmp_path, capsys):
    assert gpu_check.main([str(tmp_path)]) == 2
    assert "--device cpu" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_bad_arguments_are_named(tmp_path, capsys):
    for arguments, message in ((["--stages", "test"], "unknown test"), (["--minutes", "0"], "must be positive")):
        with pytest.raises(SystemExit):
            gpu_check.main([str(tmp_path), *arguments])
        assert message in capsys.readouterr().err


def test_peers_are_unpacked_and_named(tmp_path, capsys):
    folder, into = tmp_path / "peers", tmp_path / "into"
    (folder / "plain").mkdir(parents=True)
    into.mkdir()
    (folder / "plain/__init__.py").touch()
    for name in ("peer_a-1.0-py3-none-any.whl", "torch-9.0-py3-none-any.whl"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(f"{name.partition('-')[0]}/__init__.py", "VALUE = 7")
            archive.writestr("beside.pth", "nested/packages\n")
    (folder / "broken-1.0-py3-none-any.whl").write_text("no archive")
    paths = gpu_check.unpack_peers(folder, into)
    assert paths == [str(into), str(folder), str(into / "nested/packages")]
    assert not (into / "torch").exists()
    out = capsys.readouterr().out
    assert "peers: peer_a-1.0-py3-none-any.whl\n" in out and "plain" in out
    assert "broken-1.0-py3-none-any.whl cannot be unpacked" in out and "torch is the machine's own" in out


PLANTED = """
import os, time, pytest
def test_right(): pass
def test_wrong(): assert 1 == 2
def test_skipped(): pytest.skip("not today")
def test_dies(): os._exit(9)
@pytest.mark.slow
def test_slow(): assert False
def test_last(): pass
def test_hangs(): time.sleep(60)
"""


GPU = f"import os, pytest\npytestmark = pytest.mark.{'gpu'}\n"  # in two parts: this file is not one of a GPU's


@pytest.fixture
def planted(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # each of the processes would import them all
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    slow\n    alone\n")
    file = tmp_path / "test_planted.py"
    file.write_text(PLANTED)
    return file


def outcomes(path: Path) -> dict[str, str]:
    cases = ElementTree.parse(path).getroot().iter("testcase")
    return {case.get("name"): case[0].tag if len(case) else "passed" for case in cases}


def run_tests(status: int, *files: Path, device: str = "cpu", workers: int = 1) -> dict[str, str]:
    """The outcome of each test; the run has to end with this status."""
    xml = files[0].with_suffix(".xml")
    arguments = [*map(str, files), "--device", device, "--workers", str(workers), "--xml", str(xml)]
    assert gpu_tests.main(arguments) == status
    return outcomes(xml)


def test_tests_after_a_crash_still_run_and_one_that_does_not_end_is_given_up(planted, monkeypatch, capfd):
    monkeypatch.setattr(gpu_tests, "LONGEST_TEST", 1.0)
    expected = {"test_right": "passed", "test_wrong": "failure", "test_skipped": "skipped", "test_dies": "failure"}
    assert run_tests(1, planted) == expected | {"test_last": "passed", "test_hangs": "failure"}
    out = capfd.readouterr().out
    assert all(said in out for said in ("exit code 9", "assert 1 == 2", "(not today)", "no answer in 1 s"))
    assert out.splitlines()[-1].startswith("6 of 6 tests") and "3 failed, 2 passed, 1 skipped" in out


def test_tests_after_a_fault_of_the_device_get_a_new_process(planted, tmp_path):
    """Without a GPU every process counts as one whose device is gone."""
    note = f"def note(): open({str(tmp_path / 'pids')!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
    planted.write_text(GPU + note + "def test_1(): note(); assert 0\ndef test_2(): note()\ndef test_3(): note()\n")
    found = run_tests(1, planted, device="cuda")
    assert found == {"test_1": "failure", "test_2": "passed", "test_3": "passed"}
    first, second, third = (tmp_path / "pids").read_text().split()
    assert second == third
    assert torch.cuda.is_available() or first != second


def test_an_interrupted_test_run_says_how_far_it_came(planted, tmp_path):
    xml, log = tmp_path / "tests.xml", tmp_path / "log"
    command = [sys.executable, "-m", "tools.gpu_check.run_tests", str(planted), "--device=cpu", "--xml", str(xml)]
    with log.open("wb") as output:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([*command, "--workers=1"], cwd=ROOT, env=env, stdout=output)
        wait_for(lambda: "test_last" in log.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert "s into" in log.read_text() and "test_hangs" in log.read_text()
    assert log.read_text().splitlines()[-1].startswith("5 of 6 tests")
    assert len(outcomes(xml)) == 5


def test_workers_share_the_tests_without_loss(planted, tmp_path):
    dealt, alone = tmp_path / "norm" / "test_norm.py", planted
    dealt.parent.mkdir()
    note = f"import os, pytest\ndef note(): open({str(tmp_path / 'pids')!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
    dealt.write_text(note + "@pytest.mark.parametrize('n', range(7))\ndef test_n(n): note()\n")
    alone.write_text(note + "@pytest.mark.parametrize('n', range(4))\ndef test_m(n): note()\n")
    assert run_tests(0, dealt, alone, workers=6) == {
        f"test_{name}[{n}]": "passed" for name, count in (("n", 7), ("m", 4)) for n in range(count)
    }
    ran = Counter((tmp_path / "pids").read_text().split())
    assert sorted(ran.values()) == [3, 4, 4]  # two processes share the one file, a third has the other


def test_a_file_that_cannot_be_collected_fails_once_and_stops_no_other(planted, tmp_path, capfd):
    broken = tmp_path / "test_broken.py"
    planted.write_text(GPU + "def test_right(): pass\n")
    broken.write_text("import no_such_module\n")
    found = run_tests(1, planted, broken, device="cuda", workers=2)
    assert len(found) == 2 and found["test_right"] == "passed"
    assert "no_such_module" in planted.with_suffix(".xml").read_text()
    assert capfd.readouterr().out.count("FAILED     0.00s") == 1


def test_tests_marked_alone_run_before_all_others_in_one_process(planted, tmp_path):
    note = f"def note(n): open({str(tmp_path / 'seen')!r}, 'a').write(f'{{os.getpid()}} {{n}}\\n')\n"
    other = tmp_path / "test_other.py"
    for file, first in ((planted, 0), (other, 10)):
        tests = f"def test_{first}(): note('beside')\n@pytest.mark.alone\ndef test_{first + 1}(): note('alone')\n"
        file.write_text(GPU + note + tests)
    run_tests(0, planted, other, device="cuda", workers=2)
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert [phase for _, phase in seen] == ["alone", "alone", "beside", "beside"]
    assert len({pid for pid, phase in seen if phase == "alone"}) == 1
    assert len({pid for pid, phase in seen if phase == "beside"}) == 2


def test_our_kernels_are_tested_first_and_every_file_is_counted(planted, capfd):
    """What is slow in Triton's interpreter comes last."""
    places = [(name, "cuda") for name in ("reference", "torch", "automatic", "triton")] + [("triton", "cpu")]
    over = f"@pytest.mark.parametrize('place', {places!r}, ids='-'.join)\ndef "
    planted.write_text(f"import pytest\n{over}test_all(place): pass\n@pytest.mark.slow\n{over}test_slow(place): pass\n")
    found = run_tests(0, planted, device="cuda")
    ran = [f"test_all[{name}-cuda]" for name in ("triton", "automatic", "reference", "torch")]
    assert list(found) == [*ran, "test_slow[triton-cuda]"]
    assert "planted 5/5\n5 of 5 tests" in capfd.readouterr().out


def test_the_gpu_files_are_found():
    tests = Path(__file__).resolve().parents[1]
    names = {f"/{Path(path).relative_to(tests).as_posix()}" for path in gpu_tests.test_files()}
    assert names >= {
        *(f"/norm/test_{name}.py" for name in ("norm", "edges", "memory_efficient", "torch_compat")),
        *(f"/attention/test_{name}.py" for name in ("attention", "autograd", "extremes", "masked")),
        *(f"/activation/test_{name}.py" for name in ("activation", "autograd")),
        *(f"/integration/test_{name}.py" for name in ("compile", "dropout", "ops", "transforms", "transforms_nested")),
        *(f"/modules/test_{name}.py" for name in ("attention", "norm", "transformer_layers", "transformer_stacks")),
        *(f"/reported/test_{name}.py" for name in ("attention", "layers", "norm", "norm_gpu")),
        *("/dispatch/test_fastpath_cuda.py", "/providers/cuda/test_first_launch.py"),
    }
    assert str(Path(__file__)) not in gpu_tests.test_files()


def test_sanitized_calls_reach_every_form_of_the_kernels(monkeypatch):
    pytest.importorskip("triton")
    from fusednorm import dispatch
    from fusednorm.providers.triton import host as triton_host
    from fusednorm.providers.triton import launch as triton_launch
    from tools.gpu_check import sanitize as gpu_sanitize

    monkeypatch.setattr(triton_launch.Variant, "launch", lambda *_: None)
    monkeypatch.setattr(triton_host, "INTERPRETING", True)
    monkeypatch.setitem(dispatch.registry._reasons, "triton", None)
    with gpu_sanitize.noted() as reached:
        for work in gpu_sanitize.WORKS:
            gpu_sanitize.results(work, "cpu", "triton", *gpu_sanitize.tensors(work))
    assert reached | {"dropout", "strided"} == set(gpu_sanitize.FORMS)
    # nothing was computed, so the results are not right, and it says so
    assert "is off by" in gpu_sanitize.fault(gpu_sanitize.WORKS[1], "cpu")


@pytest.mark.skipif(not EMULATED, reason="no g++ to build the kernels for the host")
def test_sanitized_calls_reach_every_form_of_the_native_kernels():
    pytest.importorskip("triton")
    from fusednorm import dispatch
    from tools.gpu_check import sanitize as gpu_sanitize
    from tools.gpu_check import sanitize_cuda as gpu_sanitize_cuda

    assert dispatch.unavailable_reason("cuda") is None
    reached: set[str] = set()
    try:
        torch.ops.fusednorm_cuda.emulate(128, 512, 8, 132, 1)  # a GPU with clusters
        for work in gpu_sanitize.CUDA_WORKS:
            reached |= gpu_sanitize.native_forms(work, "cpu")
            if work.rows * work.columns < 8192:
                assert not gpu_sanitize.fault(work, "cpu"), work
    finally:
        torch.ops.fusednorm_cuda.emulate(128, 512, 1, 1, 1)
    assert reached == set(gpu_sanitize_cuda.FORMS)
