"""Tiles of the attention kernels, by head dim, dtype, what is masked, and architecture.

Chosen by compiled figures, not by timing: the largest tiles that compile without a spill under both versions of Triton
(`benchmarks/results/codegen_attention.md`; `tests/tools/test_codegen_attention.py` holds them to it).
"""

from __future__ import annotations

from typing import NamedTuple

_LARGE_SHARED = 131072  # bytes; desktop GPUs give a program less


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
    heavy: bool  # an attn_mask, a softcap or a scale not folded: another number for each element of a tile
    bounded: bool  # causality or a window
    capability: tuple[int, int]
    shared: int  # bytes of shared memory that a program may have
    triton: tuple[int, int]  # its version

    @property
    def registers_hold_operands(self) -> bool:
        """The matrix units of sm_80 to sm_89 and of sm_120 read both operands from registers, those of datacenter
        devices after them from shared memory."""
        return self.capability[0] in (8, 12)

    @property
    def has_tensor_memory(self) -> bool:
        return self.capability[0] in (10, 11)

    @property
    def avoids_tensor_memory(self) -> bool:
        """Triton 3.6 fails in its own pass over tensor memory (TritonNvidiaGPUOptimizeTMemLayoutsPass) where a loop has
        bounds of its own; what is between 3.6 and 3.9 was not tried. Below 64 rows it takes the matrix instructions of
        before sm_100, which need none."""
        return self.has_tensor_memory and self.triton < (3, 9)

    @property
    def narrow(self) -> bool:
        """Whether heads of 256 need smaller tiles: 99 KiB of shared memory, that of desktop GPUs, are too few for the
        others, and so are registers that hold operands too."""
        full = self.registers_hold_operands and (self.dropout or self.heavy or self.bounded)
        return self.shared < _LARGE_SHARED or full


def columns(d: int) -> int:
    """A head dim padded to what the matrix units take."""
    return max(16, 1 << max(d - 1, 0).bit_length())


_FLOAT32 = Tile(32, 32, 8, 1)  # four logits a thread; IEEE products run outside the matrix units


def _float32_part(n: Need) -> int:
    """A thread keeps the operands of its logits in registers. Those of 32 columns fit."""
    return 32 if n.columns > 32 else 0


def forward(n: Need) -> Tile:
    if n.itemsize == 4:
        return _FLOAT32
    if n.avoids_tensor_memory:
        if n.columns > 128:
            return Tile(32, 32, 8, 2)
        return Tile(32, 32 if n.heavy else 64, 4, 2)
    if n.columns > 128:
        return Tile(64, 16 if n.heavy or n.narrow else 32, 8, 2)
    if n.registers_hold_operands:
        if n.heavy:
            return Tile(64, 32, 8, 2)
        if n.columns <= 64:
            four_spill = n.bounded and n.capability != (8, 0) and n.triton < (3, 9)
            warps = 8 if four_spill else 4
            return Tile(64, 32, 4, 2) if n.dropout else Tile(64, 64, warps, 3)
        return Tile(64, 64, 8, 2)
    if n.heavy:
        return Tile(128, 32, 8, 2)
    return Tile(128, 64, 8, 3 if n.columns <= 64 else 2)


def forward_split(n: Need) -> Tile:
    """Where programs share the keys, queries are few: half the rows by half the warps, so a thread has as much."""
    tile = forward(n)
    return tile._replace(block_m=64, warps=tile.warps // 2) if tile.block_m == 128 else tile


def forward_merge(n: Need) -> Tile:
    """A query a program, and splits at a step."""
    return Tile(1, 16, 4, 1)


_LEAST_KEYS, _LEAST_TILES, _KEYS_A_QUERY = 1024, 2, 16


def key_splits(programs: int, n_queries: int, n_keys: int, tile: Tile, processors: int) -> int:
    """How many programs share the keys of a tile of queries; 1: one has them all.

    `programs` are those of one sample without splits: were they those of the batch, a result's bits would follow the
    batch around it.
    """
    # One program reads keys and values at the speed of one processor. Of each query a split writes and reads 8 DV
    # bytes, of each key it reads 4 DV in 16 bits: with 16 keys a query that is an eighth more at most.
    if n_keys < _LEAST_KEYS or programs >= processors:
        return 1
    least = max(_LEAST_TILES * tile.block_n, _KEYS_A_QUERY * min(n_queries, tile.block_m))
    return max(1, min(2 * processors // programs, n_keys // least))


def delta(n: Need) -> Tile:
    return Tile(32, 32, 4, 1)


def splits(n: Need) -> bool:
    """Whether the gradients of keys and of values take a launch each: their accumulators are half of all registers."""
    if n.itemsize == 4 or n.columns > 128:
        return True
    if n.registers_hold_operands:
        return n.columns > 64 or n.dropout or n.heavy
    return n.columns > 64 and (n.dropout or n.heavy or n.bounded or n.has_tensor_memory)


# How many columns a product of whole heads takes at a time; 0: all. With all, a program loads its own rows once.


def part_of_forward(n: Need) -> int:
    return _float32_part(n) if n.itemsize == 4 else 0


def part_of_keys(n: Need) -> int:
    if n.itemsize == 4:
        return 16 if n.columns > 128 and n.dropout and n.heavy and n.capability[0] == 12 else _float32_part(n)
    if n.dropout and n.heavy and n.columns == 128 and n.shared < _LARGE_SHARED:
        return 64
    if n.columns <= 128:
        return 0
    if n.registers_hold_operands and n.dropout and n.heavy and n.bounded:
        return 64
    return 128 if n.dropout or n.heavy or (n.bounded and n.capability[0] != 9) else 0


def part_of_queries(n: Need) -> int:
    if n.itemsize == 4:
        return _float32_part(n)
    if n.capability[0] == 9 and n.columns <= 128 and n.heavy:
        return n.columns  # else ptxas makes its matrix instructions wait one by one
    return 64 if n.columns > 128 and part_of_keys(n) else 0


def part_of_mask(n: Need) -> int:
    if n.itemsize == 4:
        return _float32_part(n)
    return 64 if n.columns > 64 else 0


def backward_keys(n: Need) -> Tile:
    if n.itemsize == 4 and n.columns > 128:
        return Tile(16, 16 if n.dropout and n.capability[0] == 12 else 32, 8, 1)
    if n.itemsize == 4:
        return _FLOAT32
    more = n.dropout or n.heavy
    if n.avoids_tensor_memory and n.columns <= 128:
        return Tile(16 if n.columns > 64 or more else 32, 32, 8 if n.heavy and n.columns > 64 else 4, 2)
    if n.columns > 128:
        if n.capability[0] == 9:
            return Tile(16, 64 if part_of_keys(n) else 128, 8, 2)
        return Tile(16, 32, 8, 1 if more or n.bounded or n.narrow else 2)
    if n.registers_hold_operands:
        if more and n.columns <= 64:
            return Tile(16, 32, 4, 2)
        if more:
            return Tile(16, 32, 8, 1 if n.heavy and n.bounded else 2)
        return Tile(32, 32, 4, 2) if n.columns <= 64 or n.bounded else Tile(32, 64, 8, 2)
    if n.has_tensor_memory and n.columns > 64:
        return Tile(16, 32 if n.heavy else 64, 8, 2)
    if more:
        return Tile(16, 64 if n.has_tensor_memory else 128, 8, 2)
    return Tile(32 if n.columns > 64 or n.bounded or n.has_tensor_memory else 64, 128, 8, 2)


def backward_queries(n: Need) -> Tile:
    if n.itemsize == 4:
        return _FLOAT32 if n.columns <= 128 else Tile(16, 16, 8, 1)
    if n.columns > 128 and (n.narrow or n.avoids_tensor_memory):
        return Tile(32, 32, 8, 1)
    if n.avoids_tensor_memory:
        return Tile(32, 32 if n.columns > 64 or n.heavy else 64, 4, 2)
    if n.columns > 128:
        return Tile(64, 32 if part_of_keys(n) else 16, 8, 2)
    if n.registers_hold_operands:
        if n.dropout and n.columns <= 64:
            return Tile(32, 32, 4, 2)
        if n.heavy:
            return Tile(64 if n.columns <= 64 else 32, 32, 8, 2)
        return Tile(128 if n.columns <= 64 else 64, 32, 8, 2)
    if n.heavy:
        return Tile(64, 32, 8, 2)
    return Tile(128, 32 if n.columns > 64 and n.dropout else 64, 8, 2)


def backward_mask(n: Need) -> Tile:
    if n.itemsize == 4:
        return _FLOAT32
    if n.avoids_tensor_memory:
        return Tile(32, 32, 4, 1)
    return Tile(64, 64 if n.columns <= 64 and not n.registers_hold_operands else 32, 8, 1)
