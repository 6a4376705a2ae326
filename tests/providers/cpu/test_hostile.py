"""Calls that no caller should make end in a result or an exception, and not with the process; hostile.py makes them."""

from __future__ import annotations

import os

import pytest
from fresh import interpreter

from fusednorm import dispatch

REASON = dispatch.unavailable_reason("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"provider cpu: {REASON}")


@pytest.mark.parametrize("group", ["sizes", "gradients", "freed", "arguments", "fuzz 0", "fuzz 1"])
def test_hostile(group):
    emulation = os.environ.get("FUSEDNORM_EMULATE", "")
    said = interpreter("tests/helpers/hostile.py", *group.split(), FUSEDNORM_EMULATE=emulation)
    assert said.endswith("survived\n")
