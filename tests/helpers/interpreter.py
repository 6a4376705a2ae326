"""Triton's interpreter with bfloat16 rounded as hardware rounds it, and with the paired sum at numpy's speed.

Its own float32 -> bfloat16 conversion truncates (no rounding mode reaches `cast_impl`), and float64 -> bfloat16 stores
integers; a GPU rounds to nearest even in both. Measured against float64, truncation is an error of up to one unit in
the last place that no kernel of ours makes. Its products of matrices take the bits of bfloat16 for integers, and those
of float32 are a BLAS's, whose rounding depends on the tile's shape and on which operand is transposed (on some
processors); a GPU adds the products of one element in the order of the inner dimension, each by one fused
multiply-add, whatever the tile. Attention's backward makes logits again that must be the forward's to the last bit.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _from_bfloat16(bits: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(dtype)


def _add_products(a: np.ndarray, b: np.ndarray, accumulator: np.ndarray) -> np.ndarray:
    """a @ b + accumulator in float32, for each element a chain of fused multiply-adds."""
    total = accumulator.copy()
    wide = np.empty(total.shape, np.float64)  # holds a product of two float32 exactly
    for column, row in zip(a.T[:, :, None].astype(np.float64), b.astype(np.float64), strict=True):
        np.multiply(column, row, out=wide)
        np.add(wide, total, out=wide)
        total[...] = wide
    return total


def round_bfloat16_to_nearest() -> None:
    """Patch the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl
    if getattr(original, "rounds_to_nearest", False):
        return

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return original(self, src, dst_type)
        if target == tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(src.data), target)
        return interpreter.TensorHandle(_from_bfloat16(src.data, interpreter._get_np_dtype(dst_type)), target)

    cast_impl.rounds_to_nearest = True
    builder.cast_impl = cast_impl

    create_dot = builder.create_dot

    def dot(self, a, b, accumulator, *options):
        if {a.dtype.scalar, b.dtype.scalar, accumulator.dtype.scalar} == {tl.float32}:
            return interpreter.TensorHandle(_add_products(a.data, b.data, accumulator.data), tl.float32)
        widened = [
            interpreter.TensorHandle(_from_bfloat16(t.data, np.dtype(np.float32)), tl.float32)
            if t.dtype.scalar == tl.bfloat16
            else t
            for t in (a, b)
        ]
        return create_dot(self, *widened, accumulator, *options)

    builder.create_dot = dot
    builder.interprets_bfloat16 = True  # without it the provider refuses the dtype


def sum_pairs_with_numpy() -> None:
    """The sum of two tensors in one reduction is a Python loop over elements in the interpreter."""
    reduction = interpreter.ReduceOps
    original = reduction.apply_impl

    def apply_impl(self, input):
        if self.combine_fn.fn.__name__ == "_add_pair":  # the interpreter calls a rewritten copy of it
            return tuple(self.sum(operand) for operand in input)
        return original(self, input)

    reduction.apply_impl = apply_impl


def leave_out_the_unread_overflow_check() -> None:
    """Of every integer sum and product the interpreter computes whether it overflows, which takes 40 % of its time.

    It tells nobody: an assertion on the device does nothing in its builder, whose option `debug` is off.
    """
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def look_up_numpys_dtypes_once() -> None:
    """The interpreter makes its table of dtypes anew for every value."""
    original, known = interpreter._get_np_dtype, {}

    def dtype_of(dtype: tl.dtype) -> np.dtype:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = original(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = dtype_of


def patch_the_language_once() -> None:
    """The interpreter looks through the language's modules at every call of a device function, which is half its time.

    A launch has patched `tl` already; `tl.core`, which Triton's own functions go by, is never patched back.
    """
    function = interpreter.InterpretedFunction
    patched = set()

    def __call__(self, *args, **kwargs):
        fn = self.rewrite()
        if fn not in patched:
            patched.add(fn)
            if any(value is tl.core for value in self.fn.__globals__.values()):
                interpreter._patch_lang(self.fn)
        try:
            return fn(*args, **kwargs)
        except Exception as fault:
            raise interpreter.InterpreterError(repr(fault)) from fault

    function.__call__ = __call__
