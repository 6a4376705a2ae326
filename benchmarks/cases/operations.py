"""What is measured: operations with their inputs, byte and FLOP models, and the sweeps over shapes.

A family of operations is a subclass of `Operation` with entries in `OPS`. A `Case` is one operation at one shape, dtype
and direction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import fusednorm
from benchmarks.cases.activation import Activation
from benchmarks.cases.adaptive import AdaptiveNorm
from benchmarks.cases.attention import Attention
from benchmarks.cases.base import Call, Operation
from benchmarks.cases.layers import Layer
from benchmarks.cases.norm import DROPOUT_P, Norm
from fusednorm import dispatch
from fusednorm._activations import ACTIVATIONS

DIRECTIONS = ("forward", "backward", "both")
DIRECTION_TITLES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
TINY = (4, 64)  # too small for any device: what is measured is the time of the host
TINY_ATTENTION = (1, 4, 16, 16)
TINY_LAYER = (2, 8, 64)
TINY_ADAPTIVE = (2, 4, 64)


# measured for the table of automatic choice alone
_GRID_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name != "relu")
OPS: dict[str, Operation] = {
    op.name: op
    for op in (
        Norm("layer_norm"),
        Norm("rms_norm", rms=True),
        Norm("add_layer_norm", add=True),
        Norm("add_rms_norm", rms=True, add=True),
        Norm("bias_dropout_add_layer_norm", add=True, epilogue=True),
        Norm("bias_dropout_add_rms_norm", rms=True, add=True, epilogue=True),
        AdaptiveNorm("adaptive_layer_norm", add=False),
        AdaptiveNorm("add_adaptive_layer_norm"),
        AdaptiveNorm("add_adaptive_rms_norm", rms=True),
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
        return math.prod(self.shape)

    @property
    def input_bytes(self) -> int:
        return self.elements * self.torch_dtype.itemsize

    @property
    def bytes_moved(self) -> int:
        return self.operation.bytes_moved(self.shape, self.torch_dtype.itemsize, self.direction)

    @property
    def flops(self) -> int:
        return self.operation.flops(self.shape, self.direction)

    def record(self) -> dict[str, Any]:
        """What a result says of the case itself."""
        models = {"bytes": self.bytes_moved, "flops": self.flops, "input_bytes": self.input_bytes}
        return {"name": self.name, "size": self.size, **asdict(self), **models}

    @property
    def memory_needed(self) -> int:
        return self.operation.memory_needed(self.shape, self.torch_dtype.itemsize)


@dataclass(frozen=True)
class Sweep:
    shapes: tuple[tuple[int, int], ...]  # of the norms
    dtypes: tuple[str, ...]
    directions: tuple[str, ...] = ("forward", "both")
    limits: Mapping[str, int] = field(default_factory=dict)  # op -> most elements
    more_dtypes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # op -> dtypes beside those of the sweep
    ffn_shapes: tuple[tuple[int, int], ...] = (TINY,)  # of the operations inside a feed-forward block
    attention_shapes: tuple[tuple[int, int, int, int], ...] = ()  # batch, heads, length, head dim
    layer_shapes: tuple[tuple[int, int, int], ...] = ()  # batch, length, width
    layer_dtypes: tuple[str, ...] = ("float32",)
    adaptive_shapes: tuple[tuple[int, int, int], ...] = ()  # samples, tokens, width
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
        return (families | {"layer": self.layer_shapes, "adaptive": self.adaptive_shapes})[op.family]

    def _every(self) -> list[Case]:
        every = dict.fromkeys(shape for op in self.operations().values() for shape in self.shapes_of(op))
        return [
            Case(name, shape, dtype, direction)
            for shape in every
            for name, op in self.operations().items()
            if shape in self.shapes_of(op)
            for dtype in (self.layer_dtypes if op.family == "layer" else self.dtypes) + self.more_dtypes.get(name, ())
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
_ADAPTIVE = (TINY_ADAPTIVE, (2, 4096, 3072), (8, 1024, 1536), (32, 256, 1152))  # of Flux, SD3 and DiT
_LAYERS = (TINY_LAYER, (4, 2048, 1024), (32, 256, 512))
SWEEPS = {
    ("cpu", "quick"): Sweep(
        (TINY, (64, 1024), (1024, 1024)),
        ("float32", "bfloat16"),
        limits=_CPU_LIMITS,
        ffn_shapes=(TINY, (64, 4096)),
        attention_shapes=(TINY_ATTENTION,),
        layer_shapes=(TINY_LAYER,),
        adaptive_shapes=(TINY_ADAPTIVE,),
    ),
    ("cpu", "default"): Sweep(
        (TINY, (1, 4096), (256, 768), (1024, 1024), (65536, 64), (4, 262144), (2048, 4096)),
        ("float32", "bfloat16"),
        limits=_CPU_LIMITS,
        more_dtypes={"layer_norm": ("float16",), "add_layer_norm": ("float16",)},
        ffn_shapes=(TINY, (64, 4096), (1024, 3072)),
        attention_shapes=(TINY_ATTENTION, (2, 8, 512, 64)),
        layer_shapes=(TINY_LAYER, (8, 256, 512)),
        adaptive_shapes=(TINY_ADAPTIVE, (2, 256, 1152), (8, 256, 1152)),
    ),
    ("cpu", "full"): Sweep(
        (TINY, *(s for s in FULL if s[0] * s[1] <= 1 << 26)),
        ("float32", "bfloat16", "float16"),
        DIRECTIONS,
        ffn_shapes=(TINY, (1, 4096), (64, 4096), (1024, 3072), (4096, 4096)),
        attention_shapes=(TINY_ATTENTION, (2, 8, 512, 64), (2, 8, 512, 128), (2, 4, 512, 256), (1, 8, 2048, 64)),
        layer_shapes=(TINY_LAYER, (4, 64, 256), (8, 256, 512)),
        layer_dtypes=("float32", "bfloat16"),
        adaptive_shapes=(TINY_ADAPTIVE, (1, 256, 1152), (2, 256, 1152), (8, 256, 1152), (2, 1024, 1536)),
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
        adaptive_shapes=_ADAPTIVE[:2],
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
        adaptive_shapes=_ADAPTIVE,
    ),
    ("cuda", "full"): Sweep(
        (TINY, *(s for s in FULL if s[0] * s[1] <= 1 << 30)),
        ("bfloat16", "float16", "float32"),
        DIRECTIONS,
        ffn_shapes=_FFN,
        attention_shapes=(*_ATTENTION, (8, 16, 1024, 40), (2, 16, 1024, 256), (1, 8, 16384, 128)),
        layer_shapes=(*_LAYERS, (1, 8192, 1024), (8, 512, 4096)),
        layer_dtypes=("bfloat16", "float16", "float32"),
        adaptive_shapes=_ADAPTIVE,
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
