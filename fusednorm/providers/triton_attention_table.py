"""Tiles of the attention kernels, by head dim, dtype, what is masked, and architecture.

Chosen by compiled figures, not by timing: the largest tiles that compile without a spill under both versions of Triton
(`benchmarks/results/codegen_attention.md`; `tests/test_codegen_attention.py` holds them to it).
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A launch configuration: queries, keys, warps, and how many tiles are on their way at once."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    @property
    def registers(self) -> int:
        """The most registers a thread may have."""
        return min(255, 65536 // (32 * self.warps))


class Need(NamedTuple):
    """What a choice depends on."""

    columns: int  # of the wider head dim, padded
    itemsize: int
    dropout: bool
    mask: bool  # an attn_mask
    capability: tuple[int, int]


def columns(d: int) -> int:
    """A head dim padded to what the matrix units take."""
    return max(16, 1 << max(d - 1, 0).bit_length())


def _float32(n: Need) -> Tile:
    """Outside the matrix units; a thread has an eighth of a row."""
    return Tile(32, 32, 4, 1) if n.columns <= 128 else Tile(16, 32, 4, 1)


def forward(n: Need) -> Tile:
    if n.itemsize == 4:
        return _float32(n)
    if n.columns <= 64:
        return Tile(128, 64, 8, 3)
    return Tile(128, 64, 8, 2) if n.columns <= 128 else Tile(64, 32, 4, 2)


def delta(n: Need) -> Tile:
    return Tile(32, 32, 4, 1)


def splits(n: Need) -> bool:
    """Whether the gradients of keys and of values take a launch each: their accumulators are half of all registers."""
    return n.columns > 128 or (n.columns > 64 and (n.dropout or n.mask))


def backward_keys(n: Need) -> Tile:
    if n.itemsize == 4:
        return _float32(n)
    if n.columns <= 64:
        return Tile(32 if n.dropout or n.mask else 64, 128, 8, 2)
    return Tile(32, 128, 8, 2) if n.columns <= 128 else Tile(16, 64, 4, 2)


def backward_queries(n: Need) -> Tile:
    if n.itemsize == 4:
        return _float32(n)
    if n.columns <= 128:
        return Tile(128, 32 if n.columns > 64 and (n.dropout or n.mask) else 64, 8, 2)
    return Tile(64, 32, 4, 2)


def backward_mask(n: Need) -> Tile:
    if n.itemsize == 4:
        return _float32(n)
    return Tile(64, 64, 4, 1) if n.columns <= 128 else Tile(64, 32, 4, 1)
