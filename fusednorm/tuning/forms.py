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

from ..dispatch import use_provider
from ..providers.forms import Place
from ..providers.triton import host as triton_host
from ..providers.triton import norm_config as table
from ..providers.triton.config import Form
from . import variants as listed
from .calls import EPILOGUES, FAMILIES, CallClass
from .variants import Backward, Forward

TABLE = "table"
NO_OVERLAP = "no overlap"  # the kernel that sums the partials is launched when the backward has ended
OURS = ("cuda", "triton")  # the providers whose kernels have forms
Forced = Callable[[], AbstractContextManager[Any]]


class Kernel(NamedTuple):
    """A norm's kernel, as far as its forms depend on the call."""

    direction: str  # "forward" or "backward"
    rows: int
    columns: int
    dtype: torch.dtype
    rms: bool
    epilogue: bool  # with a bias of x and dropout

    @property
    def load(self) -> int:
        """Triton's class of registers. Those of the CUDA kernels are fixed when these are built."""
        wide_rows = self.dtype.itemsize > 2
        if self.direction == "forward":
            return table.forward_load(self.epilogue, wide_rows, False)
        return table.load(2 - self.rms + self.epilogue, self.epilogue, False, wide_rows, False, False)

    def place(self, provider: str) -> Place:
        load = self.load if provider == "triton" else 0
        return Place(self.direction, self.columns, self.dtype.itemsize, load)


def kernel_of(of: CallClass) -> Kernel | None:
    """The kernel whose forms are tried in calls of a class, with gradients the backward's; None: there is none."""
    if of.operation not in FAMILIES["norms"] or of.shape[1] % (8 if of.torch_dtype.itemsize == 2 else 4):
        return None  # rows that are not aligned have one form
    direction = "backward" if of.needs_grad else "forward"
    return Kernel(direction, *of.place, of.torch_dtype, "rms" in of.operation, of.operation in EPILOGUES)


@dataclass(frozen=True)
class Variant:
    """A provider in one of its forms."""

    provider: str
    form: str = TABLE
    forced: Forced = nullcontext
    numbers: tuple[int, ...] = ()  # as the user's file keeps them; none of what it cannot keep

    @property
    def name(self) -> str:
        return f"{self.provider} {self.form}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with self.forced(), use_provider(self.provider):
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


def triton_configs(kernel: Kernel) -> list[Form]:
    """The table's, then the others."""
    n, wide_rows, small = kernel.columns, kernel.dtype.itemsize > 2, kernel.dtype == torch.float64
    if kernel.direction == "forward":
        base = table.forward(n, kernel.epilogue, wide_rows, False, small)
        return [base, *listed.triton_forward(n, base)]
    base, slab = (table.backward(columns, kernel.load, small) for columns in (n, 1 << 24))
    return [base, *listed.triton_backward(n, base, slab)]


def _triton(kernel: Kernel) -> tuple[str, list[Variant]]:
    base, *others = triton_configs(kernel)
    text, forced = listed.triton_text, functools.partial(functools.partial, triton_form, kernel.place("triton"))
    return text(base), [Variant("triton"), *(Variant("triton", text(c), forced(c), tuple(c)) for c in others)]


def cuda_table(kernel: Kernel, device: torch.device) -> dict[str, list[int]]:
    """The table's form of each kernel: chunks, threads, rows, ranks, tiles."""
    row = torch.empty(1, kernel.columns, dtype=kernel.dtype, device=device)
    lines = [line.split() for line in torch.ops.fusednorm_cuda.forms(row, True).splitlines()]
    return {name: [int(number) for number in numbers] for name, *numbers in lines}


def _cuda(kernel: Kernel, device: torch.device) -> tuple[str, list[Variant]]:
    chunks, threads, rows, ranks, tiles = cuda_table(kernel, device)[kernel.direction][:5]
    vectors = triton_host.ceil(kernel.columns * kernel.dtype.itemsize, 16)
    most_ranks, processors = 8, 2
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        most_ranks, processors = 8 if properties.major >= 9 else 1, properties.multi_processor_count
    base: Forward | Backward
    others: Sequence[Forward | Backward]
    if kernel.direction == "forward":
        base = Forward(chunks, threads, rows, ranks)
        others = listed.cuda_forward(vectors, base, most_ranks)
    else:
        base = Backward(threads, rows, ranks)
        others = listed.cuda_backward(vectors, base, kernel.rows, processors, tiles > 1, most_ranks)
    forced = functools.partial(functools.partial, cuda_form, kernel.direction)
    found = [Variant("cuda"), *(Variant("cuda", form.text, forced(form), tuple(form)) for form in others)]
    if kernel.direction == "backward":
        found.append(Variant("cuda", NO_OVERLAP, functools.partial(cuda_form, "overlap", [0])))
    return base.text, found


def variants(kernel: Kernel, device: torch.device, provider: str) -> tuple[str, list[Variant]]:
    """The form that a provider's table has for the kernel, and its variants, the table's first."""
    return _cuda(kernel, device) if provider == "cuda" else _triton(kernel)
