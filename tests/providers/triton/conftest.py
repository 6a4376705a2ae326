"""What the Triton provider would launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest


class Launch(NamedTuple):
    variant: Any
    grid: tuple[int, ...]
    pointers: tuple
    numbers: tuple

    @property
    def kernel(self) -> str:
        return self.variant.function.__name__

    @property
    def dtypes(self) -> tuple:
        return tuple(None if t is None else t.dtype for t in self.pointers)

    @property
    def compiled(self) -> tuple:
        """What names a compiled variant."""
        of = self.variant
        return self.kernel, self.dtypes, of.constants, of.warps, of.stages, of.registers, of.aligned


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    """What would be launched: nothing is."""
    from fusednorm.providers.triton import launch as triton_launch

    noted: list[Launch] = []
    monkeypatch.setattr(triton_launch.Variant, "launch", lambda *launch: noted.append(Launch(*launch)))
    return noted
