"""Fixtures: every test runs over the provider table, on poisoned memory, from a fixed seed."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from backends import EMULATED, INTERPRETED  # first: it says what the providers of the package find

import fusednorm
from fusednorm import _once, dispatch
from fusednorm.providers.cpu import library as cpu
from tests.helpers.dispatching import unavailable

if (
    "FUSEDNORM_TEST_LIBRARY" in os.environ
):  # providers/cpu/test_sanitizers.py: another build, one of its instruction sets
    cpu.LIBRARY = Path(os.environ["FUSEDNORM_TEST_LIBRARY"])
    assert dispatch.unavailable_reason("cpu") is None, dispatch.unavailable_reason("cpu")
    torch.ops.fusednorm_cpu.use_instruction_set(os.environ.get("FUSEDNORM_TEST_INSTRUCTION_SET", ""))

os.environ["FUSEDNORM_TUNED"] = "0"  # what a developer's own machine was measured to do decides over no test
dispatch.settings.load_fastpath()  # else the first call of a process loads it, and goes without
_once.first_time("no CPU library")  # where it is not built, or made to be missing, that is known: no warning

for absent in (torch.cuda, torch.xpu, torch.mtia):
    if not absent.is_available():  # else every seed notes for it who asked, which takes 0.8 ms of each test
        absent.manual_seed_all = lambda seed: None

AUTOMATIC = "automatic"


def _places() -> list:
    """(provider, device) for every provider of the table, and automatic choice, on every device there is."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    places = [pytest.param((AUTOMATIC, device), id=f"{AUTOMATIC}-{device}") for device in devices]
    for name in dispatch.PROVIDERS:
        reason = dispatch.unavailable_reason(name)
        on_cpu = {"cpu": True, "cuda": EMULATED, "triton": INTERPRETED}.get(name)
        only = None if on_cpu is None else "cpu" if on_cpu else "cuda"
        marks = [pytest.mark.skip(reason=f"provider {name}: {reason}")] if reason else []
        if (name == "triton" and INTERPRETED) or (name == "cuda" and EMULATED):
            marks.append(pytest.mark.slow)  # the tests in tests/providers choose their shapes, and are not
        places += [
            pytest.param((name, device), id=f"{name}-{device}", marks=marks)
            for device in (devices if only is None else [only])
        ]
    return places


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # so that -k takes a folder: pytest -k providers/cpu
        item.extra_keyword_matches.add(item.path.parent.relative_to(Path(__file__).parent).as_posix())
        quick = item.get_closest_marker("quick_on")
        if quick is not None:
            assert {AUTOMATIC, *dispatch.PROVIDERS}.issuperset(quick.args), f"{item.nodeid}: {quick.args}"
            provider, device = item.callspec.params["place"]
            if device == "cpu" and provider not in quick.args:
                item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(params=_places())
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def provider(place: tuple[str, str], request: pytest.FixtureRequest) -> str:
    """A provider's name, or "automatic"; `using` makes it the choice. A module's OP is what it is asked for.

    A provider without that op has nothing to be tested: that it says so is tested in test_activation.py.
    """
    op = getattr(request.module, "OP", None)
    if op is not None and place[0] != AUTOMATIC and dispatch.serving(place[0], op) is None:
        pytest.skip(f"provider {place[0]} has no {op}")
    return place[0]


@pytest.fixture
def device(place: tuple[str, str]) -> str:
    return place[1]


class _WithinLimits(fusednorm.use_provider):
    """Skips a test of what a provider says it does not take; each provider's own tests hold it to no more."""

    def __exit__(self, kind, value, traceback) -> None:
        super().__exit__(kind, value, traceback)
        limit = re.search(rf"{_LIMITS[self.name]}.*", str(value))  # amid what torch.compile says, where it passes it on
        if limit is not None:
            pytest.skip(limit[0])  # the provider's own reason


# no limit is a float32 stream beside 16-bit x and normed
_SERVED = r".*these are (?P<x>torch\.b?float16), ((?P=x)|torch\.float32), (?P=x) and torch\.float32"
_LIMITS = {
    "cuda": r"provider 'cuda' cannot run .*: "
    rf"((x|residual): strides|dtypes: (?!{_SERVED})|.*several dimensions|dtype torch\.float64)",
    "torch": r"provider 'torch' cannot run attention_fwd: torch's attention",
    "triton": r"provider 'triton' cannot run attention_fwd: dtype torch\.float64",
}


@pytest.fixture
def using(provider: str) -> AbstractContextManager:
    """The context in which the provider under test is chosen."""
    if provider == AUTOMATIC:
        return nullcontext()
    block = _WithinLimits(provider) if provider in _LIMITS else fusednorm.use_provider(provider)
    block._used = True  # a test may skip before it enters, and be right
    return block


@pytest.fixture
def interpreted(provider: str) -> bool:
    """Whether the provider is so slow here that wide shapes are to be narrowed."""
    return (provider == "triton" and INTERPRETED) or (provider == "cuda" and EMULATED)


@pytest.fixture
def ours(provider: str) -> None:
    """Skips what is not promised of attention by provider `torch`, which `use_provider` asks for by name."""
    if provider == "torch":
        pytest.skip("torch's own operator was asked for, and there 0 * NaN is NaN")


@pytest.fixture
def without_kernels():
    """As in the pure-Python install: no kernel of ours serves anything."""
    with unavailable("triton", "cuda", "cpu", reason="it is not built"):
        yield


@pytest.fixture(params=["requested", "no kernel of ours"])
def torchs(request: pytest.FixtureRequest):
    """Torch's own operators serve, for either reason."""
    if request.param == "no kernel of ours":
        request.getfixturevalue("without_kernels")
        yield
        return
    with fusednorm.use_provider("torch"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory from ``torch.empty`` is filled with NaN, so an element that nobody writes shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture
def ordinary_memory(poisoned_memory: None) -> None:
    """Filling every new tensor with NaN would be timed too."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """A plan made by another test holds what that test had put in a provider's place."""
    dispatch.settings.current.plans.clear()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20240607)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def as_on(monkeypatch):
    """Call it with "amd", "intel" or "": what is chosen as measured on a processor of theirs."""
    from fusednorm.dispatch import rules, rules_attention

    def pretend(vendor):
        monkeypatch.setattr(rules_attention.cpu, "vendor", lambda: vendor)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        rules.forget()

    yield pretend
    rules.forget()
