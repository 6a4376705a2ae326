"""The code-generation gate of the CUDA attention kernels: what nvcc makes of them, without a GPU.

No spills, copies of 16 bytes to shared memory, and as many matrix instructions as the products have. One source takes
nvcc a minute or two, so the gate itself is for `make test-all`; what it finds is tested every time.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools.codegen import cuda as codegen_cuda
from tools.codegen import cuda_attention as gate
from tools.codegen.cuda_kernel import Kernel

COPIES, PRODUCTS, LOADS = "LDGSTS.E.BYPASS.128", "HMMA.16816.F32.BF16", "LDSM.16.M88.4"
SOUND = Kernel(
    arch="90a",
    name="attention_bwd_dkv",
    types=("BFloat16",),
    constants=(128, 0, 2, 128, 1),
    registers=255,
    stack=0,
    spilled=0,
    shared=0,
    accesses=(),
    units=((PRODUCTS, 128), (COPIES, 24), (LOADS, 80)),
)
PLANTED = {
    "spills": {"spilled": 8},
    "no block": {"registers": 520},
    "no 16-byte copies": {"units": ((PRODUCTS, 128), (LOADS, 80))},
    "matrix instructions, not 128": {"units": ((PRODUCTS, 96), (COPIES, 24), (LOADS, 80))},
    "loads of matrices": {"units": ((PRODUCTS, 128), (COPIES, 24))},
    "round float32": {"types": ("float",)},
}


@pytest.mark.parametrize("copies", [COPIES, "LDGSTS.E.BYPASS.128.ZFILL"])  # up to sm_90, and from sm_100 on
def test_cuda_attention_gate_passes_what_is_sound(copies):
    assert gate.faults(replace(SOUND, units=((PRODUCTS, 128), (copies, 24), (LOADS, 80)))) == []


@pytest.mark.parametrize("said", PLANTED)
def test_cuda_attention_gate_fails_on_what_is_planted(said):
    assert any(said in fault for fault in gate.faults(replace(SOUND, **PLANTED[said])))


@pytest.mark.slow
@pytest.mark.skipif(codegen_cuda.missing() is not None, reason=str(codegen_cuda.missing()))
@pytest.mark.parametrize("arch", gate.ARCHITECTURES)
@pytest.mark.parametrize("source", gate.SOURCES)
def test_cuda_attention_gate_everywhere(source, arch, tmp_path):
    assert gate.broken(gate.compile_source(source, arch, tmp_path)) == []
