"""A new Python process, in which nothing of the package was called yet.

`python` forks it from a process that has imported torch alone, so that this import is paid once and not in every test.
`interpreter` starts Python anew: for what happens before torch is there, at the interpreter's end, or by variables that
libraries read when they are loaded.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, **variables: str) -> str:
    """What it prints; it has to end well. The arguments: -c and a program, -m and a module, or a file, and its own."""
    environment = _environment(variables)
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        process = server().Process(target=_run, args=(arguments, environment, said))
        process.start()
        process.join(900)
        process.kill()
        process.join()
        out, err = (path.read_text() if path.exists() else "" for path in said)
    assert process.exitcode == 0, f"it ended with {process.exitcode}: {out[-2000:]}{err[-6000:]}"
    return out


def interpreter(*arguments: str, **variables: str) -> str:
    """As `python`, by a Python that is started anew and torn down at its end."""
    command, environment = [sys.executable, *arguments], _environment(variables)
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)
    assert run.returncode == 0, f"it ended with {run.returncode}: {run.stdout[-2000:]}{run.stderr[-6000:]}"
    return run.stdout


def _environment(variables: dict[str, str]) -> dict[str, str]:
    """An empty variable is an absent one."""
    usual = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}",
        "FUSEDNORM_EMULATE": "",
        "TRITON_INTERPRET": "0",
    }
    return {name: value for name, value in (os.environ | usual | variables).items() if value}


@functools.cache
def server() -> ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch"])
    return server


def _run(arguments: tuple[str, ...], environment: dict[str, str], said: list[Path]) -> None:
    """In the new process: as `python` would, with its output in files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for descriptor, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    option = arguments[0] if arguments[0] in ("-c", "-m") else ""
    assert option or not arguments[0].startswith("-"), f"{arguments[0]}: pass it to interpreter()"
    what, *sys.argv[1:] = arguments[1:] if option else arguments
    sys.argv[0] = option or what
    if option == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")
