"""Validation does not depend on who serves: every provider takes a value, or refuses it in the same words."""

from __future__ import annotations

import inspect
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import fusednorm
from fusednorm import dispatch

N = 8


def _arguments(function: str) -> dict:
    """A call that every provider takes."""
    x = torch.linspace(-1.0, 1.0, 4 * N).reshape(4, N)
    if "norm" in function:
        given = {"x": x, "residual": x.flip(0), "normalized_shape": N, "weight": torch.ones(N), "eps": 1e-5}
        given |= {} if "rms" in function else {"bias": torch.zeros(N)}
        if function.startswith("add_"):
            return given
        return {"input": given.pop("x")} | {name: value for name, value in given.items() if name != "residual"}
    if function == "bias_act_dropout":
        return {"x": x, "bias": torch.ones(N)}
    if function == "dropout_mask":
        return {"shape": (4, N), "p": 0.5, "seed": 1, "device": "cpu"}
    q = torch.linspace(-1.0, 1.0, 64).reshape(1, 2, 4, N)
    if function == "scaled_dot_product_attention":
        return {"query": q, "key": q, "value": q}
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    packed = {"query": q[0].transpose(0, 1), "key": q[0].transpose(0, 1), "value": q[0].transpose(0, 1)}
    return packed | {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 4, "max_seqlen_k": 4}


FUNCTIONS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "bias_act_dropout", "dropout_mask")
FUNCTIONS += ("scaled_dot_product_attention", "varlen_attention")
ALIKE = "cu_seqlens_k"  # checked by the same lines as cu_seqlens_q
VALUES = {
    "text": "1e-5",
    "none": None,
    "true": True,
    "zero": 0,
    "one": 1,
    "tenth": 0.1,
    "minus_one": -1.0,
    "nan": float("nan"),
    "inf": float("inf"),
    "beyond_double": 10**400,
    "fraction": Fraction(1, 8),
    "complex": 1j,
    "numpy_number": np.float32(0.125),
    "numpy_bool": np.bool_(True),
    "array": np.ones(N, dtype=np.float32),
    "number_tensor": torch.tensor(0.125),
    "tensor": torch.ones(2),
    "complex_tensor": torch.ones(4, N, dtype=torch.complex64),
    "list": [0.1],
    "tuple": (0.1, 0.2),
    "object": object(),
}
CASES = [(f, name) for f in FUNCTIONS for name in inspect.signature(getattr(fusednorm, f)).parameters if name != ALIKE]


def outcome(function: str, arguments: dict) -> str:
    """What a call says or gives: the error in full, or the kinds of its results."""
    torch.manual_seed(0)
    try:
        results = getattr(fusednorm, function)(**arguments)
    except Exception as fault:
        return f"{type(fault).__name__}: {re.sub(r'0x[0-9a-f]+', '0x', str(fault))}"
    results = results if isinstance(results, tuple) else (results,)
    return ", ".join(f"{r.dtype} {tuple(r.shape)}" for r in results)


@pytest.mark.parametrize(("function", "name"), CASES, ids=str)
def test_every_provider_takes_or_refuses_a_value_alike(function, name):
    """With gradients and without: these are different ways down."""
    faults = {value: fault for value in VALUES if (fault := fault_of(function, name, VALUES[value]))}
    assert not faults, "\n".join(f"{value}: {fault}" for value, fault in faults.items())


def fault_of(function: str, name: str, value: object) -> str | None:
    outcomes = {}
    dispatch.settings.current.plans.clear()  # an equal value before this one may have left a plan
    for needs_grad in (False, True):
        arguments = _arguments(function)
        for given in arguments.values():
            if needs_grad and isinstance(given, Tensor) and given.is_floating_point() and given.is_leaf:
                given.requires_grad_()
        arguments[name] = value
        for provider in ("automatic", *fusednorm.available_providers()):
            if provider == "automatic":
                said = outcome(function, arguments)
            else:
                with fusednorm.use_provider(provider):
                    said = outcome(function, arguments)
            if not said.startswith(f"ValueError: provider '{provider}' cannot run"):  # a limit, which it states
                outcomes[f"{provider}, {'with' if needs_grad else 'without'} gradient"] = said
    if len(set(outcomes.values())) != 1:
        return f"providers differ: {outcomes}"
    said = outcomes.popitem()[1]
    if re.match(r"\w+(Error|Exception): ", said) and not re.match(r"(Type|Value)Error: ", said):
        return f"neither a TypeError nor a ValueError: {said}"
    if re.match(r"\w+Error: ", said) and name not in said:
        return f"the argument is not named: {said}"
    return None
