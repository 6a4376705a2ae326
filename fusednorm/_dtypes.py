"""The precision that all arithmetic is done in."""

from __future__ import annotations

import torch


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where any operand has it, else float32; statistics and partial sums are kept in it too."""
    return torch.float64 if torch.float64 in dtypes else torch.float32
