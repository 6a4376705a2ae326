"""The code-generation gate: what the Triton kernels compile to, ahead of time, without a GPU.

No spills, as many programs on a multiprocessor as the table assumes, and on the aligned path no access to memory that
the byte model does not have. `tools/codegen/norms.py` has the model, at every configuration the table can choose;
`tools/codegen/norm_calls.py` has every call, from the code's own switches. A part is compiled in every run; samples
for all architectures, and under the oldest supported Triton, by `make test-all`; the whole by the command line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusednorm._activations import ACTIVATIONS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[2]
OLDEST = "triton==3.6.0"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def compiled(*arguments: str, triton: Path | None = None) -> str:
    """What a process that compiles prints: Triton reads TRITON_INTERPRET when it is imported. It has to end well."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(p) for p in (triton, ROOT) if p is not None)
    command = [sys.executable, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=3000)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def gate(command: str, tmp_path: Path, *arguments: str, triton: Path | None = None) -> dict:
    """Run the gate; returns its figures and which Triton compiled."""
    path = tmp_path / "figures.json"
    compiled("-m", f"tools.codegen.{command}", "--json", str(path), *arguments, triton=triton)
    found = json.loads(path.read_text())
    assert triton is None or found["triton"] == OLDEST.split("==")[1]
    return found


def holds(page: list[str], starts: list[str]) -> bool:
    """Whether the rows of a page that name a kernel begin so."""
    rows = [line for line in page if line.startswith(("| add_", "| attention_", "| bias_", "| sum_"))]
    return len(rows) == len(starts) and all(map(str.startswith, rows, starts))


@pytest.mark.certifies("forward", "backward", op="add_layer_norm", provider="triton", on="compiled")
def test_no_spills_and_no_needless_access_on_hopper(tmp_path):
    """The heaviest epilogue; the others, and the activations, by `make test-all`."""
    figures = gate("norms", tmp_path, "--arch", "90", "--modes", "all")["figures"]
    assert {f["kernel"] for f in figures} == {
        "add_layer_norm_fwd",
        "add_layer_norm_fwd_wide",
        "add_layer_norm_bwd",
        "add_layer_norm_bwd_sums",
        "sum_partials",
    }
    assert len(figures) >= 20
    assert not any(f["stack"] for f in figures)


CHOSEN = {  # arguments of norm_calls, and how many variants they choose
    # Triton makes other instructions of one function in float64, and may have none
    "every activation in float64": (
        [
            *("--which", "activations", "--arch", "90", "--only"),
            r"^bias_act_dropout_\w+ (backward\+)?dropout\+bias\+d_x\+d_bias\+\w+\+strided_outer .*float64",
        ],
        2 * len(ACTIVATIONS),
    ),
    # mixed dtypes in rows with two strides, and dropout of float32: their parts did not spill one by one
    "what spilled once in the backward": (
        [
            *("--which", "heaviest", "--arch", "90", "--sample", "6", "--only"),
            r"^add_layer_norm_bwd .*(aligned_outer dtype=float32 residual_dtype=bfloat16"
            r"|x_bias\+dropout\+drop_path\+stream_used.*\+aligned dtype=float32$)",
        ],
        6,
    ),
    # vectors of samples: float64 rows with any strides and dropout, and few gradients of many programs
    "what spilled once with a vector for each sample": (
        [
            *("--which", "heaviest", "--arch", "90", "--sample", "6", "--only"),
            r"(^add_layer_norm_fwd .*own_weight.*dropout.*strided_outer dtype=float64$"
            r"|^add_layer_norm_bwd .*x_bias\+own_weight.*\+aligned dtype=bfloat16$)",
        ],
        6,
    ),
    # a row of 8 columns ends within a tile of 64, and GELU in float32 keeps more than the other activations
    "what spilled once in the forward": (
        [
            *("--which", "activations", "--arch", "120", "--only"),
            r"^bias_act_dropout_fwd dropout\+bias\+d_x\+d_bias\+gelu\+aligned dtype=float32$",
        ],
        1,
    ),
    # a sample of the calls on consumer Blackwell, other ones than in the slow tests
    "where a multiprocessor holds fewer warps": (
        ["--which", "pairs", "--arch", "120", "--sample", "8", "--seed", "100"],
        8,
    ),
}


def test_no_spills_in_chosen_calls(tmp_path):
    """In one process, which imports Triton once."""
    commands = [[*given, "--json", str(tmp_path / name)] for name, (given, _) in CHOSEN.items()]
    program = "from tools.codegen import norm_calls as calls; raise SystemExit(any([calls.main(c) for c in {}]))"
    compiled("-c", program.format(commands))
    assert {name: len((tmp_path / name).read_text().splitlines()) for name in CHOSEN} == {
        name: count for name, (_, count) in CHOSEN.items()
    }


@pytest.mark.parametrize(
    ("arch", "changed", "said"),
    [
        (80, {}, ""),
        (80, {"warps": 16, "per_sm": 4}, ""),
        (120, {"warps": 16, "per_sm": 4}, "16 warps: 3 programs fit, the table assumes 4"),
        (90, {"shared": 60000}, ""),
        (89, {"shared": 60000}, "60000 bytes of shared memory: 1 programs fit, the table assumes 2"),
        (90, {"registers": 255, "warps": 8}, "255 registers: 1 programs fit, the table assumes 2"),
        (90, {"stack": 8}, "spills: 8 bytes of stack"),
        (90, {"failure": "an intrinsic is missing"}, "does not compile: an intrinsic is missing"),
    ],
)
def test_fault_of_figures(arch, changed, said):
    from tools.codegen.compile import Figures, faults

    figures = Figures("", "", "", 64, arch, "", warps=4, per_sm=2, model_loads=None, model_stores=None)
    for name, value in ({"registers": 32} | changed).items():
        setattr(figures, name, value)
    assert [fault.startswith(said) for fault in faults(figures)] == ([True] if said else [])


def test_near_keeps_what_could_break_the_gate_elsewhere(tmp_path):
    from tools.codegen.norm_calls import near

    # at 4 warps and 4 programs a thread may have 128 registers
    plain = {"arch": 90, "warps": 4, "per_sm": 4, "registers": 112, "stack": 0, "failure": "", "shared": 0}
    changes = {"far": {}, "near": {"registers": 113}, "spills": {"stack": 8}, "shared": {"shared": 25000}}
    lines = [plain | change | {"kernel": name, "mode": "", "dtype": "", "n": 8} for name, change in changes.items()]
    (tmp_path / "sm_90").write_text("\n".join(map(json.dumps, lines)))
    variants = [SimpleNamespace(kernel=name, mode="", dtype="", n=8) for name in (*changes, "unknown")]
    assert [v.kernel for v in near(variants, tmp_path / "sm_90")] == ["near", "spills", "shared", "unknown"]


@pytest.fixture(scope="session")
def oldest_triton(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("oldest_triton")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), OLDEST]
    subprocess.run(install, check=True, timeout=900)
    return target


@pytest.fixture(params=["installed", "oldest"])
def triton(request) -> Path | None:
    """Where the oldest supported Triton is, or None for the installed one."""
    return request.getfixturevalue("oldest_triton") if request.param == "oldest" else None


@pytest.mark.slow
def test_gate_for_every_epilogue(triton, tmp_path):
    """No access to memory that the byte model does not have; what it says does not depend on the architecture."""
    gate("norms", tmp_path, "--arch", "90", triton=triton)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gate_for_every_architecture(arch, triton, tmp_path):
    """Another sample of the calls for each; all of them: `tools/codegen/norm_calls.py`."""
    seed, path = 2 * ARCHITECTURES.index(arch) + (triton is not None), tmp_path / "calls.jsonl"
    chosen = ["--arch", str(arch), "--sample", "24", "--seed", str(seed), "--json", str(path)]
    compiled("-m", "tools.codegen.norm_calls", *chosen, triton=triton)
    figures = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(figures) == 24 and all(f["arch"] == arch for f in figures)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gate_for_every_dtype(dtype, tmp_path):
    gate("norms", tmp_path, "--modes", "add", "all", "gelu_dropout", "--dtypes", dtype)


FUSED = """
import torch
from tools.codegen import compile, norm_calls
call = norm_calls.whole({"rms"}, backward=False, dtype=torch.float32, layout="shifted")
(variant,) = norm_calls.note(call, 64)
_, sass = compile.read_binary(variant.launch.compiled(90).asm["cubin"])
print(sass.count("SHFL.BFLY"), compile.fused_sums(sass))
"""


def test_lanes_of_a_row_have_one_sum():
    """Where a lane has one element of a row, its product may be fused with what a shuffle brings.

    All lanes store their sum at one address: with another rounding in each, which is stored would be undefined.
    """
    shuffles, fused = compiled("-c", FUSED).split(maxsplit=1)
    assert int(shuffles) >= 20 and fused.strip() == "[]"


def test_fused_sums_are_found():
    from tools.codegen.compile import fused_sums

    lines = ("SHFL.BFLY PT, R4, R5, 0x10, 0x1f", "{}", "SHFL.BFLY PT, R6, R7, 0x8, 0x1f")
    bad, good = ("FFMA R7, R5, R5, R4", "@!P0 DFMA R8, R2, R2, R4"), ("FADD R4, R5, R4", "FFMA R7, RZ, R5, R4")
    for middle in (
        *bad,
        *good,
        "MOV R4, R9 ;\n/*0015*/ FFMA R7, R5, R5, R4",
        "LDG.E.128 R2, desc[UR6][R8.64] ;\n/*0015*/ FFMA R7, R5, R5, R4",
        "FFMA R7, R4, R5, R8",
    ):
        sass = "\n".join(f"/*00{n}0*/ {line} ;" for n, line in enumerate(lines)).format(middle)
        assert fused_sums(sass) == ([middle.removeprefix("@!P0 ")] if middle in bad else []), middle


PLANTED = {
    "nothing": ("pass", ""),
    "a_row_on_too_few_warps": ("table._BACKWARD = ((1, 8192, 4, (1, 1, 1, 1)),)", "spills"),
    "too_many_programs": ("table._BACKWARD_REGISTERS = ((8, 0),) * 4", "spills"),
    "registers_not_stated": (
        "table._BACKWARD_REGISTERS = ((8, 0),) * 4; table.Config.registers = 255",
        "the table assumes",
    ),
    "pointers_not_known_as_aligned": ("compile.Launch.aligned = False", "128-bit accesses"),
}
PLANT = f"""
import json, os
from fusednorm.providers.triton import norm_config as table
from tools.codegen import compile, norms
for plant in {[plant for plant, _ in PLANTED.values()]!r}:
    if os.fork():  # the next plant finds everything as it was
        if os.wait()[1]:
            raise SystemExit("its process failed: " + plant)
        continue
    exec(plant)
    chosen = [v for v in norms.variants(["add"], ["bfloat16"], ["aligned"]) if v.kernel == "add_layer_norm_bwd"]
    longest = max(chosen, key=lambda v: v.config.chunks)
    print(json.dumps(compile.faults(compile.figures(longest, 90))), flush=True)
    os._exit(0)
"""


def test_gate_fails_on_what_is_planted():
    found = dict(zip(PLANTED, map(json.loads, compiled("-c", PLANT).splitlines()), strict=True))
    for name, (_, said) in PLANTED.items():
        assert bool(found[name]) == bool(said) and said in " ".join(found[name]), (name, found[name])


def test_committed_table_has_every_configuration_of_today():
    from tools.codegen import compile, norms

    expected = [
        f"| {v.kernel} | {v.mode} | {v.dtype} | {v.n} | {compile.tile(v.config)} | {v.config.warps} |"
        for v in norms.variants(norms.MODES, ["bfloat16"], ["aligned"])
    ]
    committed = (ROOT / "benchmarks/results/codegen.md").read_text().splitlines()
    assert holds(committed, expected)
