"""PyTorch's own samples of its operators and modules.

The first test that asks imports them: that takes 6 seconds, which every process would pay as it collects the tests.
"""

from __future__ import annotations

import functools
import importlib
import warnings

import pytest
import torch


def _import(module: str):
    for package in ("numpy", "expecttest"):
        pytest.importorskip(package, reason="torch's samples need it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's test helpers warn about optional packages as they are imported
        return importlib.import_module(f"torch.testing._internal.{module}")


@functools.cache
def operator(name: str):
    """torch's OpInfo of an operator of `torch.nn.functional`."""
    (info,) = [i for i in _import("common_methods_invocations").op_db if i.name == f"nn.functional.{name}"]
    return info


@functools.cache
def module(name: str):
    """torch's ModuleInfo of a class of `torch.nn`."""
    (info,) = [i for i in _import("common_modules").module_db if i.module_cls.__name__ == name]
    return info


def strides_apart(value):
    """A tensor's values where its elements do not lie one after another; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.numel() <= 1:
        return value
    return _import("common_utils").noncontiguous_like(value)
