"""What the code-generation gate compiles and expects of the activation kernels; `norms.py` does it."""

from __future__ import annotations

from collections.abc import Collection

import torch

from fusednorm._activations import ACTIVATIONS
from fusednorm._options import ActivationInputs, ActivationOptions
from fusednorm.providers.triton import activation as triton_activation
from fusednorm.providers.triton import activation_config as table
from fusednorm.providers.triton.config import Config

STEM = "bias_act_dropout"
WIDTHS = (64, 128, 256, 512, 1024, 2048, 56, 2040)  # every tile, and the narrowest and the widest not filled
MODES = {a: frozenset({a}) for a in ACTIVATIONS} | {f"{a}_dropout": frozenset({a, "dropout"}) for a in ACTIVATIONS}


def call(x: torch.Tensor, words: Collection[str], backward: bool) -> None:
    """One call of the provider on rows like x, with a bias."""
    activation = next(a for a in ACTIVATIONS if a in words)
    bias, p = x.new_ones(x.shape[-1]), 0.1 * ("dropout" in words)
    seed = torch.zeros(1, dtype=torch.int64) if p else None
    inputs, options = ActivationInputs(x, bias, seed), ActivationOptions(activation, p)
    if backward:
        triton_activation.bias_act_dropout_bwd(x, inputs, options, [True, True])
    else:
        triton_activation.bias_act_dropout_fwd(inputs, options)


def config(kernel: str, n: int, small: bool, float64: bool, two_strides: bool) -> Config:
    return (table.backward if kernel.endswith("bwd") else table.forward)(n, small, float64, two_strides)


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
