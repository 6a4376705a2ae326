"""timm without torchvision: timm imports names of it that its models here never call.

The binary of torchvision does not load beside the CPU build of torch. So timm is imported with empty modules in its
place, which are taken away again: no other package finds them. Where torchvision is installed, nothing is done.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Empty(ModuleType):
    """Has a class of any name asked of it; nothing is an instance of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = InterpolationMode if name == "InterpolationMode" else type(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


@contextmanager
def _stubs() -> Iterator[None]:
    for name in MODULES:
        module = sys.modules[name] = _Empty(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in MODULES:
            del sys.modules[name]


def import_timm() -> ModuleType:
    """timm, imported with torchvision's place filled if nothing fills it."""
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    from transformers.utils import is_torchvision_available

    assert not is_torchvision_available()  # what it says is kept: it must be asked before the stubs are there
    with _stubs():
        return importlib.import_module("timm")
