"""The classes of calls that are measured, and such calls on random tensors.

A class is an operation, a dtype, whether gradients are wanted, and a shape: rows and columns of norms and activations,
(batch, heads, queries, keys, head_dim) of attention. Within a class, automatic choice decides alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import activation, attention, norm
from .._activations import ACTIVATIONS
from ..dispatch import tuned
from ..dispatch.rules import OPERATIONS

P = 0.1  # of dropout
NORMS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
EPILOGUES = ("bias_dropout_add_layer_norm", "bias_dropout_add_rms_norm")
ACTIVATION_NAMES = {OPERATIONS[name]: name for name in ACTIVATIONS}
ATTENTIONS = ("attention", "attention_causal", "attention_masked")
OPERATION_NAMES = (*NORMS, *EPILOGUES, *ACTIVATION_NAMES, "bias_gelu_dropout", *ATTENTIONS)
FAMILIES = {
    "norms": (*NORMS, *EPILOGUES),
    "activation": (*ACTIVATION_NAMES, "bias_gelu_dropout"),
    "attention": ATTENTIONS,
}


class CallClass(NamedTuple):
    operation: str
    dtype: str
    needs_grad: bool
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{self.operation}/{self.dtype}/{'both' if self.needs_grad else 'forward'}/{sizes}"

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def is_attention(self) -> bool:
        return self.operation in ATTENTIONS

    @property
    def draws_mask(self) -> bool:
        """Torch's own operators then are no candidate: their dropout mask is another."""
        return "dropout" in self.operation

    @property
    def line(self) -> str:
        return tuned.line(self.operation, self.torch_dtype.itemsize, self.needs_grad)

    @property
    def place(self) -> tuple[int, int]:
        """(rows, columns) in a line of crossovers: of attention, query-key pairs of a head, and the head dimension."""
        if self.is_attention:
            _, _, queries, keys, head_dim = self.shape
            return queries * keys, head_dim
        return self.shape[0], self.shape[1]

    @property
    def elements(self) -> int:
        """Of the largest tensors."""
        if self.is_attention:
            batch, heads, queries, keys, head_dim = self.shape
            return batch * heads * max(queries, keys) * head_dim
        return math.prod(self.shape)


def parse(name: str) -> CallClass:
    """A class by its name.

    Raises:
        ValueError: it names none.
    """
    operation, dtype, direction, sizes = name.split("/")
    shape = tuple(int(size) for size in sizes.split("x"))
    if operation not in OPERATION_NAMES or direction not in ("forward", "both"):
        raise ValueError(f"no class of calls is called {name!r}")
    found = CallClass(operation, dtype, direction == "both", shape)
    if len(shape) != (5 if found.is_attention else 2) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"no class of calls is called {name!r}")
    return found


@dataclass(frozen=True, eq=False)
class Call:
    """One call on random tensors."""

    function: Callable[..., Any]  # of this package; takes the leaves
    leaves: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]  # empty where no gradient is wanted

    def __call__(self) -> tuple[Tensor, ...]:
        """Outputs, then the gradients of all leaves."""
        outputs = self.function(*self.leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not self.cotangents:
            return outputs
        return (*outputs, *torch.autograd.grad(outputs, self.leaves, self.cotangents))

    def to(self, dtype: torch.dtype) -> Call:
        """The same call in another dtype."""
        leaves = tuple(leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) for leaf in self.leaves)
        return Call(self.function, leaves, tuple(c.to(dtype) for c in self.cotangents))


def build(of: CallClass, device: torch.device, seed: int = 0) -> Call:
    """A call of a class, on tensors of a generator of its own: torch's random state is left as it is."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(of.torch_dtype)

    if of.is_attention:
        function, leaves, outputs = _attention(of, random, device)
    elif of.operation in FAMILIES["activation"]:
        function, leaves, outputs = _activation(of, random)
    else:
        function, leaves, outputs = _norm(of, random)
    leaves = tuple(leaf.requires_grad_(of.needs_grad) for leaf in leaves)
    cotangents = tuple(random(*size) for size in outputs) if of.needs_grad else ()
    return Call(function, leaves, cotangents)


_Made = tuple[Callable[..., Any], tuple[Tensor, ...], list[tuple[int, ...]]]


def _norm(of: CallClass, random: Callable[..., Tensor]) -> _Made:
    rms, adds, epilogue = "rms" in of.operation, "add_" in of.operation, of.operation in EPILOGUES
    size = of.shape[1:]
    function: Any = getattr(norm, ("add_" if adds else "") + ("rms_norm" if rms else "layer_norm"))
    leaves = [random(*of.shape) for _ in range(1 + adds)]
    leaves += [1 + 0.2 * random(*size)] + ([] if rms else [random(*size)]) + ([random(*size)] if epilogue else [])
    n = 1 + adds

    def call(*given: Tensor) -> Any:
        parameters = given[n : len(given) - epilogue]
        if epilogue:
            return function(*given[:n], size, *parameters, 1e-5, x_bias=given[-1], dropout_p=P, seed=1)
        return function(*given[:n], size, *parameters, 1e-5)

    return call, tuple(leaves), [of.shape] * n


def _activation(of: CallClass, random: Callable[..., Tensor]) -> _Made:
    name, p = ACTIVATION_NAMES.get(of.operation, "gelu"), P if of.draws_mask else 0.0
    seed = 1 if p else None

    def call(x: Tensor, bias: Tensor) -> Tensor:
        return activation.bias_act_dropout(x, bias, name, p, seed=seed)

    return call, (random(*of.shape), random(*of.shape[1:])), [of.shape]


def _attention(of: CallClass, random: Callable[..., Tensor], device: torch.device) -> _Made:
    batch, heads, queries, keys, head_dim = of.shape
    mask = attention_mask(of, device)
    causal = of.operation == "attention_causal"

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)

    sizes = (batch, heads, queries, head_dim), (batch, heads, keys, head_dim), (batch, heads, keys, head_dim)
    return call, tuple(random(*size) for size in sizes), [sizes[0]]


def attention_mask(of: CallClass, device: torch.device) -> Tensor | None:
    """Of "attention_masked": the last quarter of the keys is hidden."""
    if of.operation != "attention_masked":
        return None
    batch, _, queries, keys, _ = of.shape
    seen = torch.arange(keys, device=device) < max(keys - keys // 4, 1)
    return seen.expand(batch, 1, queries, keys).contiguous()


# --- what a run measures ---

_TINY = (4, 64)
_QUICK = (_TINY, (1, 4096), (64, 1024), (256, 768), (1024, 1024), (65536, 64), (4, 262144))
_QUICK_ACTIVATIONS = (_TINY, (64, 1024), (64, 4096), (1024, 3072))
_WIDTHS = (16, 64, 256, 1024, 4096, 16384)
_ATTENTION = ((1, 4, 16, 16, 16), (2, 8, 64, 64, 64), (2, 8, 512, 512, 64))
_WIDE = ((2, 8, 1, 512, 64), (2, 8, 128, 128, 64), (2, 4, 512, 512, 128), (1, 4, 1024, 1024, 64))


def grid(device_type: str, level: str, families: Iterable[str]) -> list[CallClass]:
    """The classes that a run measures, the most important first.

    Args:
        device_type: "cpu" or "cuda".
        level: "quick" or "default".
        families: out of `FAMILIES`.
    """
    scale = 16 if device_type == "cuda" else 1  # a GPU's crossovers are at larger shapes
    quick = level == "quick"
    rows = (1, 4, 16, 64, 256, 1024, 4096)
    wide = tuple((r, w) for w in _WIDTHS for r in rows if r * w <= 1 << 22)
    shapes = {
        "norms": _QUICK if quick else dict.fromkeys((*_QUICK, *wide)),
        "activation": _QUICK_ACTIVATIONS if quick else dict.fromkeys((*_QUICK_ACTIVATIONS, *wide)),
        "attention": _ATTENTION if quick else (*_ATTENTION, *_WIDE),
    }
    found = []
    for family in families:
        for operation in FAMILIES[family]:
            for shape in shapes[family]:
                first = shape[0] * scale if shape[0] >= 64 or len(shape) > 2 else shape[0]
                for dtype in ("float32", "bfloat16"):
                    found += [CallClass(operation, dtype, grad, (first, *shape[1:])) for grad in (False, True)]
    return found
