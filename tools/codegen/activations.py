"""What the code-generation gate compiles and expects of the activation kernels; `norms.py` does it."""

from __future__ import annotations

from fusednorm._activations import ACTIVATIONS
from fusednorm.providers.triton.config import Config

STEM = "bias_act_dropout"
WIDTHS = (64, 128, 256, 512, 1024, 2048, 56, 2040)  # every tile, and the narrowest and the widest not filled
MODES = {a: frozenset({a}) for a in ACTIVATIONS} | {f"{a}_dropout": frozenset({a, "dropout"}) for a in ACTIVATIONS}


def accesses(kernel: str, config: Config, itemsize: int) -> tuple[int, int]:
    """16-byte loads and stores of one thread by the byte model: each operand once, each result once.

    Forward reads x and the bias and writes y. Backward reads dy, x and the bias and writes dx, and once in its life the
    sums of its columns (16 bytes at a time where there are as many for each lane).
    """
    elements = config.block_m * config.block_n // (32 * config.warps)
    vectors = max(elements * itemsize // 16, 1)
    if kernel.endswith("fwd"):
        return 2 * vectors, vectors
    partials = config.block_n * max(itemsize, 4) // (16 * 32 * config.warps)
    return 3 * vectors, vectors + partials
