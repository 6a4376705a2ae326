"""Calls that no caller should make end in a result or an exception, and not with the process; hostile.py makes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusednorm import dispatch

REASON = dispatch.unavailable_reason("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"provider cpu: {REASON}")
ROOT = Path(__file__).resolve().parents[3]


def survives(*arguments: str) -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-X", "faulthandler", str(ROOT / "tests" / "helpers" / "hostile.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0 and done.stdout.endswith("survived\n"), done.stdout[-2000:] + done.stderr[-6000:]


@pytest.mark.parametrize("group", ["sizes", "gradients", "freed", "arguments"])
def test_hostile(group):
    survives(group)


@pytest.mark.parametrize("seed", range(2))
def test_operators_survive_what_is_drawn(seed):
    survives("fuzz", str(seed))
