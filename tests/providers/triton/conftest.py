"""What the Triton provider would launch, and rows that do not fit."""

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


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tables without register-resident tiles: the wide forward and the column slabs, on rows of a few hundred."""
    from fusednorm.providers.triton import norm as triton_norm
    from fusednorm.providers.triton import norm_config as table

    for small in ("", "_SMALL"):
        monkeypatch.setattr(table, f"_FORWARD{small}", ())
        monkeypatch.setattr(table, f"_FORWARD_WIDE{small}", (1, 64, 4))
        monkeypatch.setattr(table, f"_BACKWARD{small}", ())
        monkeypatch.setattr(table, f"_SLAB{small}", (2, 32, 4) if small else (1, 64, 4))
    monkeypatch.setattr(table, "SUMS", table.Config(2, 64, 0, 4, 4))
    triton_norm.forget_variants()
    yield
    triton_norm.forget_variants()
