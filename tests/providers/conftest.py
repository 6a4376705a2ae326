"""The kernels that run without a GPU: CUDA's in their emulation, Triton's in its interpreter."""

from __future__ import annotations

import pytest
import torch
from backends import EMULATED, INTERPRETED

import fusednorm

# threads of a forward block for each vector, of a backward block, blocks of a cluster, multiprocessors
MACHINE = (128, 512, 8, 2)


@pytest.fixture
def cuda():
    """The CUDA kernels are chosen. Tests may emulate another machine, or threads in the order of another seed."""
    if not EMULATED:
        pytest.skip("a GPU runs the kernels itself, in every other test, or no g++")
    torch.ops.fusednorm_cuda.emulate(*MACHINE, 1)
    with fusednorm.use_provider("cuda"):
        yield
    torch.ops.fusednorm_cuda.emulate(*MACHINE, 1)


@pytest.fixture
def triton():
    """The Triton kernels are chosen."""
    if not INTERPRETED:
        pytest.skip("a GPU runs the kernels itself, in every other test")
    with fusednorm.use_provider("triton"):
        yield
