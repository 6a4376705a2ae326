"""What automatic choice prefers for norms and activations: measured crossovers first, then estimates.

On a GPU where nothing was measured these hold:

- A small norm goes by the fast path to the CUDA library, if there is one.
- Other small norms and activations wait for the host. Python's way to a Triton kernel takes 21.8 us forward and 119 us
  with the backward, eager's 3.1 and 52.6 (benchmarks/NOTES.md). Torch's operators serve these calls.
- Larger ones go to the first provider of the table.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from .._activations import ACTIVATIONS
from .._options import (
    ActivationInputs,
    ActivationOptions,
    AttentionInputs,
    AttentionOptions,
    Inputs,
    NormInputs,
    NormOptions,
    Options,
)
from .._transforms import wants_gradients
from ..providers.cpu import library as cpu
from ..providers.samples import has_samples
from . import crossovers, fastpath, registry, settings, tuned
from .crossovers import Preference

OPERATIONS = {name: f"bias_{name}" for name in ACTIVATIONS}
SMALL = 8 << 20  # bytes of x: at 3 TB/s a norm takes 11 us, Python's way to its launch 13 (benchmarks/NOTES.md)
# From so many rows, features on either side, and multiplications on, oneDNN's float32 product was faster than MKL's on
# AMD's processors with AVX-512 (benchmarks/NOTES.md, "Matrix products in float32").
ONEDNN_ROWS, ONEDNN_FEATURES, ONEDNN_PRODUCTS = 8, 256, 1 << 25
ONEDNN_COPIED = 1 << 27  # multiplications from which a transposed copy of one operand is worth it
ONEDNN_TERMS = 1024  # of a sum: its error is 1.4 to 1.7 times MKL's up to here, 2.2 times at 3,072
# Where our product of few rows was faster than torch's: rows up to which, and elements of the weight from and up to.
FEW_ROWS: dict[torch.dtype, tuple[tuple[int, int, float], ...]] = {
    torch.float32: ((3, 1 << 14, math.inf), (4, 3 << 16, math.inf)),
    torch.bfloat16: ((2, 1 << 14, math.inf),),
    torch.float16: ((8, 1 << 14, 1 << 24),),
}
MOST_FEW_ROWS = max(rows for limits in FEW_ROWS.values() for rows, *_ in limits)
LEAST_OF_FEW_ROWS = min(least for limits in FEW_ROWS.values() for _, least, _ in limits)
HOST_BOUND = {False: 32 << 20, True: 64 << 20}  # bytes of x, by whether gradients are wanted


PLAIN_LAYER_NORM = "torch's own layer_norm is one pass each way already"


class Norm(NamedTuple):
    """What the preference for a norm or an activation depends on."""

    operation: str  # the benchmarks' name
    dtype: torch.dtype
    elements: int
    columns: int
    needs_grad: bool
    gpu: int | None  # its index; None: the CPU
    in_fastpath: bool
    seeded: bool  # with a seed torch's operators compute the mask in Python


def reluctance(name: str, op: str, inputs: Inputs, options: Options, measured: bool = False) -> str | None:
    """Why automatic choice passes over a provider that could take this call, or None if it does not.

    `measured`: it was measured to be the fastest.
    """
    for_tests = getattr(registry.get(name)[0], "for_tests", None)
    if for_tests is not None:
        return str(for_tests)
    if measured:
        return None
    if name != "cpu" or isinstance(options, AttentionOptions) or options.dropped:
        return None
    compiling = torch.compiler.is_compiling()
    if isinstance(inputs, NormInputs):
        assert isinstance(options, NormOptions)
        if inputs[1] is not None or options.store_residual or has_samples(inputs, options.normalized_ndim):
            return None
        if not options.rms:  # nothing to add
            return PLAIN_LAYER_NORM
        return "the compiler fuses torch's own rms_norm with what is around it" if compiling else None
    if inputs[1] is None:
        return "torch's own operators serve an activation with nothing to add"
    if compiling:
        return "torch.compile fuses an addition and an activation into what stands around them"
    return None


def operation(inputs: Inputs, options: Options) -> str:
    """The benchmark's name for what a call of a norm or an activation does."""
    if isinstance(options, ActivationOptions):  # with dropout, the cost does not depend on the activation
        return "bias_gelu_dropout" if options.dropout_p else OPERATIONS[options.activation]
    assert isinstance(inputs, NormInputs) and isinstance(options, NormOptions)
    if has_samples(inputs, options.normalized_ndim):
        return "adaptive_rms_norm" if options.rms else "adaptive_layer_norm"
    epilogue = inputs.x_bias is not None or inputs.layer_scale is not None or options.dropped
    kind = "bias_dropout_add_" if epilogue else "add_" if inputs.residual is not None else ""
    return kind + ("rms_norm" if options.rms else "layer_norm")


def preference(inputs: Inputs, options: Options) -> Preference | None:
    """What was measured, or is estimated, to be fastest for a call of a forward op; None: the order of the table."""
    call = described(inputs, options)
    return None if call is None else fastest(call)


def described(inputs: Inputs, options: Options) -> Norm | None:
    """What the preference for a call depends on; None where nothing is measured of such calls."""
    if isinstance(inputs, AttentionInputs):
        return None  # its cost is no function of rows and columns: the order of the table decides
    x, normalized_ndim = inputs.x, options.normalized_ndim if isinstance(options, NormOptions) else 1
    columns = math.prod(x.shape[x.ndim - normalized_ndim :])
    if not isinstance(x.numel(), int) or not x.numel() or not (x.is_cpu or x.is_cuda):
        return None  # empty, or symbolic while a graph is traced
    if isinstance(inputs, ActivationInputs):
        in_fastpath = False
        if inputs.bias is None or inputs.bias.dtype is not x.dtype:
            return None
    else:
        assert isinstance(options, NormOptions)
        given = x if inputs.residual is None else inputs.residual
        if not x.dtype is options.normed_dtype is options.residual_dtype is given.dtype:
            return None  # mixtures of dtypes are not measured
        adaptive = has_samples(inputs, options.normalized_ndim)
        in_fastpath = not options.drop_path_p and (adaptive or not options.zero_centered_weight)
    # who serves draws the mask: reentrant checkpointing makes a call without gradients, and again with them
    needs_grad = options.dropped or wants_gradients(inputs)
    gpu = (x.device.index or 0) if x.is_cuda else None
    shape = operation(inputs, options), x.dtype, x.numel(), columns
    return Norm(*shape, needs_grad, gpu, in_fastpath, inputs.seed is not None)


@functools.lru_cache(4096)
def fastest(norm: Norm) -> Preference | None:
    device = torch.device("cpu") if norm.gpu is None else torch.device("cuda", norm.gpu)
    rows = norm.elements // norm.columns
    own = tuned.find(device, tuned.line(norm.operation, norm.dtype.itemsize, norm.needs_grad), rows, norm.columns)
    if own is not None and not (own[0] == "torch" and norm.seeded):
        return Preference(*own, own=True)
    # in float64 the CPU library vectorises neither GELU's error function nor SiLU's derivative (benchmarks/NOTES.md)
    scalar = norm.operation == "bias_gelu" or (norm.operation == "bias_silu" and norm.needs_grad)
    if scalar and norm.gpu is None and norm.dtype is torch.float64:
        return Preference("torch", "torch's operators are faster for this activation in float64")
    found = crossovers.fastest(
        crossovers.device_key(device), norm.operation, norm.dtype.itemsize, norm.needs_grad, rows, norm.columns
    )
    if found is None and norm.gpu is None and norm.operation == "layer_norm":
        return Preference("torch", PLAIN_LAYER_NORM)
    if found is not None or norm.gpu is None:
        return found
    n_bytes = norm.elements * norm.dtype.itemsize
    if norm.in_fastpath and n_bytes <= SMALL and fastpath.load()[0] is not None:
        return Preference("cuda", "a norm of up to 8 MiB waits for the host, and the fast path leads to cuda")
    if not norm.seeded and n_bytes <= HOST_BOUND[norm.needs_grad]:
        limit = f"{HOST_BOUND[norm.needs_grad] >> 20} MiB"
        return Preference("torch", f"nothing was measured on this GPU, and a call of up to {limit} waits for the host")
    return None


def fastpath_serves(
    operation: str, dtype: torch.dtype, elements: int, columns: int, needs_grad: bool, gpu: int
) -> bool:
    """Whether automatic choice leaves a call to the fast path, which keeps the answer; `gpu` is -1 on the CPU."""
    found = None
    if elements:
        index = None if gpu < 0 else gpu
        found = fastest(Norm(operation, dtype, elements, columns, needs_grad, index, True, False))
    return (found is None or found.provider != "torch") if gpu < 0 else found is not None and found.provider == "cuda"


def onednn_is_faster(rows: int, outputs: int, inputs: int) -> bool:
    """Whether torch's oneDNN takes less time than its MKL for x W^T in float32, x (rows, inputs), on this processor."""
    return (
        rows >= ONEDNN_ROWS
        and outputs >= ONEDNN_FEATURES
        and ONEDNN_FEATURES <= inputs <= ONEDNN_TERMS
        and rows * outputs * inputs >= ONEDNN_PRODUCTS
        and _products_were_measured_faster()
    )


def few_rows_are_faster(rows: int, elements: int, dtype: torch.dtype) -> bool:
    """Whether our x W^T takes less time than torch's, for a weight of so many elements, on this processor."""
    found = any(0 < rows <= most and least <= elements < end for most, least, end in FEW_ROWS.get(dtype, ()))
    return found and _products_were_measured_faster()


@functools.cache
def _products_were_measured_faster() -> bool:
    return (
        cpu.unavailable_reason() is None
        and cpu.vendor() == "amd"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def torch_serves_layer_norm(dtype: torch.dtype, rows: int, columns: int) -> bool:
    """Whether torch serves a plain ``layer_norm`` with gradients on a CPU, of rows of this dtype."""
    current = settings.current
    if current.provider is not None or not current.by_shape:
        return current.provider in (None, "torch")
    return not fastpath_serves("layer_norm", dtype, rows * columns, columns, True, -1)


def layer_norm_is_torchs() -> bool:
    """Whether nothing that was measured leaves a plain ``layer_norm`` on a CPU to another provider."""
    if tuned.measure is not None:
        return False
    device = torch.device("cpu")
    shipped = crossovers.table(crossovers.device_key(device))
    lines = {} if shipped is None else shipped.steps
    names = {step.provider for name, line in lines.items() if name.startswith("layer_norm/") for step in line}
    return names | tuned.providers(device, "layer_norm") <= {"torch"}


def forget() -> None:
    """After a table was changed."""
    crossovers.forget()
    tuned.forget()
    choose_anew()


def keep_in_cuda(indices: list[int]) -> None:
    """Give the CUDA library the forms of these GPUs. Nothing goes by a file any more that it refuses."""
    if tuned.keep_in_cuda(indices):
        tuned.forget_planned()
        choose_anew()


def choose_anew() -> None:
    """After what this process measured was changed: by the tables and files as they were read."""
    fastest.cache_clear()
    settings.forget()
