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
OF_GROUPS, BEGUN, WAITS = "HGMMA.64x64x16.F32.BF16", "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE"
FENCE = "FENCE.VIEW.ASYNC"
SOUND = Kernel(
    arch="80",
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


def of_groups(**counts):
    """Units of SOUND on sm_90a, but for those said."""
    sound = {OF_GROUPS: 24, COPIES: 24, BEGUN: 4, WAITS: 4, FENCE: 1}
    return {"arch": "90a", "units": tuple((sound | counts).items())}


HOPPER = replace(SOUND, **of_groups())
PLANTED = {
    "spills": {"spilled": 8},
    "no block": {"registers": 520},
    "no 16-byte copies": {"units": ((PRODUCTS, 128), (LOADS, 80))},
    "of warpgroups, not 128 and 0": {"units": ((PRODUCTS, 96), (COPIES, 24), (LOADS, 80))},
    "of warpgroups, not 0 and 24": {"arch": "90a"},
    "wait 24 times": of_groups(**{WAITS: 24}),
    "wait 0 times": of_groups(**{WAITS: 0}),
    "begin 3 times": of_groups(**{BEGUN: 3}),
    "0 fences": of_groups(**{FENCE: 0}),
    "loads of matrices": {"units": ((PRODUCTS, 128), (COPIES, 24))},
    "round float32": {"types": ("float",)},
}


@pytest.mark.parametrize("copies", [COPIES, "LDGSTS.E.BYPASS.128.ZFILL"])  # up to sm_90, and from sm_100 on
def test_cuda_attention_gate_passes_what_is_sound(copies):
    assert gate.faults(replace(SOUND, units=((PRODUCTS, 128), (copies, 24), (LOADS, 80)))) == []
    assert gate.faults(replace(HOPPER, **of_groups(**{COPIES: 0, copies: 24}))) == []


@pytest.mark.parametrize("said", PLANTED)
def test_cuda_attention_gate_fails_on_what_is_planted(said):
    assert any(said in fault for fault in gate.faults(replace(SOUND, **PLANTED[said])))


def test_page_of_cuda_attention_has_figures_of_sm_90a_and_registers_of_every_architecture(monkeypatch):
    monkeypatch.setattr(gate, "version", lambda: "nvcc")
    float16 = [replace(k, types=("Float16",)) for k in (SOUND, HOPPER)]
    figures, registers = gate.page([SOUND, replace(HOPPER, registers=242), *float16]).split("## Registers of a thread")
    assert [line for line in figures.splitlines() if line.startswith("| attention")] == [
        "| attention_bwd_dkv | 128 | causality, windows | BFloat16 | 90a | 242 | 0 | 128 | 2 | 24 | 0 | 0 |"
    ]
    assert [line for line in registers.splitlines() if line.startswith("|")] == [
        "| kernel | columns | takes | dtype | sm_80 | sm_90a |",
        "|---|--:|---|---|--:|--:|",
        "| attention_bwd_dkv | 128 | causality, windows | BFloat16 | 255 | 242 |",
        "| attention_bwd_dkv | 128 | causality, windows | Float16 | 255 | 255 |",
    ]


@pytest.mark.slow
@pytest.mark.skipif(codegen_cuda.missing() is not None, reason=str(codegen_cuda.missing()))
@pytest.mark.parametrize("arch", gate.ARCHITECTURES)
@pytest.mark.parametrize("source", gate.SOURCES)
def test_cuda_attention_gate_everywhere(source, arch, tmp_path):
    assert gate.broken(gate.compile_source(source, arch, tmp_path)) == []
