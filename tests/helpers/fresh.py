"""A new Python process, in which nothing of the package was called yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, **variables: str) -> str:
    """What it prints; it has to end well. An empty variable is an absent one."""
    usual = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}",
        "FUSEDNORM_EMULATE": "",
        "TRITON_INTERPRET": "0",
    }
    environment = {name: value for name, value in (os.environ | usual | variables).items() if value}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout
