"""Calls of every operator on a stand-in GPU (`standin.py`), and what they launched.

Four accounts of a launch: what the provider gave, the kernel's own signature, the parameters that its PTX declares, and
what the driver had.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pytest
import standin
import torch
from torch import Tensor

import fusednorm as fn
from fusednorm import dispatch

ROWS, WIDTH, EPS = 6, 64, 1e-3
BATCH, HEADS, QUERIES, KEYS, DIM = 2, 4, 48, 80, 64


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    warps: int
    shared: int
    parameters: dict[str, tuple[str, Any]]  # those that are not constants: (type, number or address)
    aligned: set[str]  # pointers that the compiler was told to be multiples of 16
    declared: list[str]  # types of all parameters in the PTX
    threads: int  # of a block in the PTX
    note: standin.Note


def proves(call: Callable[..., Any], options: dict[str, Any], provider: str, *properties: str) -> pytest.MarkDecorator:
    """The marker of what a launch of this call shows."""
    ops = {"activation": "bias_act_dropout", "attention": "scaled_dot_product_attention", "varlen": "varlen_attention"}
    ops |= {"modulated": "modulation", "strided": "add_rms_norm"}
    op = ops.get(call.__name__) or options["function"]
    return pytest.mark.certifies(*properties, op=op, provider=provider, on="stand-in")


class Known(NamedTuple):
    """A tensor that the caller sees."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


class Step(NamedTuple):
    launches: list[Launch]
    tensors: dict[str, Known]  # arguments, results and their gradients, as kernels name them
    numbers: dict[str, Any]


def leaf(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, device: int = 0, offset: int = 0) -> Tensor:
    memory = torch.randn(math.prod(shape) + offset).to(f"cuda:{device}", dtype)
    return memory[offset:].view(shape).requires_grad_()


# --- calls: arguments by name, results by name, and numbers that kernels take ---


def norm(
    function: str,
    vectors: str,
    dtype: torch.dtype = torch.bfloat16,
    width: int = WIDTH,
    device: int = 0,
    offset: int = 0,
    **options: Any,
) -> Any:
    rows = ["x", "residual"] if function.startswith("add") else ["x"]
    given = {name: leaf((ROWS, width), dtype, device, offset) for name in rows}
    given |= {name: leaf((width,), dtype, device) for name in vectors.split()}
    call = getattr(fn, function)
    results = call(*map(given.get, rows), width, **{n: given[n] for n in vectors.split()}, eps=EPS, **options)
    named = dict(zip(("normed", "residual_out"), results)) if len(rows) == 2 else {"normed": results}
    dropped = {"threshold": word(options.get("dropout_p")), "path_threshold": word(options.get("drop_path_p"))}
    return given, named, {"M": ROWS, "eps": EPS, **dropped}


def activation(vectors: str = "bias", dtype: torch.dtype = torch.bfloat16, p: float = 0.0, device: int = 0) -> Any:
    given = {"x": leaf((ROWS, WIDTH), dtype, device)}
    given |= {name: leaf((WIDTH,), dtype, device) for name in vectors.split()}
    y = fn.bias_act_dropout(given["x"], given.get("bias"), "gelu", p)
    return given, {"y": y}, {"M": ROWS, "threshold": word(p)}


def attention(
    dtype: torch.dtype = torch.bfloat16, heads: int = HEADS, mask: str = "", key_mask: bool = False, **options: Any
) -> Any:
    given = {name: leaf((BATCH, heads, KEYS, DIM), dtype) for name in "kv"}
    given["q"] = leaf((BATCH, QUERIES, HEADS, DIM), dtype).detach().transpose(1, 2).requires_grad_()
    if mask == "bool":
        given["mask"] = torch.rand(BATCH, HEADS, QUERIES, KEYS, device="cuda") > 0.5
    elif mask:
        given["mask"] = leaf((BATCH, HEADS, QUERIES, KEYS) if mask == "additive" else (1, HEADS, 1, KEYS), dtype)
    if key_mask:
        given["key_mask"] = torch.rand(BATCH, KEYS, device="cuda") > 0.5
    masks = {"attn_mask": given.get("mask"), "key_mask": given.get("key_mask")}
    results = fn.scaled_dot_product_attention(
        *map(given.get, "qkv"), **masks, enable_gqa=heads != HEADS, return_lse=True, **options
    )
    return given, dict(zip(("out", "lse"), results)), numbers(options, HEADS // heads, QUERIES, KEYS)


def varlen(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    given = {name: leaf((QUERIES, HEADS, DIM), dtype) for name in "qkv"}
    bounds = {f"cu_seqlens_{name}": torch.tensor([0, 16, QUERIES], dtype=torch.int32, device="cuda") for name in "qk"}
    results = fn.varlen_attention(*map(given.get, "qkv"), *bounds.values(), QUERIES, 40, return_lse=True, **options)
    return given | bounds, dict(zip(("out", "lse"), results)), numbers(options, 1, QUERIES, 40)


def numbers(options: dict[str, Any], group: int, queries: int, keys: int) -> dict[str, Any]:
    left, right = options.get("window", (None, 0 if options.get("is_causal") else None))
    window = {"window_left": left, "window_right": right} if "window" in options else {}
    lengths = {"group": group, "n_queries": queries, "n_keys": keys, "scale": DIM**-0.5}
    return lengths | window | {"softcap": options.get("softcap", 0.0), "threshold": word(options.get("dropout_p"))}


def word(p: float | None) -> int:
    return int((p or 0.0) * 2**32)


# --- in the process that has the GPUs ---


def step(
    call: Callable[..., Any], *args: Any, provider: str | None = "triton", watch: Any = None, **options: Any
) -> Step:
    """A call's forward, and its backward for everything that has a gradient. `watch` gives the launches."""
    asked = nullcontext() if provider is None else fn.use_provider(provider)
    with (watch or launches)() as noted, asked:
        given, results, known = call(*args, **options)
        wanted = [name for name, tensor in given.items() if tensor.requires_grad]
        cotangents = {f"d{name}": torch.ones_like(result) for name, result in results.items()}
        gradients = torch.autograd.grad(list(results.values()), [given[n] for n in wanted], list(cotangents.values()))
    tensors = given | results | cotangents | dict(zip((f"d{name}" for name in wanted), gradients))
    seen = {n: Known(t.data_ptr(), tuple(t.shape), t.stride(), t.element_size()) for n, t in tensors.items()}
    return Step(noted, seen, known)


def compiled(call: Callable[..., Any], **options: Any) -> tuple[Step, list[str]]:
    """By automatic choice, as one graph, where no GPU has been asked anything yet; with what was warned of."""
    from fusednorm.providers.triton import host

    torch._dynamo.reset()
    for known in (host._capabilities, host._devices, dispatch.registry._reasons):
        known.clear()
    names = ("scaled_dot_product_attention", "varlen_attention", "bias_act_dropout", "add_layer_norm", "rms_norm")
    graphs = {name: torch.compile(getattr(fn, name), fullgraph=True, backend="aot_eager") for name in names}
    with warnings.catch_warnings(record=True) as warned, mock.patch.multiple(fn, **graphs):
        warnings.simplefilter("always")
        found = step(call, provider=None, **options)
    return found, [str(warning.message) for warning in warned]


def asked_of_capture() -> set[int]:
    """Of which GPUs calls on cuda:1 ask whether they capture a graph."""
    asked: set[int] = set()

    def note() -> bool:
        asked.add(torch.cuda.current_device())
        return False

    dispatch.settings.current.plans.clear()
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", note):
        norm("add_rms_norm", "weight", device=1)
        norm("add_rms_norm", "weight", device=1, memory_efficient=True)
    return asked


def profiled(call: Callable[..., Any], **options: Any) -> tuple[Step, list[str]]:
    """With the names of the launches that a profiler's hooks are told of, before and after each."""
    from triton import knobs

    told: list[str] = []
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook

    def hook(metadata: Any) -> None:
        told.append(metadata.get()["name"])

    for chain in hooks:
        chain.add(hook)
    try:
        return step(call, **options), told
    finally:
        for chain in hooks:
            chain.remove(hook)


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Of every thread."""
    from fusednorm.providers.triton.launch import Variant

    standin.driver.standin_forget()
    given: list[tuple[Any, ...]] = []
    launch = Variant.launch

    def watched(*arguments: Any) -> None:
        launch(*arguments)
        if len(given) < standin.driver.standin_noted():  # not so for a call that called itself on another device
            given.append(arguments)

    noted: list[Launch] = []
    Variant.launch = watched
    try:
        yield noted
    finally:
        Variant.launch = launch
    notes = standin.notes()
    assert len(notes) == len(given), "not everything was launched by Variant.launch"
    noted.extend(_launch(*arguments, note) for arguments, note in zip(given, notes))


def _launch(variant: Any, grid: tuple[int, int], pointers: Any, values: Any, note: standin.Note) -> Launch:
    from fusednorm.providers.triton.launch import NUMBER_TYPES, POINTER_TYPES

    signature = inspect.signature(variant.function.fn).parameters.values()
    names = [parameter.name for parameter in signature if parameter.annotation is inspect.Parameter.empty]
    assert len(names) == len(pointers) + len(values)
    there = [t for t in pointers if t is not None]
    parameters = {n: (POINTER_TYPES[t.dtype], t.data_ptr()) for n, t in zip(names, pointers) if t is not None}
    for name, value in zip(names[len(pointers) :], values):
        wide = name == "eps" and any(t.dtype == torch.float64 for t in there)
        parameters[name] = ("fp64" if wide else NUMBER_TYPES.get(name, "i64"), value)
    kernel = variant._handle.kernel
    ptx, every = kernel.asm["ptx"], list(inspect.signature(variant.function.fn).parameters)
    aligned = {every[index] for (index,), said in kernel.src.attrs.items() if ["tt.divisibility", 16] in said}
    declared = re.findall(r"\.param \.(\w+)(?: \.ptr \.global \.align \d+)? \w+_param_\d+", ptx)
    threads = re.search(r"\.reqntid (\d+)", ptx)
    assert threads is not None
    name, shared = variant.function.__name__, kernel.metadata.shared
    return Launch(name, grid, variant.warps, shared, parameters, aligned, declared, int(threads[1]), note)
