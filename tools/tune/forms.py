"""The forms that this tool tries: the table's own, those of `fusednorm tune`, and what no user's file keeps.

The last are numbers of programs, each the best for some numbers of rows, and launches that do not overlap.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from benchmarks.cases import Case
from fusednorm import use_provider
from fusednorm.providers.triton import host
from fusednorm.tuning import forms as tuning_forms
from fusednorm.tuning import near_forms
from fusednorm.tuning.forms import TriedForm
from fusednorm.tuning.near_forms import CudaBackwardForm
from tools.tune.cases import kernel_of

NO_OVERLAP = "no overlap"  # the kernel that sums the partials is launched when the backward has ended
_RESIDENT = (512, 1024, 2048)  # threads on a multiprocessor, in what numbers of programs are tried


@contextlib.contextmanager
def active(form: TriedForm) -> Iterator[None]:
    """Every call is the provider's, in this form."""
    with form.forced(), use_provider(form.provider):
        yield


def numbers_of_programs(base: CudaBackwardForm, vectors: int, slabs: bool, rows: int, processors: int) -> list[int]:
    """Blocks, or clusters, that visit the rows in turns, for a number of rows."""
    blocks = host.ceil(vectors, base.threads) if slabs else base.ranks  # of a row
    found = []
    for resident in _RESIDENT:
        fitting = max(resident // (base.threads * base.rows), 1)
        found.append(min(max(processors * fitting // blocks, 1), host.ceil(rows, base.rows)))
    return list(dict.fromkeys(found))


def _programs(case: Case, device: torch.device, base: CudaBackwardForm) -> list[TriedForm]:
    rows, columns = case.shape
    vectors = host.ceil(columns * case.torch_dtype.itemsize, 16)
    slabs = vectors > base.threads * base.ranks
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    found = []
    for programs in numbers_of_programs(base, vectors, slabs, rows, processors):
        forced = functools.partial(tuning_forms.cuda_form, "backward", [*base, programs])
        found.append(TriedForm("cuda", f"{base.text} p{programs}", forced))
    return found


def forms_tried(case: Case, device: torch.device, provider: str) -> tuple[str, list[TriedForm]]:
    """The form that a provider's table has for the case's kernel, and all that are tried, the table's first."""
    kernel = kernel_of(case)
    found = [TriedForm(provider), *tuning_forms.forms_to_try(kernel, device, provider)]
    if provider == "triton":
        return near_forms.triton_text(tuning_forms.triton_forms(kernel)[0]), found
    base = tuning_forms.cuda_forms(kernel, device)[0]
    if isinstance(base, CudaBackwardForm):
        found += _programs(case, device, base)
        found.append(TriedForm(provider, NO_OVERLAP, functools.partial(tuning_forms.cuda_form, "overlap", [0])))
    return base.text, found
