"""A new Python process, in which nothing of the package was called yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str) -> str:
    """What it prints; it has to end well."""
    variables = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'helpers'}",
        "FUSEDNORM_EMULATE": "",
        "TRITON_INTERPRET": "0",
    }
    environment = {name: value for name, value in (os.environ | variables).items() if value}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
