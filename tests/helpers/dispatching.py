"""Providers put into the table for a test, and the fast path left out."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType

import pytest

from fusednorm.dispatch import registry, settings


def plant(monkeypatch: pytest.MonkeyPatch, name: str, module: ModuleType) -> None:
    """Put a provider of one module first in the table; nothing is remembered of the others."""
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "PROVIDERS", {name: (module.__name__,), **registry.PROVIDERS})
    for cache in ("_modules", "_serving", "functions", "_reasons"):
        monkeypatch.setattr(registry, cache, {})
    settings.current.plans.clear()


@contextlib.contextmanager
def unavailable(*names: str, reason: str = "its library is not built"):
    """As if these providers could not be used, and with them no fast path."""
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(registry._reasons, name, reason)
        with settings.without_fastpath():
            yield
