"""How the machine code of the CUDA kernels is read, and what is concluded from it, on code that is planted."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable

import pytest
import torch
from backends import EMULATED
from torch.profiler import ProfilerActivity, profile

from fusednorm._options import NormGradOptions, NormSaved
from fusednorm.providers.cuda import norm as cuda
from tools.codegen import cuda as codegen_cuda
from tools.codegen import cuda_forms as forms
from tools.codegen import results
from tools.codegen.cuda_kernel import Kernel
from tools.codegen.cuda_sass import Instruction, hot_loop, instructions, kernels, loops

# A loop over rows with another in it and a branch that skips, then a larger loop without loads, and behind the end a
# wait that branches back into the first.
CODE = """
    LDC R1, c[0x0][0x28]
    ISETP.NE.AND P0, PT, R17, 0x1, PT
    @!P0 NOP
    LDG.E.128 R4, desc[UR4][R2.64]
    SHFL.BFLY PT, R5, R4, R6, 0x1f
    @P1 BRA 0x40
    @!P2 BRA 0x160
    @!P0 BRA 0x90
    STG.E.128 desc[UR4][R2.64], R4
    @!P0 BRA P1, 0x20
    LDS R1, [R2]
    LDS R1, [R2]
    LDS R1, [R2]
    LDS R1, [R2]
    LDS R1, [R2]
    LDS R1, [R2]
    LDS R1, [R2]
    LDS R1, [R2]
    ERRBAR
    CALL.REL.NOINC 0x0
    @P0 BRA 0xa0
    EXIT
    SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R13], R12
    @!P2 BRA 0x160
    BRA 0x70
    BRA 0x190
    NOP
"""
ROWS = [0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0x90, 0x160, 0x170, 0x180]


def sass(code: str) -> str:
    """As cuobjdump prints it."""
    lines = enumerate(code.strip().splitlines())
    encoded = "/* 0x00000a00ff017b82 */\n" + " " * 40 + "/* 0x000ff00000000800 */"
    return "\n".join(f"        /*{16 * i:04x}*/    {line.strip()} ;    {encoded}" for i, line in lines)


def addresses(program: Iterable[Instruction]) -> list[int]:
    return [i.address for i in program]


def test_instructions_of_a_kernel_and_where_they_lead():
    text = "".join(f"\t\tFunction : {name}\n\t.headerflags\t@SM90\n{sass(CODE)}\n" for name in ("planted", "another"))
    program = {i.address: i for i in kernels(text)["planted"]}
    assert list(program) == [a for a in range(0, 0x1A0, 16) if a != 0x20]
    assert program[0x30].opcode == "LDG.E.128" and program[0x30].reads_memory and program[0x30].target is None
    assert program[0x120].opcode == "ERRBAR"
    branches = {a: (i.target, i.conditional) for a, i in program.items() if i.target is not None}
    assert branches[0x50] == (0x40, True) and branches[0x90] == (0x20, True)
    assert branches[0x180] == (0x70, False) and branches[0x130] == (0, False)
    assert set(branches) == {0x50, 0x60, 0x70, 0x90, 0x130, 0x140, 0x170, 0x180, 0x190}


def test_loops_are_what_comes_round_to_its_head():
    """The branch back from behind the end makes none, as it is not the only way there; the wait before it is one."""
    found = sorted(map(addresses, loops(instructions(sass(CODE)))))
    assert found == [ROWS, [0x40, 0x50], list(range(0xA0, 0x150, 16)), [0x160, 0x170]]


def test_hot_loop_is_the_largest_that_reads_memory():
    assert addresses(hot_loop(instructions(sass(CODE)))) == ROWS
    assert addresses(hot_loop(instructions(sass(CODE.replace("LDS", "LDGSTS"))))) == list(range(0xA0, 0x150, 16))
    assert hot_loop(instructions(sass(CODE.replace("LDG", "LDS")))) == []


def test_a_branch_through_a_table_leads_to_what_nothing_else_does():
    switch = """
        LDG.E R4, desc[UR4][R2.64]
        BRX R4 -0x20
        FADD R1, R1, R2
        BRA 0x50
        FMUL R1, R1, R2
        @P0 BRA 0x0
        EXIT
    """
    assert addresses(hot_loop(instructions(sass(switch)))) == list(range(0, 0x60, 16))


# registers, threads -> blocks
RESIDENT = {
    (64, 512): 2,  # registers, to the last
    (65, 512): 1,  # taken as 72
    (47, 128): 10,
    (32, 1024): 2,  # threads
    (16, 32): 32,  # places
    (40, 64): 25,
    (255, 256): 1,
    (255, 512): 0,
}


@pytest.mark.parametrize(("registers", "threads"), RESIDENT)
def test_blocks_on_a_multiprocessor(registers, threads):
    assert forms.resident_blocks(registers, threads) == RESIDENT[registers, threads]


def kernel(name, types, constants, **figures) -> Kernel:
    figures = {"registers": 64, "stack": 0, "spilled": 0, "shared": 0, "accesses": (), "hot": 400, **figures}
    return Kernel("90a", name, types, constants, **figures)


SAME, WIDE = ("BFloat16", "BFloat16"), ("BFloat16", "float")
CONCLUDED = {
    # takes, instructions an element, resident threads, bytes of reads
    "staged": (kernel("add_layer_norm_bwd", SAME, (0, 0)), ("plain", 50, 1024, 1024 * 48)),
    "wide_stream": (kernel("add_layer_norm_bwd", WIDE, (0, 1)), ("epilogue", 50, 1024, 1024 * 80)),
    "float32": (kernel("add_layer_norm_fwd", ("float", "float"), (1, 0, 1)), ("plain", 100, 1024, 1024 * 32)),
    "four_vectors": (kernel("add_layer_norm_fwd", SAME, (4, 1, 1)), ("epilogue", 12.5, 1024, 1024 * 128)),
    "by_elements": (
        kernel("add_layer_norm_bwd", SAME, (2, 1), registers=100),
        ("everything, rows not aligned", 50, 512, 512 * 48),
    ),
    "samples": (kernel("add_layer_norm_fwd", SAME, (1, 2, 1)), ("samples", 50, 1024, 1024 * 32)),
    "samples_by_elements": (
        kernel("add_layer_norm_bwd_sums", SAME, (1, 0)),
        ("samples, rows not aligned", 50, 1024, 1024 * 32),
    ),
    "partials": (kernel("sum_partials", ("float",), (), hot=40, hot_loads=8), ("", 5, 1024, 1024 * 32)),
}


@pytest.mark.parametrize("which", CONCLUDED)
def test_what_is_concluded_of_a_kernel(which):
    k, concluded = CONCLUDED[which]
    assert (k.takes, k.per_element, k.resident, k.in_flight) == concluded


def test_the_tool_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(codegen_cuda, "CUOBJDUMP", None)
    monkeypatch.setattr(codegen_cuda, "NVCC", "nvcc")
    assert codegen_cuda.main([]) == 2 and "no cuobjdump" in capsys.readouterr().err
    monkeypatch.setattr(codegen_cuda, "NVCC", None)
    assert codegen_cuda.main([]) == 2 and "nvcc is not installed" in capsys.readouterr().err


def compiled(command: str, stack: int) -> list:
    """A made-up kernel as the command compiles it, with so many bytes spilled to the stack."""
    if command == "cuda":
        return [kernel("sum_partials", ("float",), (), registers=32, spilled=stack)]
    pytest.importorskip("triton", reason="triton is not installed")
    from tools.codegen import attention, compile

    if command == "norms":
        of, numbers = ("add_layer_norm_fwd", "add", "bfloat16", 64, 90, "1 x [8, 64]", 4, 1), (None, None)
        return [compile.Figures(*of, *numbers, registers=32, stack=stack)]
    of = ("attention_fwd", "", "full", 64, "float32", 80, "64 x 64", 4, 1)
    return [attention.Figures(*of, 32, stack, 0, 0, 0, 9)]


@pytest.mark.parametrize("stack", [0, 8], ids=["within_the_gate", "spills"])
@pytest.mark.parametrize(
    ("command", "compiles", "page", "options"),
    [
        ("norms", "in_processes", "codegen.md", ["--modes", "add"]),
        ("attention", "in_processes", "codegen_attention.md", ["--modes", "full"]),
        ("cuda", "compile_sources", "codegen_cuda.md", []),
    ],
)
def test_a_page_is_not_written_of_kernels_that_break_the_gate(
    command, compiles, page, options, stack, monkeypatch, tmp_path, capsys
):
    kernels, module = compiled(command, stack), importlib.import_module(f"tools.codegen.{command}")
    (tmp_path / page).write_text("as it was")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(module, compiles, lambda *_: kernels)
    monkeypatch.setattr(codegen_cuda, "missing", lambda: None)
    monkeypatch.setattr(codegen_cuda, "page", codegen_cuda.markdown)
    assert module.main(["--write", *options]) == bool(stack)
    text, said = (tmp_path / page).read_text(), capsys.readouterr().err
    if stack:
        assert (
            text == "as it was"
            and re.search("spills: .*8 (bytes of stack|spilled)", said)
            and f"{page} is not written" in said
        )
    else:
        assert text == codegen_cuda.markdown(kernels) if command == "cuda" else text.startswith("# What the Triton")
        assert "| 32 | 0 |" in text


@pytest.mark.skipif(not EMULATED, reason="there is no g++ to build the emulation with")
@pytest.mark.parametrize(("n_rows", "n"), [(200, 256), (37, 2048), (5, 4096), (3, 65536)])
def test_partial_sums_are_as_large_as_the_library_makes_them(n_rows, n):
    """Which tells that its programs are counted here as there."""
    form = forms.forms(n)["backward"]
    torch.ops.fusednorm_cuda.emulate(128, 512, 8, 2, 1)
    x, weight, stats = torch.randn(n_rows, n).bfloat16(), torch.ones(n).bfloat16(), torch.ones(2, n_rows)
    saved = NormSaved(x, stats, weight, weight), NormGradOptions(1, 0.0, 0.0, x.dtype, x.dtype, False, False, False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        cuda.add_layer_norm_bwd(x, x, *saved, [True, False, True, True, False, False])
    made = [event.nbytes() for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert forms.partial_bytes(form, n_rows, n, processors=2) in made
