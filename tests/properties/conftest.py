"""Each operator by each provider, at sizes that the interpreter and the emulation take in a fraction of a second."""

from __future__ import annotations

import pytest
import torch
from backends import EMULATED, INTERPRETED
from operators import OPERATORS, Operator

from fusednorm import dispatch


def _places() -> list:
    """As in tests/conftest.py, without automatic choice; the providers that are slow here are fast at these sizes."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    places = []
    for name in dispatch.PROVIDERS:
        reason = dispatch.unavailable_reason(name)
        marks = [pytest.mark.skip(reason=f"provider {name}: {reason}")] if reason else []
        on_cpu = {"cpu": True, "cuda": EMULATED, "triton": INTERPRETED}.get(name)
        only = devices if on_cpu is None else ["cpu" if on_cpu else "cuda"]
        places += [pytest.param((name, device), id=f"{name}-{device}", marks=marks) for device in only]
    return places


@pytest.fixture(params=_places())
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(params=OPERATORS.values(), ids=lambda operator: operator.name)
def operator(request: pytest.FixtureRequest) -> Operator:
    return request.param


@pytest.fixture
def leaves(operator: Operator, provider: str, device: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """In the widest dtype of the provider."""
    if provider == "torch" and operator.name == "varlen_attention":
        pytest.skip("torch's attention takes no packed sequences")
    return operator.leaves(operator.widest(provider), device, generator)


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails where a provider's function is called."""

    def called(*_: object) -> None:
        pytest.fail("a provider's function was called, where torch's elementary operators were expected")

    for name in dispatch.PROVIDERS:
        dispatch.get(name)
    for key in dispatch.registry.functions:
        monkeypatch.setitem(dispatch.registry.functions, key, called)
