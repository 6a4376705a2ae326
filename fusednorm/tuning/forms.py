"""The forms of a norm's kernel, as contexts in which a call takes them.

Whatever raises inside, the kernel's own form comes back.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..providers.forms import Place
from ..providers.triton import host, norm_config
from ..providers.triton.config import Form
from . import near_forms
from .calls import EPILOGUES, FAMILIES, CallClass
from .near_forms import CudaBackwardForm, CudaForwardForm

TABLE = "table"
Forced = Callable[[], AbstractContextManager[Any]]


class Kernel(NamedTuple):
    """A norm's kernel, as far as its forms depend on the call. They do not depend on the number of rows."""

    direction: str  # "forward" or "backward"
    columns: int
    dtype: torch.dtype
    rms: bool
    epilogue: bool  # with a bias of x and dropout

    @property
    def load(self) -> int:
        """Triton's class of registers. Those of the CUDA kernels are fixed when these are built."""
        wide_rows = self.dtype.itemsize > 2
        if self.direction == "forward":
            return norm_config.forward_load(self.epilogue, wide_rows, False)
        return norm_config.load(2 - self.rms + self.epilogue, self.epilogue, False, wide_rows, False, False)

    def place(self, provider: str) -> Place:
        load = self.load if provider == "triton" else 0
        return Place(self.direction, self.columns, self.dtype.itemsize, load)


def kernel_of(of: CallClass) -> Kernel | None:
    """The kernel whose forms are tried in calls of a class, with gradients the backward's; None: there is none."""
    if of.operation not in FAMILIES["norms"] or of.shape[1] % (8 if of.torch_dtype.itemsize == 2 else 4):
        return None  # rows that are not aligned have one form
    direction = "backward" if of.needs_grad else "forward"
    return Kernel(direction, of.shape[1], of.torch_dtype, "rms" in of.operation, of.operation in EPILOGUES)


@dataclass(frozen=True)
class TriedForm:
    """A provider's kernel in one of its forms: the table's own, if no other is given."""

    provider: str
    text: str = TABLE
    forced: Forced = nullcontext
    numbers: tuple[int, ...] = ()  # the form, as the user's file keeps it

    @property
    def name(self) -> str:
        return f"{self.provider} {self.text}"


@contextlib.contextmanager
def cuda_form(what: str, numbers: Sequence[int]) -> Iterator[None]:
    """Every aligned norm takes this form of the kernel `what`, in the whole process."""
    force = torch.ops.fusednorm_cuda.force
    try:
        force(what, list(numbers))
        yield
    finally:
        force(what, [])


@contextlib.contextmanager
def triton_form(place: Place, form: Form) -> Iterator[None]:
    """Triton's kernel for such rows is launched in this form, in the whole process."""
    from ..providers.triton import norm

    try:
        norm.try_forms({place: form})
        yield
    finally:
        norm.try_forms({})


# --- what a kernel is tried with ---


def triton_forms(kernel: Kernel) -> tuple[Form, list[Form]]:
    """The table's, and those beside it."""
    n, wide_rows, small = kernel.columns, kernel.dtype.itemsize > 2, kernel.dtype == torch.float64
    if kernel.direction == "forward":
        base = norm_config.forward(n, kernel.epilogue, wide_rows, False, small)
        return base, near_forms.triton_forward(n, base)
    base, slab = (norm_config.backward(columns, kernel.load, small) for columns in (n, 1 << 24))
    return base, near_forms.triton_backward(n, base, slab)


def cuda_table(kernel: Kernel, device: torch.device) -> dict[str, list[int]]:
    """The table's form of each kernel: chunks, threads, rows, ranks, tiles."""
    row = torch.empty(1, kernel.columns, dtype=kernel.dtype, device=device)
    lines = [line.split() for line in torch.ops.fusednorm_cuda.forms(row, True).splitlines()]
    return {name: [int(number) for number in numbers] for name, *numbers in lines}


CudaForm = CudaForwardForm | CudaBackwardForm


def cuda_forms(kernel: Kernel, device: torch.device) -> tuple[CudaForm, Sequence[CudaForm]]:
    """The table's, and those beside it."""
    chunks, threads, rows, ranks, tiles = cuda_table(kernel, device)[kernel.direction][:5]
    vectors = host.ceil(kernel.columns * kernel.dtype.itemsize, 16)
    clusters = device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 9
    most_ranks = 8 if clusters else 1
    if kernel.direction == "forward":
        forward = CudaForwardForm(chunks, threads, rows, ranks)
        return forward, near_forms.cuda_forward(vectors, forward, most_ranks)
    backward = CudaBackwardForm(threads, rows, ranks)
    return backward, near_forms.cuda_backward(vectors, backward, tiles > 1, most_ranks)


def forms_to_try(kernel: Kernel, device: torch.device, provider: str) -> list[TriedForm]:
    """A provider's forms of the kernel, beside the table's own."""
    if provider == "cuda":
        cuda = functools.partial(functools.partial, cuda_form, kernel.direction)
        return [TriedForm(provider, form.text, cuda(form), tuple(form)) for form in cuda_forms(kernel, device)[1]]
    triton = functools.partial(functools.partial, triton_form, kernel.place(provider))
    others, text = triton_forms(kernel)[1], near_forms.triton_text
    return [TriedForm(provider, text(form), triton(form), tuple(form)) for form in others]
