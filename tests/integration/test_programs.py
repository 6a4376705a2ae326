"""Programs that outlive the process, of torch.export and torch.jit.trace: whatever was called before, wherever run."""

from __future__ import annotations

import json

import pytest
import torch
from fresh import python
from programs import CALLS, Program, gradients, inputs

import fusednorm
from fusednorm.providers.cpu import library as cpu

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")

NATIVE = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="the native library is not built")
RUNS = [
    ("trace",),
    ("export",),
    pytest.param(("trace", "reference"), marks=pytest.mark.slow),
    pytest.param(("trace", "without"), marks=pytest.mark.slow),
    pytest.param(("export", "without"), marks=pytest.mark.slow),
    pytest.param(("strict_export",), marks=pytest.mark.slow),
    pytest.param(("compile",), marks=pytest.mark.slow),
    pytest.param(("compile", "without"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_each_call_may_be_the_first_of_its_process(run):
    """Results and gradients at other inputs than the recorded ones; a trace is saved and loaded between."""
    said = [json.loads(line) for line in python("tests/helpers/programs.py", *run).splitlines()]
    assert [name for name, _ in said] == list(CALLS)
    problems = [f"{name}:\n{problem}" for name, problem in said if problem]
    assert not problems, "\n".join(problems)


SAVED = ["add_layer_norm_dropped", "bias_act_dropout_dropped", "attention_window", "varlen_attention", "AddLayerNorm"]
SAVED += ["AddRMSNorm", "TransformerEncoderLayer", "TransformerEncoderLayer_padded", "TransformerDecoderLayer"]

LOAD = """
import sys, pathlib, torch, fusednorm
from fusednorm.providers.cpu import library as cpu
if sys.argv[2] == "without":
    cpu.LIBRARY = pathlib.Path("nowhere.so")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pt2")):
    inputs, expected = torch.load(path.with_suffix(".pt"))
    found = torch.export.load(path).module()(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    print(path.stem)
assert (cpu.unavailable_reason() is None) == (sys.argv[2] == "with")
"""


@NATIVE
def test_exported_programs_run_in_a_new_process_with_and_without_the_native_library(tmp_path):
    for name in SAVED:
        program = CALLS[name]()
        torch.export.save(torch.export.export(program, inputs()), tmp_path / f"{name}.pt2")
        torch.save((inputs(1), program(*inputs(1)).detach()), tmp_path / f"{name}.pt")
    for library in ("with", "without"):
        assert python("-c", LOAD, str(tmp_path), library).split() == sorted(SAVED)


def _providers(program: torch.export.ExportedProgram) -> set[str | None]:
    nodes = [node for node in program.graph.nodes if "fusednorm" in str(node.target)]
    assert nodes
    return {node.args[-1] for node in nodes}


def test_exported_program_names_no_provider_unless_one_is_asked_for():
    program = CALLS["AddRMSNorm"]()
    if cpu.unavailable_reason() is None:
        assert _providers(torch.export.export(program, inputs())) == {None}
    with fusednorm.use_provider("reference"):
        named = torch.export.export(program, inputs())
    assert _providers(named) == {"reference"}


@NATIVE
def test_program_of_a_provider_that_is_missing_says_so(tmp_path):
    with fusednorm.use_provider("cpu"):
        torch.export.save(torch.export.export(CALLS["AddRMSNorm"](), inputs()), tmp_path / "named.pt2")
    load = """
import sys, pathlib, torch, fusednorm
from fusednorm.providers.cpu import library as cpu
cpu.LIBRARY = pathlib.Path("nowhere.so")
try:
    torch.export.load(sys.argv[1]).module()(torch.ones(2, 5, 16), torch.ones(2, 5, 16))
except RuntimeError as error:
    print(error)
"""
    said = python("-c", load, str(tmp_path / "named.pt2"))
    assert said.startswith("provider: 'cpu' cannot run add_layer_norm_fwd here: its library is not built")
    assert "outside of `use_provider`" in said


@pytest.mark.parametrize("name", ["AddLayerNorm", "bias_act_dropout_dropped", "attention_window"])
def test_exported_program_has_derivatives_of_second_order(name):
    program = CALLS[name]()
    written = torch.export.export(program, inputs()).module()

    def second(function):
        x, y = (t.requires_grad_() for t in inputs(1))
        (dx,) = torch.autograd.grad(function(x, y).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, y))

    torch.testing.assert_close(second(written), second(program), rtol=1e-4, atol=1e-4)


def test_compiled_exported_program_trains():
    """What torch.compile makes of an exported program: the operators' gradients under its tracing."""
    program = Program(lambda x, y: fusednorm.add_rms_norm(x, y, 16, dropout_p=0.5, seed=3))
    written = torch.export.export(program, inputs()).module()
    torch._dynamo.reset()
    compiled = torch.compile(written, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, []), gradients(program, []), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer", "AddRMSNorm", "attention_causal"])
def test_a_trace_is_the_same_with_and_without_gradients(name):
    """torch.jit.trace looks at that: it traces once more under no_grad, and compares."""
    torch.jit.trace(CALLS[name](), inputs())


WEIGHT = torch.ones(16, requires_grad=True)
OF_A_CONSTANT = {
    "layer_norm": lambda x: fusednorm.layer_norm(x, 16, WEIGHT),
    "rms_norm": lambda x: fusednorm.rms_norm(x, 16, WEIGHT),
    "add_layer_norm": lambda x: fusednorm.add_layer_norm(x, x, 16, WEIGHT),
    "bias_act_dropout": lambda x: fusednorm.bias_act_dropout(x, WEIGHT, "gelu"),
}


@pytest.mark.parametrize("name", OF_A_CONSTANT)
def test_a_trace_refuses_a_constant_that_requires_a_gradient(name):
    """With torch's own error: going on after it ends the process."""
    with pytest.raises(RuntimeError, match="Cannot insert a Tensor that requires grad as a constant"):
        torch.jit.trace(OF_A_CONSTANT[name], (torch.randn(3, 16),), check_trace=False)
