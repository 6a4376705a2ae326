"""The fast path: norms, ``bias_act_dropout`` and attention on the CPU in one C++ call each, autograd included.

Norms and attention on a GPU go through it to the CUDA library. It takes plain dense tensors of one dtype, and no mode,
transform, autocast or tracing. For every other call it returns None, and Python goes on.

It is built over torch's own C++ interface, which is not stable. So it serves the release of torch and the Python that
built it, and is left out elsewhere.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from .._once import once
from ..providers.cpu import library as cpu
from ..providers.native import check_not_truncated

_SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]  # of this Python
FILE = Path(__file__).parents[1] / f"_fastpath.torch-{torch.__version__}{_SUFFIX}"
# Published builds of one release, for CPUs and for CUDA, have the same headers. A torch of one's own is another matter.
_PUBLISHED = re.compile(r"(\d+\.\d+\.\d+)(\+(cpu|cu\d+))?")


def _built_for(file: Path) -> str:
    version = file.name.removeprefix("_fastpath.torch-")
    return (
        version.removesuffix(_SUFFIX) if version.endswith(_SUFFIX) else f"{version.split('.cp')[0]} and another Python"
    )


def _fitting() -> Path | None:
    """The file for this very torch, or for another published build of its release."""
    if FILE.exists():
        return FILE
    here = _PUBLISHED.fullmatch(torch.__version__)
    for file in sorted(FILE.parent.glob(f"_fastpath.torch-*{_SUFFIX}")):
        built = _PUBLISHED.fullmatch(_built_for(file))
        if here and built and here[1] == built[1]:
            return file
    return None


@once
def load() -> tuple[Any, str]:
    """(the module, "") or (None, why it cannot be had). It calls the CPU library, which is loaded first."""
    if os.environ.get("FUSEDNORM_FASTPATH") == "0":
        return None, "FUSEDNORM_FASTPATH=0 leaves it out"
    reason = cpu.unavailable_reason()
    if reason is not None:
        return None, reason
    file = _fitting()
    if file is None:
        others = ", ".join(sorted(map(_built_for, FILE.parent.glob("_fastpath.torch-*"))))
        built = f"it was built for torch {others}" if others else "it is not built"
        return None, f"{built}, and this is torch {torch.__version__} of Python {platform.python_version()}"
    try:
        check_not_truncated(file)
        loader = importlib.machinery.ExtensionFileLoader("_fastpath", str(file))
        spec = importlib.util.spec_from_loader("_fastpath", loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except Exception as fault:  # half a file, one for another machine: whatever it is, not usable
        return None, f"{file} does not load: {fault}"
    return module, ""


def attach_cuda(library: Path, emulated: bool, devices: int) -> None:
    """Let it serve norms and attention by the CUDA library, which is loaded, on the GPUs whose bits `devices` has.

    Where the library is `emulated`, on CPU tensors, if bit 0 is there.
    """
    module = load()[0]
    if module is not None:
        names = ("fusednorm_cuda_norms", "fusednorm_cuda_attentions")
        offered = [ctypes.c_char.in_dll(ctypes.CDLL(str(library)), name) for name in names]
        module.attach_cuda(*map(ctypes.addressof, offered), emulated, devices)
