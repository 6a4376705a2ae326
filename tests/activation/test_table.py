"""Each activation stands wherever it has to be known: two tables, the oracle, the providers, the gates, the prose."""

from __future__ import annotations

import inspect
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from oracle_activation import ACTIVATIONS as ORACLE
from oracle_activation import NEGATIVE_TAIL, TORCHS

import fusednorm
from benchmarks.cases import operations as cases
from fusednorm import _activations, dispatch
from fusednorm._activations import ACTIVATIONS, TABLE
from fusednorm.dispatch import rules
from fusednorm.modules._layer import activation_name
from fusednorm.providers import native

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "csrc" / "common" / "activations.h"
NAMES = [activation.name for activation in TABLE]
EACH = pytest.mark.parametrize("name", NAMES)


def enumerated() -> list[tuple[str, str, str, str]]:
    """Enumerator, name, linear and cubic, in the order of the header."""
    return re.findall(r'^  F\((\w+), "(\w+)", ([^,]+), ([^,]+)\)(?: *\\)?$', HEADER.read_text(), re.M)


def evaluated(product: str) -> float:
    return math.prod(float(factor) for factor in product.split("*"))


def test_numbers_are_places():
    assert [activation.number for activation in TABLE] == list(range(len(TABLE)))
    assert len(ACTIVATIONS) == len(TABLE)


def test_the_header_has_the_same_names_in_the_same_order_with_the_same_numbers():
    assert [name for _, name, *_ in enumerated()] == NAMES
    for activation, (enumerator, name, linear, cubic) in zip(TABLE, enumerated(), strict=True):
        assert enumerator == "".join(word.capitalize() for word in name.split("_"))
        assert (evaluated(linear), evaluated(cubic)) == (activation.sigmoid or (0.0, 0.0))
    assert int(re.search(r"kActivationShift = (\d+);", HEADER.read_text())[1]) == native.ACTIVATION_SHIFT


@EACH
@pytest.mark.parametrize("mask", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_options_hold_the_number_above_the_mask(name, mask):
    options = native.activation_options(name, mask)
    assert options >> native.ACTIVATION_SHIFT == ACTIVATIONS[name].number
    assert [bool(options >> i & 1) for i in range(native.ACTIVATION_SHIFT)] == list(mask)
    assert native.FORWARD_OPTIONS[name] == native.activation_options(name)


def test_options_refuse_a_mask_that_would_change_the_number():
    with pytest.raises(ValueError, match="output_mask: expected 2 entries, one a gradient, got 3"):
        native.activation_options("relu", (True, True, True))


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("number", [-1, len(TABLE)])
def test_the_libraries_refuse_a_number_that_no_activation_has(number, provider):
    reason = dispatch.unavailable_reason(provider)
    if reason is not None:
        pytest.skip(f"provider {provider}: {reason}")  # its library is what is asked
    ops = getattr(torch.ops, f"fusednorm_{provider}")
    with pytest.raises(RuntimeError, match=f"expected an activation from 0 to {len(TABLE) - 1}, got {number}"):
        ops.bias_act_dropout_fwd(torch.ones(2, 8), None, None, number << native.ACTIVATION_SHIFT, 0.0)


def test_a_library_built_for_other_activations_does_not_load(monkeypatch):
    reason = dispatch.unavailable_reason("cpu")
    if reason is not None:
        pytest.skip(f"provider cpu: {reason}")
    from fusednorm.providers.cpu import library as cpu

    native.check_activations(cpu.LIBRARY)
    monkeypatch.setattr(native, "ACTIVATIONS", [*NAMES[::-1], "another"])
    with pytest.raises(ValueError, match=rf"built for the activations {', '.join(NAMES)}, not .*, another"):
        native.check_activations(cpu.LIBRARY)


def test_the_oracle_has_each():
    """And nothing of the package: it is what the package is held to."""
    assert list(ORACLE) == list(TORCHS) == NAMES
    assert set(NEGATIVE_TAIL) == set(NAMES) - {"relu"}
    assert "fusednorm" not in inspect.getsource(inspect.getmodule(ORACLE["relu"])).split("def ours")[0]


@EACH
def test_torchs_function_is_the_oracles(name):
    u = torch.linspace(-6.0, 6.0, 97, dtype=torch.float64)
    # 900 roundings of float64, where two formulas of one activation differ by a few; another one by 1e-3.
    torch.testing.assert_close(ACTIVATIONS[name].torch_function(u), ORACLE[name](u), rtol=1e-13, atol=1e-13)


@EACH
def test_the_fast_path_names_each_function_of_torch(name):
    """Its switch has no default, and a build takes a missing case for an error."""
    (enumerator,) = (e for e, n, *_ in enumerated() if n == name)
    source = (ROOT / "csrc" / "fastpath" / "activation_node.cpp").read_text()
    assert source.count(f"case fusednorm::k{enumerator}: return ") == 1
    assert "-Werror=switch" in (ROOT / "setup.py").read_text()


@EACH
def test_a_form_that_is_missing_is_an_error(name):
    if ACTIVATIONS[name].sigmoid is None:
        with pytest.raises(NotImplementedError, match=name):
            _activations.sigmoid_form(name)
    else:
        assert _activations.sigmoid_form(name) == ACTIVATIONS[name].sigmoid


def test_automatic_choice_and_the_benchmarks_have_each():
    assert list(rules.OPERATIONS) == NAMES
    measured = {op.activation for op in cases.OPS.values() if isinstance(op, cases.Activation) and not op.dropout_p}
    assert measured == set(NAMES)
    for name, flops in ((activation.name, activation.flops) for activation in TABLE):
        found = [cases.OPS[f"bias_{name}"].flops((1, 1), direction) for direction in ("forward", "backward")]
        assert found == list(flops)


def test_the_gates_of_the_triton_kernels_have_each():
    pytest.importorskip("triton")
    from tools.codegen import activations, norm_calls, norms

    assert set(NAMES) | {f"{name}_dropout" for name in NAMES} == set(activations.MODES) <= set(norms.MODES)
    assert list(norm_calls.ACTIVATION["activation"]) == NAMES
    committed = (ROOT / "benchmarks" / "results" / "codegen.md").read_text()
    for mode in activations.MODES:
        for kernel in ("fwd", "bwd"):
            assert f"| bias_act_dropout_{kernel} | {mode} |" in committed


@EACH
def test_layers_take_the_name_and_the_function(name):
    for given in (name, ACTIVATIONS[name].torch_function):
        layer = fusednorm.TransformerEncoderLayer(8, 2, 16, 0.0, given, batch_first=True)
        assert activation_name(pickle.loads(pickle.dumps(layer)).activation) == name


def test_layers_refuse_a_name_that_is_none_of_them():
    with pytest.raises(RuntimeError, match=f"activation should be {'/'.join(NAMES)}, not swish"):
        fusednorm.TransformerEncoderLayer(8, 2, activation="swish")


@EACH
@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "docs/troubleshooting.md"])
def test_the_pages_name_each(name, page):
    assert f'`"{name}"`' in (ROOT / page).read_text()


@EACH
def test_the_docstring_has_each_name_and_formula(name):
    said = inspect.getdoc(fusednorm.bias_act_dropout)
    assert f'"{name}"' in said
    assert rf"\mathrm{{{name}}}(u) =".replace("_", r"\_") in said
