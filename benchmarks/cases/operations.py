"""What is measured: operations with their inputs, byte and FLOP models, and the sweeps over shapes.

An operation is an object with the methods of `Norm`; another family (`Activation`, `Attention`, `Layer`) is another
class with the same methods and an entry in `OPS`. A `Case` is one operation at one shape, dtype and direction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusednorm
from benchmarks.cases.activation import Activation
from benchmarks.cases.attention import Attention
from benchmarks.cases.layers import Layer
from fusednorm import dispatch
from fusednorm._activations import ACTIVATIONS

Call = Callable[[], tuple[Tensor, ...]]
Leaves = Mapping[str, Tensor]

DROPOUT_P = 0.1
EPS = 1e-5
DIRECTIONS = ("forward", "backward", "both")
DIRECTION_TITLES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
TINY = (4, 64)  # too small for any device: what is measured is the time of the host
TINY_ATTENTION = (1, 4, 16, 16)
TINY_LAYER = (2, 8, 64)


@dataclass(frozen=True)
class Norm:
    """One of the four norms, plain or after the residual add, or after the whole epilogue.

    The epilogue is `residual + dropout(x + x_bias)`; results are (normed,) or (normed, the residual stream).
    """

    name: str
    rms: bool = False
    add: bool = False
    epilogue: bool = False
    family = "norm"  # which of a sweep's shapes it is measured at

    @property
    def draws_mask(self) -> bool:
        return self.epilogue

    def inputs(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that receives a gradient."""
        sizes = {"x": shape}
        if self.add:
            sizes["residual"] = shape
        sizes["weight"] = shape[-1:]
        if not self.rms:
            sizes["bias"] = shape[-1:]
        if self.epilogue:
            sizes["x_bias"] = shape[-1:]
        return sizes

    def values(self, name: str, normal: Tensor) -> Tensor:
        """A leaf from normal numbers: weights around 1."""
        return 1 + 0.2 * normal if name == "weight" else 1.5 * normal + 0.25

    def outputs(self) -> tuple[str, ...]:
        return ("normed", "residual_out") if self.add else ("normed",)

    def mask_of(self, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor | None:
        """The elements that `fused` keeps with this seed; None without dropout."""
        return fusednorm.dropout_mask(shape, DROPOUT_P, seed, device) if self.epilogue else None

    def _norm(self) -> Callable[..., Tensor]:
        return F.rms_norm if self.rms else F.layer_norm

    def _settings(self, t: Leaves) -> tuple[Any, ...]:
        """What follows the tensors in a call. Every variant is called with it, so that none pays more for its form."""
        shape, weight = tuple(t["weight"].shape), t["weight"]
        return (shape, weight, EPS) if self.rms else (shape, weight, t["bias"], EPS)

    def twin(self, t: Leaves, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Eager arithmetic in the dtype of `t`, float64 included, with a given dropout mask."""
        z, norm, settings = t["x"], self._norm(), self._settings(t)
        if self.epilogue:
            z = torch.where(mask, (z + t["x_bias"]) * (1.0 / (1.0 - DROPOUT_P)), 0.0)
        if self.add:
            z = t["residual"] + z
        normed = norm(z, *settings)
        return (normed, z) if self.add else (normed,)

    def eager(self, t: Leaves, dropout_p: float = DROPOUT_P) -> Call:
        """What a user of plain torch writes."""
        x, residual, x_bias = t["x"], t.get("residual"), t.get("x_bias")
        norm, settings = self._norm(), self._settings(t)

        def epilogue() -> tuple[Tensor, ...]:
            z = residual + F.dropout(x + x_bias, dropout_p)
            return norm(z, *settings), z

        def add() -> tuple[Tensor, ...]:
            z = residual + x
            return norm(z, *settings), z

        def plain() -> tuple[Tensor, ...]:
            return (norm(x, *settings),)

        return epilogue if self.epilogue else add if self.add else plain

    def fused(self, t: Leaves, seed: int | None = None) -> Call:
        """The package's function. Without `seed` it draws one each call, as a user's call does."""
        function = getattr(fusednorm, ("add_" if self.add else "") + ("rms_norm" if self.rms else "layer_norm"))
        x, residual, x_bias, settings = t["x"], t.get("residual"), t.get("x_bias"), self._settings(t)
        if self.epilogue:
            return lambda: function(x, residual, *settings, x_bias=x_bias, dropout_p=DROPOUT_P, seed=seed)
        if self.add:
            return lambda: function(x, residual, *settings)
        return lambda: (function(x, *settings),)

    def bytes_moved(self, shape: tuple[int, ...], itemsize: int, direction: str) -> int:
        """The least traffic: each input read once, each result written once, statistics in float32.

        Forward without gradients stores no statistics; with them (backward, both) it does. The backward reads the
        cotangents and the kept stream. The gradient of a bare add is one tensor for both operands. No mask is stored.
        """
        rows, width = _rows(shape), shape[-1]
        tensor, parameter = rows * width * itemsize, width * itemsize
        n_parameters = 1 if self.rms else 2
        statistics = rows * 4 * (1 if self.rms else 2)
        forward = (4 if self.add else 2) * tensor + (n_parameters + self.epilogue) * parameter
        read = (3 if self.add else 2) * tensor + statistics + parameter
        written = (2 if self.epilogue else 1) * tensor + (n_parameters + self.epilogue) * parameter
        if direction == "forward":
            return forward
        return read + written if direction == "backward" else forward + statistics + read + written

    def flops(self, shape: tuple[int, ...], direction: str) -> int:
        """Float additions and multiplications, per element (what is done once a row, and integer work, is left out).

        Forward LayerNorm 7: mean 1, centre 1, square and sum 2, scale 1, weight 1, bias 1; RMSNorm 4. Backward
        LayerNorm 13: x̂ 2, g = w dy 1, the two row sums 3, dz 4, dweight 2, dbias 1; RMSNorm 9. A residual adds 1 each
        way; bias and dropout's scale 2 each way.
        """
        extra = self.add + 2 * self.epilogue
        forward, backward = (4 if self.rms else 7) + extra, (9 if self.rms else 13) + extra
        each = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
        return each * _rows(shape) * shape[-1]

    def flop_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype whose matmul rate bounds the arithmetic: norms compute in float32 whatever they read."""
        return torch.float32

    def memory_needed(self, shape: tuple[int, ...], itemsize: int) -> int:
        """An upper estimate of what checking and measuring take: float64 twins, and int64 words under a mask."""
        return _rows(shape) * shape[-1] * (12 * itemsize + 14 * 8 + (160 if self.epilogue else 0))


def _rows(shape: tuple[int, ...]) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


# measured for the table of automatic choice alone
_GRID_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "relu")
Operation = Norm | Activation | Attention | Layer
OPS: dict[str, Operation] = {
    op.name: op
    for op in (
        Norm("layer_norm"),
        Norm("rms_norm", rms=True),
        Norm("add_layer_norm", add=True),
        Norm("add_rms_norm", rms=True, add=True),
        Norm("bias_dropout_add_layer_norm", add=True, epilogue=True),
        Norm("bias_dropout_add_rms_norm", rms=True, add=True, epilogue=True),
        Activation("bias_relu", "relu"),
        *(Activation(f"bias_{name}", name) for name in _GRID_ACTIVATIONS),
        Activation("bias_gelu_dropout", "gelu", DROPOUT_P),
        Attention("attention"),
        Attention("attention_causal", causal=True),
        Attention("attention_grouped", causal=True, group=4),
        Attention("attention_padded", padded=True),
        Attention("attention_window", causal=True, window=128),
        Attention("attention_dropout", causal=True, dropout_p=DROPOUT_P),
        Layer("encoder_layer", dropout_p=DROPOUT_P),
        Layer("encoder_layer_pre_norm", norm_first=True, activation="gelu", dropout_p=DROPOUT_P),
        Layer("decoder_layer", decoder=True, dropout_p=DROPOUT_P),
    )
}


@dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    dtype: str
    direction: str

    @property
    def operation(self) -> Operation:
        return OPS[self.op]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        return f"{self.op}/{self.direction}/{self.dtype}/{self.size}"

    @property
    def elements(self) -> int:
        return _rows(self.shape) * self.shape[-1]

    @property
    def input_bytes(self) -> int:
        return self.elements * self.torch_dtype.itemsize

    @property
    def bytes_moved(self) -> int:
        return self.operation.bytes_moved(self.shape, self.torch_dtype.itemsize, self.direction)

    @property
    def flops(self) -> int:
        return self.operation.flops(self.shape, self.direction)

    @property
    def memory_needed(self) -> int:
        return self.operation.memory_needed(self.shape, self.torch_dtype.itemsize)


@dataclass(frozen=True)
class Sweep:
    shapes: tuple[tuple[int, int], ...]  # of the norms
    dtypes: tuple[str, ...]
    directions: tuple[str, ...] = ("forward", "both")
    limits: Mapping[str, int] = field(default_factory=dict)  # op -> most elements
    ffn_shapes: tuple[tuple[int, int], ...] = (TINY,)  # of the operations inside a feed-forward block
    attention_shapes: tuple[tuple[int, int, int, int], ...] = ()  # batch, heads, length, head dim
    layer_shapes: tuple[tuple[int, int, int], ...] = ()  # batch, length, width
    layer_dtypes: tuple[str, ...] = ("float32",)
    every_activation: bool = False

    def operations(self) -> dict[str, Operation]:
        left_out = () if self.every_activation else [f"bias_{name}" for name in _GRID_ACTIVATIONS]
        return {name: op for name, op in OPS.items() if name not in left_out}

    def cases(self) -> list[Case]:
        excluded = self.left_out()
        return [case for case in self._every() if case.name not in excluded]

    def left_out(self) -> dict[str, str]:
        """Why each case that the limits exclude is not measured."""
        reasons = {op: f"over {most:,} elements, where {_SLOW_MASK}" for op, most in self.limits.items()}
        return {c.name: reasons[c.op] for c in self._every() if c.elements > self.limits.get(c.op, c.elements)}

    def shapes_of(self, op: Operation) -> tuple[tuple[int, ...], ...]:
        families = {"norm": self.shapes, "feed_forward": self.ffn_shapes, "attention": self.attention_shapes}
        return (families | {"layer": self.layer_shapes})[op.family]

    def _every(self) -> list[Case]:
        every = dict.fromkeys(shape for op in self.operations().values() for shape in self.shapes_of(op))
        return [
            Case(name, shape, dtype, direction)
            for shape in every
            for name, op in self.operations().items()
            if shape in self.shapes_of(op)
            for dtype in (self.layer_dtypes if op.family == "layer" else self.dtypes)
            for direction in (
                ("both",) if op.family == "layer" else self.directions
            )  # innermost: they share float64 results
        ]


_WIDTHS = (64, 256, 1024, 4096, 8192, 16384, 32768, 65536, 262144)
_GRID_WIDTHS = (16, 64, 256, 1024, 4096, 16384)
_SLOW_MASK = "torch's integer operators make a dropout mask too slowly on a CPU"  # a second for 4 million elements
_NATIVE = dispatch.unavailable_reason("cpu") is None
# an operation's limit is of its input, beside which attention's mask is as many times larger as sequences are longer
_CPU_LIMITS = {
    op.name: 1 << (14 if op.family == "attention" else 18) for op in OPS.values() if op.draws_mask and not _NATIVE
}
FULL = tuple((rows, width) for rows in (1, 64, 1024, 4096, 65536) for width in _WIDTHS)
_FFN = (TINY, (64, 4096), (4096, 3072), (8192, 4096), (8192, 14336), (65536, 4096))
_ATTENTION = (TINY_ATTENTION, (8, 16, 512, 64), (4, 16, 2048, 64), (4, 16, 2048, 128), (1, 16, 8192, 128))
_ATTENTION += ((1, 32, 2048, 128), (4, 16, 4096, 128), (1, 16, 8192, 64))  # batches lie 2**23 elements apart
_LAYERS = (TINY_LAYER, (4, 2048, 1024), (32, 256, 512))
SWEEPS = {
    ("cpu", "quick"): Sweep(
        (TINY, (64, 1024), (1024, 1024)),
        ("float32", "bfloat16"),
        limits=_CPU_LIMITS,
        ffn_shapes=(TINY, (64, 4096)),
        attention_shapes=(TINY_ATTENTION,),
        layer_shapes=(TINY_LAYER,),
    ),
    ("cpu", "default"): Sweep(
        (TINY, (1, 4096), (256, 768), (1024, 1024), (65536, 64), (4, 262144)),
        ("float32", "bfloat16"),
        limits=_CPU_LIMITS,
        ffn_shapes=(TINY, (64, 4096), (1024, 3072)),
        attention_shapes=(TINY_ATTENTION, (2, 8, 512, 64)),
        layer_shapes=(TINY_LAYER, (8, 256, 512)),
    ),
    ("cpu", "full"): Sweep(
        (TINY, *(s for s in FULL if s[0] * s[1] <= 1 << 26)),
        ("float32", "bfloat16", "float16"),
        DIRECTIONS,
        ffn_shapes=(TINY, (1, 4096), (64, 4096), (1024, 3072), (4096, 4096)),
        attention_shapes=(TINY_ATTENTION, (2, 8, 512, 64), (2, 8, 512, 128), (2, 4, 512, 256), (1, 8, 2048, 64)),
        layer_shapes=(TINY_LAYER, (4, 64, 256), (8, 256, 512)),
        layer_dtypes=("float32", "bfloat16"),
    ),
    # what the table of automatic choice is made from
    ("cpu", "grid"): Sweep(
        tuple((r, w) for r in (1, 4, 16, 64, 256, 1024, 4096, 16384) for w in _GRID_WIDTHS if r * w <= 1 << 25),
        ("float32", "bfloat16"),
        limits=_CPU_LIMITS,
        ffn_shapes=tuple((r, w) for r in (1, 4, 16, 64, 256, 1024, 4096) for w in _GRID_WIDTHS if r * w <= 1 << 24),
        every_activation=True,
    ),
    ("cuda", "grid"): Sweep(
        (TINY, *(s for s in FULL if s[0] * s[1] <= 1 << 30)),
        ("bfloat16", "float32"),
        ffn_shapes=_FFN,
        every_activation=True,
    ),
    ("cuda", "quick"): Sweep(
        (TINY, (64, 4096), (4096, 1024), (4096, 8192), (4096, 32768)),
        ("bfloat16",),
        ffn_shapes=(TINY, (8192, 4096)),
        attention_shapes=(TINY_ATTENTION, (4, 16, 2048, 64), (4, 16, 2048, 128)),
        layer_shapes=(TINY_LAYER, (4, 2048, 1024)),
        layer_dtypes=("bfloat16",),
    ),
    ("cuda", "default"): Sweep(
        (
            *(TINY, (1, 4096), (1, 262144), (64, 4096), (65536, 64), (65536, 1024)),
            *((4096, width) for width in (256, 1024, 4096, 8192, 16384, 32768, 65536)),
            (1024, 262144),
        ),
        ("bfloat16", "float16", "float32"),
        ffn_shapes=_FFN,
        attention_shapes=_ATTENTION,
        layer_shapes=_LAYERS,
        layer_dtypes=("bfloat16",),
    ),
    ("cuda", "full"): Sweep(
        (TINY, *(s for s in FULL if s[0] * s[1] <= 1 << 30)),
        ("bfloat16", "float16", "float32"),
        DIRECTIONS,
        ffn_shapes=_FFN,
        attention_shapes=(*_ATTENTION, (8, 16, 1024, 40), (2, 16, 1024, 256), (1, 8, 16384, 128)),
        layer_shapes=(*_LAYERS, (1, 8192, 1024), (8, 512, 4096)),
        layer_dtypes=("bfloat16", "float16", "float32"),
    ),
}


def sweep(device_type: str, level: str) -> list[Case]:
    return sweep_of(device_type, level).cases()


def sweep_of(device_type: str, level: str) -> Sweep:
    return SWEEPS["cuda" if device_type == "cuda" else "cpu", level]


def runner(call: Call, leaves: Iterable[Tensor], cotangents: tuple[Tensor, ...], direction: str) -> Callable[[], Any]:
    """The measured callable: the forward, the backward of a kept graph, or both."""
    if direction == "forward":
        return call
    inputs = list(leaves)
    if direction == "both":
        return lambda: torch.autograd.grad(call(), inputs, cotangents)
    outputs = call()
    return lambda: torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True)


# --- who serves a call ---


def served_by(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str, str]:
    """The provider that serves the (first) call, how, and the whole of what `fusednorm.explain` says."""
    text = fusednorm.explain(function, *args, **kwargs)
    first = re.match(r"\w+: (\w+), (.*)", text)
    return (first[1], first[2], text) if first else ("none", text.splitlines()[0], text)


def require_provider(name: str | None) -> None:
    if name is not None and name not in fusednorm.available_providers():
        raise ValueError(f"--provider {name}: usable here are {', '.join(fusednorm.available_providers())}")
