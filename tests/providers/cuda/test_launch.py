"""The host's side of a launch, compiled by nvcc and run without a GPU."""

from __future__ import annotations

from pathlib import Path

import emulated
import pytest

from tools.codegen.cuda import NVCC

SOURCE = Path(emulated.__file__).parent / "csrc" / "launches.cu"


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_shared_memory_is_asked_for_once_for_each_kernel_and_device(tmp_path):
    emulated.run([NVCC, "-std=c++17", f"-I{emulated.CSRC}", str(SOURCE), "-o", str(tmp_path / "launches")])
    said = emulated.run([str(tmp_path / "launches")]).splitlines()
    assert said == ["shared memory: out of memory", "0 60000", "0 100000", "1 60000", "1 100000", "1 60000"]
