"""Check everything that needs a GPU, on a machine that has only just been switched on and may soon be gone.

    python3 -m tools.gpu_check.check OUTDIR
    python3 -m tools.gpu_check.check OUTDIR --device cpu            # the same stages without a GPU
    python3 -m tools.gpu_check.check OUTDIR --stages tests,sanitizer --minutes 5
    python3 -m tools.gpu_check.check OUTDIR --stages environment,build,tune,targets

Needs torch, Triton and pytest, no network, and nothing installed of this repository. Stages: what the machine is; a
build of native code, if there is any; the tests that a GPU runs; compute-sanitizer over a few calls; a quick benchmark.
Two more run where --stages names them: the variants of the norms' kernels beside one another (tune), and what the
targets are about with the table of them (targets).

All of them end inside --minutes, what one leaves goes to the later ones, and each result is on disk as soon as it is
known: OUTDIR/summary.md and summary.json. Beside them: environment.txt (the machine, and the build), tests.log,
tests.xml, sanitizer.log, benchmark.log and benchmark.json, of which benchmarks.report.pages makes tables and pictures;
tune.log, tune.json, targets.log and targets.json. The stages of a plain call leave eight files at most, and so do the
four of the last line above, which `make gpu-norms` runs.

Exit status: 0 when every stage passed or had a good reason not to run; 1 otherwise; 2 for bad usage, or no GPU; 130
when interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.host import ROOT, ask, commit
from tools.gpu_check import stages as gpu_stages
from tools.gpu_check.environment import UNKNOWN_COMMIT, find_tool
from tools.gpu_check.stages import Stage

STAGES = ("environment", "build", "tests", "sanitizer", "benchmark")
ASKED_FOR = ("tune", "targets")  # beside the five they would not fit
TOOLS = ("memcheck", "racecheck", "initcheck")
TABLE_SECONDS = 15.0  # for the table of targets, imports included
LEAST_SECONDS = 35.0  # for the quick benchmark
CUDA_ATTENTION_SECONDS = 16.0  # for attention by provider cuda, imports included
# The machine's own, which every stage must share.
NOT_FROM_PEERS = ("torch", "triton", "fusednorm")
_DEVICE_CODE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


def device_name() -> tuple[str, str]:
    """The GPU's name, or why there is none. Asked in another process: a broken driver may never answer."""
    answer = ask(sys.executable, "-c", _DEVICE_CODE, seconds=120)
    if answer.well:
        return answer.out.strip(), "torch sees no GPU"
    return "", "torch: " + (answer.errors.strip().splitlines() or ["it cannot be imported"])[-1]


def unpack_peers(folder: Path, into: Path) -> list[str]:
    """The paths that make the packages in a folder of wheels, or of unpacked packages, importable."""
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        name = wheel.name.partition("-")[0].lower()
        if name in NOT_FROM_PEERS:
            gpu_stages.say(f"peers: {wheel.name} is not taken, {name} is the machine's own")
            continue
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(into)
        except (zipfile.BadZipFile, OSError) as error:
            gpu_stages.say(f"peers: {wheel.name} cannot be unpacked: {error}")
            continue
        gpu_stages.say(f"peers: {wheel.name}")
    unpacked = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and (path / "__init__.py").exists()]
    if unpacked:
        gpu_stages.say(f"peers: unpacked {', '.join(unpacked)}")
    paths = [into, *sorted(into.glob("*.data/*lib"))] if wheels else []
    paths += [folder] if unpacked or not wheels else []
    # an installer would have put *.pth where the interpreter reads them
    for file in sorted(into.glob("*.pth")):
        lines = file.read_text(encoding="utf-8").splitlines()
        paths += [into / line for line in lines if line.strip() and not line.startswith(("import", "#"))]
    return [str(path) for path in paths]


def missing_native_code() -> str:
    """Why there is nothing to build, or nothing where there is."""
    return "" if any((ROOT / place).is_dir() for place in ("csrc", "fusednorm/csrc")) else "there is no native code yet"


def missing_sanitizer(device: str) -> str:
    if device == "cpu":
        return "compute-sanitizer watches a GPU, and this run is without one"
    return (
        "" if find_tool("compute-sanitizer") else "compute-sanitizer is neither on the path nor in /usr/local/cuda/bin"
    )


def stages(outdir: Path, device: str, peers: Sequence[str]) -> list[Stage]:
    """All of them; `share` is out of seven minutes, or nine for those of ASKED_FOR, and is given on when not needed."""
    python = [sys.executable, "-u"]
    env = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore:Failed to initialize NumPy:UserWarning",  # torch says it in every process
        "MPLBACKEND": "Agg",
        **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
    }

    def sanitize(_: float) -> list[list[str]]:
        driver = [*python, "-m", "tools.gpu_check.sanitize"]
        # children are compilers; an error shows in the exit status
        options = ["--error-exitcode", "9", "--target-processes", "application-only", "--print-limit", "20"]
        tool = find_tool("compute-sanitizer") or "compute-sanitizer"
        return [driver, *([tool, "--tool", name, *options, *driver] for name in TOOLS)]

    def in_time(limit: float) -> str:
        """Of what takes no new case after so long: imports come before, the last case and the report after it."""
        return f"{max(3.0, 0.95 * limit - 25.0):.0f}"

    def tune(limit: float) -> list[list[str]]:
        command = [*python, "-m", "tools.tune.norms", "--device", device, "--limit", in_time(limit)]
        return [[*command, "--json", str(outdir / "tune.json")]]

    def targets(limit: float) -> list[list[str]]:
        raw, seconds = str(outdir / "targets.json"), in_time(limit - TABLE_SECONDS)
        command = [*python, "-m", "benchmarks.run", "--targets", "--device", device, "--limit", seconds]
        return [[*command, "--json", raw], [*python, "-m", "benchmarks.publish.targets", raw]]

    def benchmark(limit: float) -> list[list[str]]:
        quick = [*python, "-m", "benchmarks.run", "--quick", "--device", device]
        # by automatic choice Triton serves attention on a GPU; its CUDA C++ kernels stand beside eager in the log alone
        native = [*quick, "--only", "^attention", "--provider", "cuda", "--limit", f"{CUDA_ATTENTION_SECONDS / 2:.0f}"]
        # the stage before builds it; else there is no such provider
        built = (ROOT / "fusednorm" / "libfusednorm_cuda.so").exists()
        later = [native] if device == "cuda" and built and limit >= LEAST_SECONDS + CUDA_ATTENTION_SECONDS else []
        # imports come before that limit begins to count, the last case and the report after it
        cases_for = max(3.0, 0.8 * (limit - CUDA_ATTENTION_SECONDS * len(later)) - 15.0)
        return [[*quick, "--limit", f"{cases_for:.0f}", "--json", str(outdir / "benchmark.json")], *later]

    environment = [*python, "-m", "tools.gpu_check.environment"]
    tests = [*python, "-m", "tools.gpu_check.run_tests", "--device", device, "--xml", str(outdir / "tests.xml")]
    build = [*python, "setup.py", "build_ext", "--inplace"]
    named = os.environ.get("FUSEDNORM_CUDA_ARCHITECTURES") or (find_tool("nvidia-smi") and "native")
    native = {"FUSEDNORM_CUDA_ARCHITECTURES": named} if named else {}  # a fraction of the work of every generation
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that a tensor's end is the end of an allocation
    with_peers = {"PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], *peers])}
    return [
        Stage("environment", "environment.txt", 25, lambda _: [environment], env=env, most=90),
        # its output goes where that of the machine's description is: eight files in all
        Stage(
            *("build", "environment.txt", 80, lambda _: [build]),
            env=env | native,
            skip=missing_native_code(),
            most=180,
        ),
        Stage("tests", "tests.log", 200, lambda _: [tests], ("tests.xml",), env),
        Stage("sanitizer", "sanitizer.log", 75, sanitize, env=env | uncached, skip=missing_sanitizer(device)),
        Stage(
            *("benchmark", "benchmark.log", 35, benchmark, ("benchmark.json",), env | with_peers),
            brief=CUDA_ATTENTION_SECONDS,
        ),
        Stage("tune", "tune.log", 120, tune, ("tune.json",), env, most=180),
        Stage("targets", "targets.log", 300, targets, ("targets.json",), env | with_peers, brief=TABLE_SECONDS),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outdir", type=Path, metavar="OUTDIR", help="made if it is not there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=7.0, metavar="M", help="for everything (default: %(default)s)")
    others = ", ".join(ASKED_FOR)
    parser.add_argument("--stages", default=",".join(STAGES), metavar="NAMES", help=f"%(default)s (default); {others}")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="wheels or packages to be measured against")
    arguments = parser.parse_args(argv)
    arguments.stages = [name for name in re.split(r"[,\s]+", arguments.stages) if name]
    known = (*STAGES, *ASKED_FOR)
    if unknown := [name for name in arguments.stages if name not in known]:
        parser.error(f"--stages: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    if not arguments.stages:
        parser.error("--stages names none")
    if not 0 < arguments.minutes < 1e4:
        parser.error(f"--minutes {arguments.minutes:g}: must be positive")
    if arguments.peers and not arguments.peers.is_dir():
        parser.error(f"--peers {arguments.peers}: is no folder")
    try:
        arguments.outdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"OUTDIR: {error}")
    arguments.outdir = arguments.outdir.resolve()
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments, start = parse(argv), time.monotonic()
    name, why = ("none, as asked for", "") if arguments.device == "cpu" else device_name()
    if not name:
        print(
            f"{why}: there is nothing to check here. Without a GPU, the same stages run with --device cpu:\n"
            f"  {sys.executable} -m tools.gpu_check.check {arguments.outdir} --device cpu",
            file=sys.stderr,
        )
        return 2
    os.chdir(ROOT)
    facts = {
        "GPU": name,
        "commit": commit() or UNKNOWN_COMMIT,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["tools.gpu_check.check", *(sys.argv[1:] if argv is None else argv)]),
    }
    with tempfile.TemporaryDirectory(prefix="fusednorm-peers-") as folder:
        peers = unpack_peers(arguments.peers.resolve(), Path(folder)) if arguments.peers else []
        chosen = [s for s in stages(arguments.outdir, arguments.device, peers) if s.name in arguments.stages]
        seconds = arguments.minutes * 60 - (time.monotonic() - start)
        run = gpu_stages.Run(chosen, arguments.outdir, seconds, facts)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, run.stop)
        try:
            return 0 if run.run() else 1
        except KeyboardInterrupt:
            print(f"\ninterrupted; what was known is in {arguments.outdir / 'summary.md'}", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
