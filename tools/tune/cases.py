"""The benchmarks' cases as kernels whose forms are tried, and who has forms to try here."""

from __future__ import annotations

from benchmarks.cases import Case, Norm
from fusednorm import dispatch
from fusednorm.providers.cuda import library
from fusednorm.providers.forms import WITH_FORMS
from fusednorm.providers.triton import host
from fusednorm.tuning.forms import Kernel


def norm_of(case: Case) -> Norm:
    assert isinstance(case.operation, Norm)
    return case.operation


def kernel_of(case: Case) -> Kernel:
    op = norm_of(case)
    return Kernel(case.direction, case.shape[-1], case.torch_dtype, op.rms, op.epilogue)


def absent(device_type: str) -> dict[str, str | None]:
    """By provider, why its forms cannot be tried on this device, or None."""
    on_cpu = {"cuda": library.EMULATED is not None, "triton": host.INTERPRETING}
    reasons: dict[str, str | None] = {}
    for provider in WITH_FORMS:
        reasons[provider] = dispatch.unavailable_reason(provider)
        if reasons[provider] is None and on_cpu[provider] != (device_type == "cpu"):
            reasons[provider] = f"its kernels run on {'CPU' if on_cpu[provider] else 'CUDA'} tensors here"
    return reasons
