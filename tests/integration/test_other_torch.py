"""One build of the native libraries in several versions of torch: this one, and those that `make test-all` installs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

from fusednorm import dispatch
from tools.codegen.cuda import NVCC

ROOT = emulated.ROOT
OTHERS = [ROOT / path for path in os.environ.get("FUSEDNORM_OTHER_PYTHON", "").split()]
REASON = dispatch.unavailable_reason("cpu")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OTHERS, reason="FUSEDNORM_OTHER_PYTHON names no interpreters with another torch"),
    pytest.mark.skipif(REASON is not None, reason=f"provider cpu: {REASON}"),
]
each_other = pytest.mark.parametrize("other", OTHERS, ids=lambda path: path.parents[1].name)


def run(interpreter: str | Path, program: str, *arguments: Path) -> str:
    command = [str(interpreter), "-W", "ignore", "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("FUSEDNORM_EMULATE", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@each_other
def test_one_build_serves_another_torch(tmp_path, other):
    """The same file, loaded into another version of torch, gives the same bits."""
    program = """
import sys, torch, fusednorm
from fusednorm.providers.cpu import library as cpu
with fusednorm.use_provider("cpu"):
    results = []
    for case in torch.load(sys.argv[1]):
        leaves = {name: leaf.requires_grad_() for name, leaf in case["leaves"].items()}
        outputs = fusednorm.add_layer_norm(normalized_shape=(case["columns"],), **leaves, **case["options"])
        results += [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), case["cotangents"])]
    _, z = fusednorm.add_layer_norm(torch.ones(7, 31), None, 31, dropout_p=0.37, seed=5)
    assert torch.equal(z > 0, fusednorm.dropout_mask((7, 31), 0.37, 5))
for use in (lambda: torch.ops.fusednorm_cpu.use_instruction_set("abacus"),
            lambda: cpu.add_layer_norm_fwd(
                torch.ones(2, 3), torch.ones(3, 2), *[None] * 5, 1 | 1 << 2 | 1 << 6 | 1 << 14, 1e-5, 0.0, 0.0)):
    try:
        use()
    except RuntimeError as fault:
        assert "usable are" in str(fault) or "its shape" in str(fault), fault
    else:
        raise AssertionError("nothing was raised")
torch.save([str(torch.__version__), *[result.detach() for result in results]], sys.argv[2])
"""
    generator = torch.Generator().manual_seed(3)
    cases = []
    same = [(dtype, dtype) for dtype in (torch.float32, torch.float64, torch.float16)]
    for dtype, stream in (*same, (torch.bfloat16, torch.float32)):
        draw = lambda *shape, dtype=dtype: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        leaves = {"x": draw(130, 385), "residual": draw(130, 385, dtype=stream)}
        leaves |= {name: draw(385) for name in ("weight", "bias", "x_bias", "layer_scale")}
        cotangents = [draw(130, 385), draw(130, 385, dtype=stream)]
        options = {"dropout_p": 0.3, "drop_path_p": 0.1, "seed": 3}
        cases.append({"leaves": leaves, "cotangents": cotangents, "columns": 385, "options": options})
    torch.save(cases, tmp_path / "cases.pt")
    results = []
    for interpreter in (sys.executable, other):
        out = tmp_path / f"{len(results)}.pt"
        run(interpreter, program, tmp_path / "cases.pt", out)
        results.append(torch.load(out))
    (here, *ours), (there, *theirs) = results
    assert here != there, "the other interpreter has the same torch"
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


LOADED = """
import json, sys
from pathlib import Path
from fusednorm import dispatch
from fusednorm.dispatch import eager
from fusednorm.providers.cuda import library as cuda
assert eager.TensorGuards is not None
fault = dispatch.unavailable_reason("cpu")
assert fault is None, fault
cuda.LIBRARY = Path(sys.argv[1]) if torch.version.cuda else None
if torch.version.cuda:
    fault = cuda._load()
    assert fault is None, fault
    said = cuda._first_launch(0)
    assert bool(said) != torch.cuda.is_available(), said
schemas = {}
for name, key in (("fusednorm_cpu", "CPU"), ("fusednorm_cuda", "CUDA")):
    of_key = [s for s in torch._C._dispatch_get_registrations_for_dispatch_key(key) if s.startswith(name)]
    schemas[name] = {s: str(getattr(getattr(torch.ops, name), s.partition("::")[2]).default._schema) for s in of_key}
print(json.dumps(schemas))
"""


@each_other
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("imports", ["import torch, fusednorm", "import fusednorm, torch"])
def test_libraries_load_whatever_is_imported_first(other, imports):
    """And register what they do in this torch. A torch built for CUDA takes the CUDA library, also without a GPU."""
    library = emulated.build_cuda(with_runtime=True)
    here, there = (json.loads(run(python, f"{imports}\n{LOADED}", library)) for python in (sys.executable, other))
    assert there["fusednorm_cpu"] == here["fusednorm_cpu"] and here["fusednorm_cpu"]
    common = {
        name.replace("cuda", "cpu"): schema.replace("cuda", "cpu") for name, schema in there["fusednorm_cuda"].items()
    }
    assert common == common | {name: schema for name, schema in here["fusednorm_cpu"].items() if name in common}
    assert len(common) >= 4
