"""The code-generation gate of the CUDA kernels: what nvcc makes of them, without a GPU.

No spills, registers within what the table counts on, shared memory within a block's, and on the aligned path exactly
the 16-byte accesses of the byte model. `tools/codegen/cuda.py` compiles, and knows what there should be. One
architecture and two dtypes in every run, all of them by `make test-all`.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from backends import EMULATED
from shared import made_once

from tests.tools.test_codegen_norms import holds
from tools.codegen import cuda as codegen_cuda
from tools.codegen.cuda import ARCH_ON_PAGE, ARCHITECTURES, ON_PAGE, PAGE, faults, hold
from tools.codegen.cuda_forms import CUDA
from tools.codegen.cuda_kernel import PAIRS, STAGED, Kernel

pytestmark = pytest.mark.skipif(codegen_cuda.missing() is not None, reason=str(codegen_cuda.missing()))


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> list[Kernel]:
    return made_once(tmp_path_factory, "hopper", lambda folder: hold(ON_PAGE, ARCH_ON_PAGE, folder))


@pytest.mark.certifies("forward", "backward", op=("add_layer_norm", "bias_act_dropout"), provider="cuda", on="compiled")
def test_cuda_gate_on_hopper(hopper):
    assert len(hopper) == 2 * 21 + 21 + 16 + 4


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", PAIRS)
def test_cuda_gate_everywhere(source, arch, tmp_path):
    hold([source], arch, tmp_path)


def test_backward_keeps_to_the_registers_that_the_table_counts_on(hopper):
    """The table makes as many programs as fit at this many registers."""
    table = (CUDA / "norm" / "norm_table.h").read_text()
    counted = {name: int(n) for name, n in re.findall(r"\bk(Plain|Staged|Everything) = (\d+)", table)}
    most = dict.fromkeys(counted, 0)
    for k in hopper:
        if k.name == "add_layer_norm_bwd":
            kind = "Plain" if k.plain else "Staged" if k.constants[0] == STAGED else "Everything"
            most[kind] = max(most[kind], k.registers)
    assert all(counted[kind] - 16 <= n <= counted[kind] for kind, n in most.items()), most


PLANTED = {
    "spills": {"spilled": 8},
    "do not fit": {"registers": 136},
    "shared memory": {"shared": 49 << 10},
    "128-bit loads": {"accesses": (("LDG.E.128", 7),)},
    "narrow accesses": {"accesses": (("LDG.E.U16", 8),)},
    "copies to shared memory": {"accesses": (("LDGSTS.E.BYPASS.128", 4),)},
}


@pytest.mark.parametrize("said", PLANTED)
def test_cuda_gate_fails_on_what_is_planted(said, hopper):
    kernel = next(k for k in hopper if k.name == "add_layer_norm_bwd" and k.plain)
    assert any(said in fault for fault in faults(replace(kernel, **PLANTED[said])))


def test_committed_page_is_what_is_compiled(hopper):
    """After a change of the kernels or of their table: python3 -m tools.codegen.cuda --write"""
    committed = PAGE.read_text()
    if codegen_cuda.version() not in committed:  # another compiler takes other registers, for the same kernels
        assert holds(committed.splitlines(), [codegen_cuda.start(k) for k in sorted(hopper, key=lambda k: k.order)])
        return
    assert codegen_cuda.markdown(hopper) in committed
    if EMULATED:  # only there the table of forms can be asked
        try:
            assert committed == codegen_cuda.page(hopper)
        finally:
            torch.ops.fusednorm_cuda.emulate(128, 512, 8, 2, 1)
