"""What the two native libraries take alike."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._activations import ACTIVATIONS
from .._options import AttentionInputs, AttentionOptions, NormGradOptions, NormOptions
from .strides import rows_like

MOST_DIMENSIONS = 64  # kMaxDims of csrc/common/data.h
ACTIVATION_SHIFT = 2  # kActivationShift of csrc/common/activations.h: an activation's number stands above two switches
_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@functools.lru_cache(4096)
def packed_norm(options: NormOptions) -> int:
    """All switches of a norm's forward in one integer, as csrc/common/norm_call.h unpacks them."""
    normalized_ndim, _, _, _, dtype, residual_dtype, *switches = options
    return _packed(normalized_ndim, dtype, residual_dtype, (*switches, False))


@functools.lru_cache(4096)
def packed_norm_grad(options: NormGradOptions, output_mask: tuple[bool, ...]) -> int:
    """All switches of a norm's backward in one integer, as csrc/common/norm_call.h unpacks them."""
    normalized_ndim, _, _, dtype, residual_dtype, rms, zero_centered_weight, saved_is_normed = options
    switches = (rms, zero_centered_weight, False, saved_is_normed)
    return _packed(normalized_ndim, dtype, residual_dtype, switches, output_mask)


def _packed(
    normalized_ndim: int,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    switches: tuple[bool, ...],
    output_mask: tuple[bool, ...] = (),
) -> int:
    """`switches`: rms, zero_centered_weight, store_residual, saved_is_normed.

    `normalized_ndim` stands above the switches, so none of its values is taken for another; the library checks it.
    """
    if len(output_mask) > 6:
        raise ValueError(f"output_mask: expected at most 6 entries, one a gradient, got {len(output_mask)}")
    bits = _DTYPES[dtype] | _DTYPES[residual_dtype] << 2
    ones = (bool(switch) << 4 + i for i, switch in enumerate((*switches, *output_mask)))
    return bits | sum(ones) | normalized_ndim << 14


def too_many_dimensions(x: Tensor) -> str | None:
    """Why a native library does not take x, if it has more dimensions than fit."""
    return f"x has {x.ndim} dimensions, its kernels take {MOST_DIMENSIONS}" if x.ndim > MOST_DIMENSIONS else None


def check_not_truncated(library: Path) -> None:
    """Raise OSError for a library of which the end is missing.

    The loader maps such a file, and the process dies of a bus error where it touches what is not there. Its program
    headers say how long an ELF file is at least.
    """
    with library.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:5] != b"\x7fELF\x02":  # of 64 bits; the loader says what is wrong with others
            return
        order = ">" if head[5] == 2 else "<"
        (table,) = struct.unpack_from(f"{order}Q", head, 32)
        entry_size, count = struct.unpack_from(f"{order}HH", head, 54)
        file.seek(table)
        entries = file.read(entry_size * count)
        if entry_size < 40 or len(entries) < entry_size * count:
            raise OSError("the file is cut off")
        for start in range(0, len(entries), entry_size):
            offset, length = (struct.unpack_from(f"{order}Q", entries, start + at)[0] for at in (8, 32))
            if offset + length > library.stat().st_size:
                raise OSError("the file is cut off")


def load_failure(library: Path, fault: Exception, build: str) -> str:
    """Why a library is not usable, in the loader's words where torch only says that it failed."""
    said = fault.__cause__ or fault
    return f"{library} does not load into torch {torch.__version__}: {said}; build it anew: {build}"


def check_activations(library: Path) -> None:
    """Raise ValueError for a loaded library whose activations have other numbers than ours."""
    names = ctypes.c_char_p(ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(str(library)), "fusednorm_activations")))
    built = (names.value or b"").decode().split()
    if built != list(ACTIVATIONS):
        raise ValueError(f"it was built for the activations {', '.join(built)}, not {', '.join(ACTIVATIONS)}")


def activation_options(activation: str, output_mask: Sequence[bool] = (False, False)) -> int:
    """The options of bias_act_dropout, as csrc/common/norm_call.h unpacks them; `output_mask` is the backward's."""
    return _packed_activation(activation, tuple(output_mask))


@functools.lru_cache(256)
def _packed_activation(activation: str, output_mask: tuple[bool, ...]) -> int:
    if len(output_mask) != ACTIVATION_SHIFT:
        raise ValueError(f"output_mask: expected {ACTIVATION_SHIFT} entries, one a gradient, got {len(output_mask)}")
    bits = sum(bool(wanted) << i for i, wanted in enumerate(output_mask))
    return bits | ACTIVATIONS[activation].number << ACTIVATION_SHIFT


FORWARD_OPTIONS = {activation: activation_options(activation) for activation in ACTIVATIONS}


def attention_arguments(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Any, ...]:
    """Masks, seed, boundaries and options, in the order of both libraries' operators.

    Causality is a window that ends at the query itself.
    """
    _, _, _, *masks, cu_seqlens_q, cu_seqlens_k = inputs
    bounds = [None if bound is None else bound.contiguous() for bound in (cu_seqlens_q, cu_seqlens_k)]
    right = 0 if options.causal else options.window_right
    return (
        *(*masks, *bounds, options.scale, options.dropout_p, options.lower_right),
        *(options.window_left, right, options.softcap),
    )


def attention_results(q: Tensor, v: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """Memory for (out, lse)."""
    if v.shape[-1] != q.shape[-1]:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    else:
        out = torch.empty_like(q) if q.stride(-1) == 1 else rows_like(q)
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    return out, q.new_empty((q.shape[1], q.shape[0]) if packed else q.shape[:-1], dtype=dtype)


def attention_gradients(inputs: AttentionInputs, output_mask: Sequence[bool], asked: bool) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of (q, k, v, attn_mask) that are wanted; zeros where no query asks."""
    q, k, v, *_ = inputs
    usual = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and not output_mask[3]
    make = torch.zeros_like if not asked else torch.empty_like if usual else rows_like
    return tuple(
        make(t) if wanted and t is not None else None for t, wanted in zip(inputs[:4], output_mask, strict=True)
    )


def attention_fwd(library: Any, inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """(out, lse), by an operator that takes what `attention_arguments` gives."""
    q, k, v = inputs[:3]
    out, lse = attention_results(q, v, inputs.cu_seqlens_q is not None)
    library.attention_fwd(q, k, v, *attention_arguments(inputs, options), out, lse)
    return out, lse


def attention_bwd(
    library: Any,
    dout: Tensor,
    dlse: Tensor | None,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, v, attn_mask); None where not wanted."""
    asked = bool(lse.numel())
    gradients = attention_gradients(inputs, output_mask, asked)
    if asked:
        library.attention_bwd(
            # autograd and hooks on saved tensors may bring the statistics in another layout
            *(dout, None if dlse is None else dlse.contiguous(), *inputs[:3], out, lse.contiguous()),
            *(*attention_arguments(inputs, options), *gradients),
        )
    return gradients
