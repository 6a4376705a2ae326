"""float64 oracle and eager twin of ``bias_act_dropout``, in the form that `oracle.check` takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from oracle import keep_mask, keep_scale
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # as their papers write them
    "relu": lambda u: torch.where(u > 0, u, torch.zeros_like(u)),
    "gelu": lambda u: u * 0.5 * torch.erfc(-u / math.sqrt(2)),
    "gelu_tanh": lambda u: 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))),
    "silu": lambda u: u / (1 + torch.exp(-u)),
    "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),  # of no paper: openai/CLIP, clip/model.py
}
TORCHS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
}
NEGATIVE_TAIL = {  # how exact it is for u from -9 to -1, relatively; the tanh form's exponent is not split
    "gelu": 2.0**-21,
    "gelu_tanh": 2.0**-16,
    "silu": 2.0**-21,
    "quick_gelu": 2.0**-19,  # 1.702 u, which is as small as -15, is rounded
}


@dataclass(frozen=True)
class ActivationCall:
    """One call: `ours` by the package, `eager` as torch users write it, `exact` float64. Leaves: x, bias."""

    activation: str
    view: Callable[[Tensor], Tensor] = lambda leaf: leaf
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def function(self) -> str:
        return f"bias_act_dropout {self.activation}"

    def computed_in(self, leaves: Mapping[str, Tensor]) -> torch.dtype:
        return torch.float64 if leaves["x"].dtype == torch.float64 else torch.float32

    def ours(self, leaves: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        import fusednorm

        x = self.view(leaves["x"])
        return (fusednorm.bias_act_dropout(x, leaves.get("bias"), self.activation, **self.options),)

    def mask(self, x: Tensor) -> Tensor | None:
        p = self.options.get("dropout_p", 0.0)
        if not p:
            return None
        kept = keep_mask(x.shape[:-1].numel(), x.shape[-1], p, int(self.options["seed"]))
        return kept.reshape(x.shape).to(x.device)

    def exact(self, leaves: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """`leaves` in float64."""
        x = self.view(leaves["x"])
        y = ACTIVATIONS[self.activation](x + leaves["bias"] if "bias" in leaves else x)
        mask = self.mask(x)
        return (y if mask is None else y * (mask.double() * keep_scale(self.options["dropout_p"])),)

    def eager(self, leaves: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Each operation rounds to the tensors' dtype, mixtures as torch promotes them."""
        x = self.view(leaves["x"])
        bias = leaves.get("bias")
        if bias is not None and bias.dtype == torch.float64 != x.dtype:
            bias = bias.float()  # float32 is computed in float32, also beside a float64 parameter
        y = TORCHS[self.activation](x if bias is None else x + bias)
        mask = self.mask(x)
        if mask is not None:
            y = (y * mask) * keep_scale(self.options["dropout_p"])
        return (y.to(x.dtype),)


def hold_to_torch_at_huge_values(
    activation: str,
    values: tuple[float, ...] = (3e38, 1e20, 3e4, 100.0, 20.0),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """As torch's. Where torch's overflows on the way, which depends on the processor, as float64 has it."""
    import fusednorm

    given = torch.tensor([*values, *(-value for value in values), math.nan], device=device, dtype=dtype)
    found = []
    for function, wide in (
        (lambda t: fusednorm.bias_act_dropout(t, None, activation), dtype),
        (TORCHS[activation], dtype),
        (TORCHS[activation], torch.float64),
    ):
        x = given.to(wide).requires_grad_()
        y = function(x)
        found.append([t.to(dtype) for t in (y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y)))])
    for got, torchs, exact in zip(*found):
        expected = torch.where(torchs.isinf() & (got != torchs), exact, torchs)
        compared = ~torchs.isnan()  # torch's own is not a number at some infinite and huge values
        torch.testing.assert_close(got[compared], expected[compared])  # at torch's own tolerances for the dtype
        assert got[-1].isnan() == torchs[-1].isnan()


def hold_to_a_column_dropped_whole(columns: int) -> None:
    """A NaN in its bias comes neither into the result nor, by rows past the last one, into its gradient."""
    import fusednorm

    seed = next(s for s in range(100) if not fusednorm.dropout_mask((3, columns), 0.5, s)[:, 1].any())
    bias = torch.zeros(columns).index_fill_(0, torch.tensor(1), math.nan).requires_grad_()
    y = fusednorm.bias_act_dropout(torch.ones(3, columns), bias, "gelu", 0.5, seed=seed)
    (dbias,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert y.isfinite().all() and dbias.isfinite().all() and dbias[1] == 0
