"""Calls that the C++ fast path takes, of every operator, and what holds them to the Python path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from backends import EMULATED
from oracle import MODULATION
from oracle_activation import ACTIVATIONS
from torch import Tensor

import fusednorm
from fusednorm import dispatch
from fusednorm.dispatch import fastpath

_missing = fastpath.load()[1]
# without a C++ compiler, or for another torch, the module is not there: nothing of these tests applies
NEEDS_FASTPATH = pytest.mark.skipif(bool(_missing), reason=f"no fast path: {_missing}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NODES = {"bias_act_dropout": "FusedBiasActBackward", "scaled_dot_product_attention": "FusedAttentionBackward"}
ROWS = ("x", "residual")
KEY_MASK = torch.tensor([[True] * 7, [True, False, True, True, False, False, True]])


@dataclass(frozen=True)
class Form:
    """A public function, the tensors that it is given, and its options."""

    function: str
    names: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    provider: str = "cpu"  # or "cuda": the one whose kernels the fast path calls

    @property
    def device(self) -> str:
        return "cuda" if self.provider == "cuda" and not EMULATED else "cpu"

    @property
    def node(self) -> str:
        return NODES.get(self.function, "FusedNormBackward")

    def leaves(
        self,
        shape: Sequence[int] = (6, 33),
        dtype: torch.dtype = torch.float32,
        ndim: int = 1,
        **dtypes: torch.dtype,
    ) -> dict[str, Tensor]:
        """Of these dtypes by name. The shape is that of the rows; attention has its own."""
        if self.function == "scaled_dot_product_attention":
            return heads(dtype, device=self.device)
        leaves = {}
        for name in self.names:
            columns = tuple(shape[-ndim:])
            size = tuple(shape) if name in ROWS else (shape[0], *columns) if name in MODULATION else columns
            values = torch.randn(size)
            leaves[name] = values.to(self.device, dtypes.get(name, dtype)).requires_grad_()
        return leaves

    def call(self, leaves: Mapping[str, Tensor], ndim: int = 1, **more: Any) -> tuple[Tensor, ...]:
        function, given = getattr(fusednorm, self.function), dict(leaves)
        options = {**self.options, **more}
        if self.function == "bias_act_dropout":
            return (function(given["x"], given.get("bias"), **options),)
        if self.function == "scaled_dot_product_attention":
            return (function(*given.values(), **options),)
        x = given.pop("x")
        shape = x.shape[x.ndim - ndim :]
        if self.function.startswith("add_"):
            return function(x, given.pop("residual", None), shape, **given, **options)
        return (function(x, shape, **given, **options),)


def heads(
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, int] = (5, 7),
    counts: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (8, 8),
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Query, key and value; lengths and counts are of queries and of keys, dims of keys and of values."""
    (n_queries, n_keys), (dim, dim_v) = lengths, dims
    shapes = {
        "query": (2, counts[0], n_queries, dim),
        "key": (2, counts[1], n_keys, dim),
        "value": (2, counts[1], n_keys, dim_v),
    }
    return {name: torch.randn(shape).to(device, dtype).requires_grad_() for name, shape in shapes.items()}


LAYER, RMS = ("x", "residual", "weight", "bias"), ("x", "residual", "weight")
NORMS = {
    "rms_norm": Form("rms_norm", ("x", "weight")),
    "add_rms_norm": Form("add_rms_norm", RMS),
    "add_layer_norm": Form("add_layer_norm", LAYER),
    "add_layer_norm without residual": Form("add_layer_norm", ("x", "weight", "bias")),
}
EPILOGUES = {
    "bias": Form("add_layer_norm", (*LAYER, "x_bias")),
    "dropout": Form("add_layer_norm", LAYER, {"dropout_p": 0.3, "seed": 7}),
    "dropout by a negative seed": Form("add_layer_norm", LAYER, {"dropout_p": 0.3, "seed": -7}),
    "dropout by a seed past 64 bits": Form("add_layer_norm", LAYER, {"dropout_p": 0.3, "seed": 2**64 + 7}),
    "both": Form("add_layer_norm", (*LAYER, "x_bias"), {"dropout_p": 0.5, "seed": 2**63 + 5}),
    "both without residual": Form("add_layer_norm", ("x", "weight", "bias", "x_bias"), {"dropout_p": 0.5, "seed": 1}),
    "both of an RMSNorm": Form("add_rms_norm", (*RMS, "x_bias"), {"dropout_p": 0.1, "seed": 1}),
    "layer scale": Form("add_layer_norm", (*LAYER, "layer_scale")),
    "layer scale and both": Form("add_rms_norm", (*RMS, "x_bias", "layer_scale"), {"dropout_p": 0.3, "seed": 7}),
    "gate": Form("add_layer_norm", (*LAYER, "gate")),
    "scale and shift": Form("add_layer_norm", ("x", *MODULATION[1:])),
    "gate, scale and shift": Form("add_layer_norm", (*ROWS, *MODULATION)),
    "gate, scale and shift of an RMSNorm": Form("add_rms_norm", (*ROWS, *MODULATION), {"dropout_p": 0.3, "seed": 7}),
    "nothing": Form("add_layer_norm", LAYER, {"dropout_p": 0.0, "seed": 3}),
}
DROPPED = {
    "": {},
    ", dropout": {"dropout_p": 0.3, "seed": -7},
    ", half dropped": {"dropout_p": 0.5, "seed": 2**64 + 3},
}
ACTIVATED = {
    f"{name}{how}": Form("bias_act_dropout", ("x", "bias"), {"activation": name, **options})
    for name in ACTIVATIONS
    for how, options in DROPPED.items()
}
ATTENTION = {
    name: Form("scaled_dot_product_attention", ("query", "key", "value"), options)
    for name, options in {
        "plain": {},
        "causal": {"is_causal": True},
        "scaled": {"scale": -0.3},
        "padded": {"key_mask": KEY_MASK},
        "window": {"window": (2, 1)},
        "half a window": {"window": (None, 2), "is_causal": True},
        "all": {"key_mask": KEY_MASK, "window": (3, 0), "is_causal": True, "scale": 0.5},
    }.items()
}
EVERY = {**NORMS, **EPILOGUES, **ACTIVATED, **ATTENTION}


def on_cuda(form: Form) -> Form:
    """The same for the CUDA library: on a GPU, or without one on the emulation."""
    form = replace(form, provider="cuda")
    options = {name: o.to(form.device) if isinstance(o, Tensor) else o for name, o in form.options.items()}
    return replace(form, options=options)


def cuda_forms(*names: str) -> list[Any]:
    """For `chosen`: these forms by the CUDA library."""
    marks = [] if EMULATED else [pytest.mark.gpu]
    return [pytest.param(("cuda", name), id=f"{name} by cuda", marks=marks) for name in names]


def chosen(*names: Any) -> Any:
    """Of the fixture `form`."""
    return pytest.mark.parametrize("form", names, indirect=True)


def same(found: Iterable[Tensor | None], expected: Iterable[Tensor | None], what: Any = "") -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None), what
        if a is not None and b is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, what
            assert torch.equal(a, b), what


def cotangents_of(outputs: Iterable[Tensor]) -> list[Tensor]:
    return [torch.randn(o.shape).to(o) for o in outputs]


def gradients(
    outputs: Sequence[Tensor],
    leaves: Mapping[str, Tensor],
    cotangents: Sequence[Tensor],
    used: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """Of the leaves that want one, by the outputs `used`, or by all."""
    by = [i for i, o in enumerate(outputs) if o.requires_grad and (used is None or i in used)]
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    return torch.autograd.grad(
        [outputs[i] for i in by], wanted, [cotangents[i] for i in by], allow_unused=True, **options
    )


def both_ways(run: Callable[[], tuple[Tensor, ...]], node: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What `run` gives by the fast path, and by the Python path, from one state of the generator."""
    state = torch.get_rng_state()
    found, drawn = run(), torch.get_rng_state()
    torch.set_rng_state(state)
    with dispatch.settings.without_fastpath():
        expected = run()
    assert torch.equal(drawn, torch.get_rng_state())
    nodes = [{o.grad_fn.name() for o in outputs if o.grad_fn is not None} for outputs in (found, expected)]
    assert node in nodes[0] and node not in nodes[1], nodes
    return found, expected


def hold_to_python_path(
    form: Form,
    leaves: Mapping[str, Tensor],
    cotangents: Sequence[Tensor] | None = None,
    ndim: int = 1,
    what: Any = "",
    **more: Any,
) -> None:
    """Outputs and gradients, by all outputs and by each alone, to the last bit."""
    found, expected = both_ways(lambda: form.call(leaves, ndim, **more), form.node)
    same(found, expected, what)
    cotangents = cotangents or cotangents_of(found)
    alone = [(i,) for i, o in enumerate(found) if o.requires_grad] if len(found) > 1 else []
    for used in (None, *alone):
        ours, theirs = (gradients(o, leaves, cotangents, used, retain_graph=True) for o in (found, expected))
        same(ours, theirs, (what, used))
