"""What the CUDA library launches on stand-in GPUs (`standin.py`).

A kernel takes one struct. It is read here as the headers declare it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import emulated
import launched
import standin
import torch
from launched import EPS, ROWS, WIDTH, Step, leaf

import fusednorm as fn
from fusednorm import dispatch
from fusednorm.providers.cuda import library

HEADERS = ("common/data.h", "cuda/support/args.h", "cuda/norm/norm_args.h", "cuda/activation/activation_args.h")
KERNEL = re.compile(r"_ZN14fusednorm_cuda\d+(\w+_kernel)I(\w*?)EEvNS_\d+(\w+)E")


class Launch(NamedTuple):
    kernel: str
    template: str  # its arguments, mangled
    given: dict[str, Any]  # what the struct has: a field of a struct in it is "x.data"
    note: standin.Note


@cache
def structs() -> dict[str, Any]:
    known: dict[str, Any] = {"int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32, "bool": ctypes.c_bool}
    known |= {"int": ctypes.c_int, "float": ctypes.c_float, "double": ctypes.c_double, "char": ctypes.c_char}
    known |= {"Dtype": ctypes.c_int, "Activation": ctypes.c_int}
    for header in HEADERS:
        text = re.sub(r"//.*", "", (emulated.CSRC / header).read_text())
        for name, base, body in re.findall(r"struct (\w+)(?: : (\w+))? \{(.*?)\n\};", text, re.DOTALL):
            fields = []
            for kind, declared in re.findall(r"(?:const )?(\w+)\b([^;]+);", body):
                for star, field, count in re.findall(r"(\*?) ?(\w+)(?:\[(\d+)\])?", declared):
                    type_ = ctypes.c_void_p if star else known[kind]
                    fields.append((field, type_ * int(count) if count else type_))
            known[name] = type(name, (known.get(base, ctypes.Structure),), {"_fields_": fields})
    return known


def flat(struct: Any, before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in reversed(type(struct).__mro__):
        for name, *_ in vars(kind).get("_fields_", ()):
            value = getattr(struct, name)
            nested = isinstance(value, ctypes.Structure)
            found |= flat(value, f"{before}{name}.") if nested else {before + name: value}
    return {name: [*value] if isinstance(value, ctypes.Array) else value for name, value in found.items()}


def read(note: standin.Note) -> Launch:
    found = KERNEL.fullmatch(note.kernel)
    assert found is not None, note.kernel
    name, template, struct = found.groups()
    (parameter,) = note.parameters
    assert len(parameter) == ctypes.sizeof(structs()[struct]), struct
    return Launch(name, template, flat(structs()[struct].from_buffer_copy(parameter)), note)


# --- in the process that has the GPUs ---


@contextmanager
def watched() -> Iterator[list[Launch]]:
    standin.driver.standin_forget()
    noted: list[Launch] = []
    yield noted
    noted.extend(read(note) for note in standin.notes() if "first_kernel" not in note.kernel)


def step(*call: Any, fastpath: bool = True, **options: Any) -> Step:
    with nullcontext() if fastpath else dispatch.settings.without_fastpath():
        return launched.step(*call, provider="cuda", watch=watched, **options)


def alike() -> None:
    """The second GPU becomes one of the first one's kind, whose kernels the library has."""
    for attribute, value in standin.DEVICES[0].items():
        standin.DEVICES[1][attribute] = value
        standin.driver.standin_set(1, attribute, value)


def refused(device: int) -> tuple[str | None, int, int]:
    """As in a new process: why no kernel runs there, and what is left of it for the next call to find.

    That is the error that is kept, and this thread's mode while another one captures.
    """
    library.forget_devices()
    said, runtime, mode = library.unusable(device), ctypes.CDLL(str(standin.runtime())), ctypes.c_int(0)
    assert runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
    return said, runtime.cudaGetLastError(), mode.value


def modulated(function: str, dtype: torch.dtype, width: int = WIDTH, **options: Any) -> Any:
    """A bias and a layer scale that are slices of a tensor with a row for each sample, beside a shared weight."""
    rows = {name: leaf((3, ROWS, width), dtype) for name in ("x", "residual")}
    slices = leaf((3, 6 * width), dtype).detach()
    bias, layer_scale = (slices[:, k * width : (k + 1) * width].requires_grad_() for k in (1, 4))
    given = rows | {"weight": leaf((width,), dtype), "bias": bias, "layer_scale": layer_scale}
    modulation = {"gate": layer_scale, "shift": bias}
    normed, z = getattr(fn, function)(*rows.values(), width, given["weight"], eps=EPS, **modulation, **options)
    return given, {"normed": normed, "residual_out": z}, {"M": 3 * ROWS, "eps": EPS}


def strided(dtype: torch.dtype, width: int = WIDTH, **options: Any) -> Any:
    """Rows of x at two strides, of the residual at one."""
    x = leaf((ROWS, 4, 2 * width), dtype).detach()[:, 1:, :width].transpose(0, 1)
    residual = leaf((3, ROWS, 2 * width), dtype).detach()[..., width:]
    given = {"x": x.requires_grad_(), "residual": residual.requires_grad_(), "weight": leaf((width,), dtype)}
    normed, z = fn.add_rms_norm(x, residual, width, given["weight"], eps=EPS, **options)
    return given, {"normed": normed, "residual_out": z}, {"M": 3 * ROWS, "eps": EPS}
