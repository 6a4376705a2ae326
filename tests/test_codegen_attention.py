"""The code-generation gate of the Triton attention kernels, without a GPU.

No spills, shared memory that there is, and on sm_90 asynchronous matrix instructions that do not wait for each other
one by one. `benchmarks/codegen_attention.py` makes the figures. A part is compiled in every run; all of it, on three
architectures and under the oldest supported Triton, by `make test-all`.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from test_codegen import OLDEST, ROOT, compile_in_process, oldest_triton, pytestmark

__all__ = ["oldest_triton", "pytestmark"]  # which pytest finds by name
KERNELS = {"attention_fwd", "attention_bwd_delta", "attention_bwd_dq", "attention_bwd_dkv"}


def gate(tmp_path: Path, *arguments: str, triton: Path | None = None) -> dict:
    """Run the gate; returns its figures."""
    path = tmp_path / "figures.json"
    run = compile_in_process("benchmarks/codegen_attention.py", "--json", str(path), *arguments, first_on_path=triton)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(path.read_text())


def test_attention_on_hopper_does_not_spill_and_overlaps_its_products(tmp_path):
    figures = gate(tmp_path, "--arch", "90", "--modes", "causal", "--dims", "128")["figures"]
    assert {f["kernel"] for f in figures} == KERNELS
    assert all(f["stack"] == f["local"] == 0 for f in figures)
    products = [f for f in figures if f["kernel"] != "attention_bwd_delta"]
    assert all(f["hgmma"] >= 16 and 2 * f["depbar"] < f["hgmma"] for f in products)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["installed", "oldest"])
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_attention_gate_for_every_mode(arch, which, tmp_path, request):
    triton = request.getfixturevalue("oldest_triton") if which == "oldest" else None
    found = gate(tmp_path, "--arch", arch, triton=triton)
    assert which == "installed" or found["triton"] == OLDEST.split("==")[1]
    assert len(found["figures"]) >= 36


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "modes", "dims"),
    [  # what is left out spills, as benchmarks/NOTES.md tells
        ("float32", ["full"], ["40", "64"]),
        ("float16", ["full", "causal_dropout"], ["40", "64", "128"]),
        ("float16", ["full"], ["256"]),
    ],
)
def test_attention_gate_for_other_dtypes_and_dims(dtype, modes, dims, tmp_path):
    gate(tmp_path, "--modes", *modes, "--dims", *dims, "--dtypes", dtype)


PLANT = """
from benchmarks import codegen_attention as gate
from fusednorm.providers import triton_attention_table as table
table.{plant}
chosen = [v for v in gate.variants(["causal"], [128], ["bfloat16"], 90) if v.kernel == "{kernel}"]
print(*gate.faults(gate.figures(chosen[0], 90)), sep="\\n")
"""


@pytest.mark.parametrize(
    ("kernel", "plant", "said"),
    [
        pytest.param(
            *("attention_bwd_dkv", "backward_keys = lambda need: table.Tile(128, 128, 8, 2)", "spills"),
            marks=pytest.mark.slow,
            id="tiles_too_large",
        ),
        pytest.param(
            *("attention_fwd", "forward = lambda need: table.Tile(128, 128, 8, 5)", "of shared memory, there are"),
            marks=pytest.mark.slow,
            id="too_many_stages",
        ),
        pytest.param(
            *("attention_fwd", "forward = lambda need: table.Tile(32, 64, 4, 2)", "no asynchronous matrix instr"),
            id="tiles_too_small",
        ),
    ],
)
def test_attention_gate_fails_on_what_is_planted(kernel, plant, said):
    run = compile_in_process("-c", PLANT.format(plant=plant, kernel=kernel))
    assert run.returncode == 0, run.stderr[-4000:]
    assert said in run.stdout


def test_committed_table_of_attention_has_every_configuration_of_today():
    committed = (ROOT / "benchmarks/results/codegen_attention.md").read_text().splitlines()
    here = ".".join(metadata.version("triton").split(".")[:2])
    if not committed[2].startswith(f"Triton {here}."):
        pytest.skip(f"Triton {here} takes other tiles in places, and the table is of another: {committed[2]}")
    program = """
from benchmarks import codegen_attention as gate
from benchmarks.codegen import ARCHITECTURES
for arch in ARCHITECTURES:
    for v in gate.variants(gate.MODES, gate.DIMS, ["bfloat16"], arch):
        print(gate.row(v.kernel, v.wants, v.mode, v.d, arch, gate.tile(v), v.warps, v.stages))
"""
    run = compile_in_process("-c", program)
    assert run.returncode == 0, run.stderr[-4000:]
    rows, expected = [line for line in committed if line.startswith("| attention_")], run.stdout.splitlines()
    assert len(rows) == len(expected)
    assert all(row.startswith(start) for row, start in zip(rows, expected, strict=True))
