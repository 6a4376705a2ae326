"""The code-generation gate: what the Triton kernels compile to, ahead of time, without a GPU.

No spills, as many programs on a multiprocessor as the table assumes, and on the aligned path no access to memory that
the byte model does not have. `benchmarks/codegen.py` makes the figures; here they are held to it, at every
configuration the table can choose. One architecture is compiled in every run; all of them, and the oldest supported
Triton, by `make test-all`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).parents[1]
OLDEST = "triton==3.6.0"


def compile_in_process(*arguments: str, first_on_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Triton reads TRITON_INTERPRET when it is imported, so what compiles runs in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(p) for p in (first_on_path, ROOT) if p is not None)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=3000
    )


def gate(tmp_path: Path, *arguments: str, triton: Path | None = None) -> dict:
    """Run the gate; returns its figures."""
    path = tmp_path / "figures.json"
    run = compile_in_process("benchmarks/codegen.py", "--json", str(path), *arguments, first_on_path=triton)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(path.read_text())


def test_no_spills_and_no_needless_access_on_hopper(tmp_path):
    """The lightest and the heaviest epilogue, the heaviest activation; the ones between by `make test-all`."""
    figures = gate(tmp_path, "--arch", "90", "--modes", "add", "all", "gelu_dropout")["figures"]
    assert {f["kernel"] for f in figures} == {
        "add_layer_norm_fwd",
        "add_layer_norm_fwd_wide",
        "add_layer_norm_bwd",
        "add_layer_norm_bwd_sums",
        "bias_act_dropout_fwd",
        "bias_act_dropout_bwd",
        "sum_partials",
    }
    assert len(figures) >= 70
    assert all(f["stack"] == f["local"] == 0 for f in figures)


@pytest.fixture(scope="session")
def oldest_triton(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("oldest_triton")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), OLDEST]
    subprocess.run(install, check=True, timeout=900)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("which", ["installed", "oldest"])
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_gate_for_every_epilogue(arch, which, tmp_path, request):
    triton = request.getfixturevalue("oldest_triton") if which == "oldest" else None
    found = gate(tmp_path, "--arch", arch, triton=triton)
    assert which == "installed" or found["triton"] == OLDEST.split("==")[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_gate_for_every_dtype(dtype, tmp_path):
    gate(tmp_path, "--modes", "plain", "add", "all", "relu", "gelu_dropout", "--dtypes", dtype)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["odd", "strided"])
def test_gate_for_rows_without_alignment(layout, tmp_path):
    gate(tmp_path, "--modes", "add", "all", "relu", "gelu_dropout", "--layouts", layout)


PLANT = """
from benchmarks import codegen
from fusednorm.providers import triton_norm_table as table
{plant}
chosen = [v for v in codegen.variants(["add"], ["bfloat16"], ["aligned"]) if v.kernel == "add_layer_norm_bwd"]
longest = max(chosen, key=lambda v: v.config.chunks)
print(*codegen.faults(codegen.figures(longest, 90)), sep="\\n")
"""


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        ("pass", ""),
        ("table._BACKWARD = ((1, 8192, 4, (1, 1, 1)),)", "spills"),
        ("table._BACKWARD_REGISTERS = ((8, 0),) * 3", "spills"),
        ("table._BACKWARD_REGISTERS = ((8, 0),) * 3; table.Config.registers = 255", "the table assumes"),
        ("codegen.Variant.aligned = False", "128-bit accesses"),
    ],
    ids=[
        "nothing",
        "a_row_on_too_few_warps",
        "too_many_programs",
        "registers_not_stated",
        "pointers_not_known_as_aligned",
    ],
)
def test_gate_fails_on_what_is_planted(plant, said):
    run = compile_in_process("-c", PLANT.format(plant=plant))
    assert run.returncode == 0, run.stderr[-4000:]
    assert said in run.stdout
    assert bool(run.stdout.strip()) == bool(said), run.stdout


def test_committed_table_has_every_configuration_of_today():
    program = """
from benchmarks import codegen
for v in codegen.variants(codegen.MODES, ["bfloat16"], ["aligned"]):
    print(f"| {v.kernel} | {v.mode} | {v.dtype} | {v.n} | {codegen.tile(v.config)} | {v.config.warps} |")
"""
    run = compile_in_process("-c", program)
    assert run.returncode == 0, run.stderr[-4000:]
    committed = (ROOT / "benchmarks/results/codegen.md").read_text().splitlines()
    rows = [line for line in committed if line.startswith(("| add_", "| bias_", "| sum_"))]
    expected = run.stdout.splitlines()
    assert len(rows) == len(expected)
    assert all(row.startswith(start) for row, start in zip(rows, expected, strict=True))
