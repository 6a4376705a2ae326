"""The forms of a case as contexts in which a call takes them, whatever raises inside: the table's own comes back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import fusednorm
from benchmarks.cases import Case, Norm
from fusednorm import dispatch
from fusednorm.providers.cuda import library as cuda_library
from fusednorm.providers.triton import host as triton_host
from fusednorm.providers.triton import norm as triton_norm
from fusednorm.providers.triton import norm_config as table
from fusednorm.providers.triton.config import Config
from tools.tune import variants as tune_variants
from tools.tune.variants import Backward, Forward, Pinned

TABLE = "table"
NO_OVERLAP = "no overlap"  # the kernel that sums the partials is launched when the backward has ended
OURS = ("cuda", "triton")  # the providers whose kernels have forms
Forced = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Variant:
    """A provider in one of its forms."""

    provider: str
    form: str = TABLE
    forced: Forced = nullcontext

    @property
    def name(self) -> str:
        return f"{self.provider} {self.form}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with self.forced(), fusednorm.use_provider(self.provider):
            yield


@contextlib.contextmanager
def cuda_form(what: str, numbers: Sequence[int]) -> Iterator[None]:
    """Every aligned norm takes this form of the kernel `what`, in the whole process."""
    force = torch.ops.fusednorm_cuda.force
    try:
        force(what, list(numbers))
        yield
    finally:
        force(what, [])


def triton_form(direction: str, config: Config | Pinned) -> Forced:
    """A context in which Triton's forward or backward is launched with `config`.

    What a launch needs is planned once and kept here beside the provider's own plans, which are not forgotten: to plan
    anew at every call would be host time that no user pays.
    """
    name = f"_{direction}"
    plan = getattr(triton_norm, name).__wrapped__

    @functools.lru_cache(None)
    def planned(*arguments: Any) -> Any:
        with mock.patch.object(table, direction, lambda *args, **kwargs: config):
            return plan(*arguments)

    @contextlib.contextmanager
    def forced() -> Iterator[None]:
        with mock.patch.object(triton_norm, name, planned):
            triton_host.forget_prepared()
            yield
        triton_host.forget_prepared()

    return forced


# --- what a case is tried with ---


def absent(device_type: str) -> dict[str, str | None]:
    """By provider, why its forms cannot be tried on this device, or None."""
    on_cpu = {"cuda": cuda_library.EMULATED is not None, "triton": triton_host.INTERPRETING}
    reasons: dict[str, str | None] = {}
    for provider in OURS:
        reasons[provider] = dispatch.unavailable_reason(provider)
        if reasons[provider] is None and on_cpu[provider] != (device_type == "cpu"):
            reasons[provider] = f"its kernels run on {'CPU' if on_cpu[provider] else 'CUDA'} tensors here"
    return reasons


def norm_of(case: Case) -> Norm:
    assert isinstance(case.operation, Norm)
    return case.operation


def triton_configs(case: Case) -> list[Config | Pinned]:
    """The table's, then the others."""
    op, n = norm_of(case), case.shape[-1]
    wide_rows, small = case.torch_dtype.itemsize > 2, case.torch_dtype == torch.float64
    if case.direction == "forward":
        base = table.forward(n, op.epilogue, wide_rows, False, small)
        return [base, *tune_variants.triton_forward(n, base)]
    accumulators = 2 - op.rms + op.epilogue
    weight_class = table.load(accumulators, op.epilogue, False, wide_rows, False, False)
    base, slab = (table.backward(columns, weight_class, small) for columns in (n, 1 << 24))
    return [base, *tune_variants.triton_backward(n, base, slab)]


def _triton(case: Case) -> tuple[str, list[Variant]]:
    base, *others = triton_configs(case)
    text, forced = tune_variants.triton_text, functools.partial(triton_form, case.direction)
    return text(base), [Variant("triton"), *(Variant("triton", text(c), forced(c)) for c in others)]


def cuda_table(case: Case, device: torch.device) -> dict[str, list[int]]:
    """The table's form of each kernel: chunks, threads, rows, ranks, tiles."""
    row = torch.empty(1, case.shape[-1], dtype=case.torch_dtype, device=device)
    lines = [line.split() for line in torch.ops.fusednorm_cuda.forms(row, True).splitlines()]
    return {kernel: [int(number) for number in numbers] for kernel, *numbers in lines}


def _cuda(case: Case, device: torch.device) -> tuple[str, list[Variant]]:
    chunks, threads, rows, ranks, tiles = cuda_table(case, device)[case.direction][:5]
    n_rows, n = case.shape
    vectors = triton_host.ceil(n * case.torch_dtype.itemsize, 16)
    most_ranks, processors = 8, 2
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        most_ranks, processors = 8 if properties.major >= 9 else 1, properties.multi_processor_count
    base: Forward | Backward
    others: Sequence[Forward | Backward]
    if case.direction == "forward":
        base = Forward(chunks, threads, rows, ranks)
        others = tune_variants.cuda_forward(vectors, base, most_ranks)
    else:
        base = Backward(threads, rows, ranks)
        others = tune_variants.cuda_backward(vectors, base, n_rows, processors, tiles > 1, most_ranks)

    def forced(form: Forward | Backward) -> Forced:
        return lambda: cuda_form(case.direction, form)

    found = [Variant("cuda"), *(Variant("cuda", form.text, forced(form)) for form in others)]
    if case.direction == "backward":
        found.append(Variant("cuda", NO_OVERLAP, lambda: cuda_form("overlap", [0])))
    return base.text, found


def variants(case: Case, device: torch.device, provider: str) -> tuple[str, list[Variant]]:
    """The form that a provider's table has for the case, and its variants, the table's first."""
    return _cuda(case, device) if provider == "cuda" else _triton(case)
