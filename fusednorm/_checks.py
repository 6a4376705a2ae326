"""Argument validation shared by the public functions: what is wrong, what was given, what is accepted."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ._dtypes import compute_dtype

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOAT_NAMES = "float32, bfloat16, float16 or float64"


def check_is_tensor(name: str, value: Any, expected: str = "a torch.Tensor") -> None:
    """Any tensor; of what is none, the error says how to make one."""
    if isinstance(value, Tensor):
        return
    remedy = ""
    if type(value).__name__ == "ndarray":
        remedy = f"; pass torch.from_numpy({name})"
    elif isinstance(value, (list, tuple)):
        remedy = f"; pass torch.tensor({name})"
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        remedy = f"; pass a tensor of the full shape, as torch.full(shape, {shown(value)})"
    raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}{remedy}")


def check_tensor(name: str, tensor: Any) -> None:
    """A dense floating-point tensor."""
    check_is_tensor(name, tensor)
    refuse_nested(name, tensor)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}; call to_dense()")
    if tensor.dtype not in FLOAT_DTYPES:
        if tensor.is_quantized:
            raise TypeError(
                f"{name}: expected {_FLOAT_NAMES}, got {tensor.dtype}, which is quantised; call dequantize(), or put a "
                "torch.ao.quantization.DeQuantStub before this module and set its qconfig to None before prepare()"
            )
        raise TypeError(f"{name}: expected {_FLOAT_NAMES}, got {tensor.dtype}; convert it first")


def refuse_nested(name: str, tensor: Any) -> None:
    if isinstance(tensor, Tensor) and tensor.is_nested:
        raise TypeError(
            f"{name}: nested tensors are not accepted; pad it with torch.nested.to_padded_tensor, or pass its values()"
        )


def refuse_nested_subclass(name: str, tensor: Any) -> None:
    """Before a subclass takes a call over: torch's jagged tensor goes by a function's name, and takes some calls."""
    with torch._C.DisableTorchFunctionSubclass():  # another subclass is not to be asked
        refuse_nested(name, tensor)


def shown(value: Any) -> str:
    """A value for a message; an int of thousands of digits, which Python may refuse to print, by its size."""
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"an int of {value.bit_length()} bits"
    return str(value)


def check_dtype(name: str, dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOAT_DTYPES):
        got = dtype if isinstance(dtype, (torch.dtype, str)) else type(dtype).__name__
        raise TypeError(f"{name}: expected {_FLOAT_NAMES} (torch.dtype) or None, got {got!r}")


def check_number(name: str, value: Any, expected: str = "a number") -> float:
    """A real number as a float, whatever its class; a symbolic one stays what it is."""
    if type(value) is float:
        return value
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, Real):
        remedy = "; pass its .item()" if isinstance(value, Tensor) and value.numel() == 1 else ""
        remedy = "; convert it with float()" if isinstance(value, str) else remedy
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}{remedy}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}, past the largest float") from None


def check_eps(eps: Any, rms: bool, *dtypes: torch.dtype) -> float:
    """As a float; None, of RMSNorm, is the machine epsilon of the dtype computed in."""
    if eps is None and rms:
        return torch.finfo(compute_dtype(*dtypes)).eps
    return check_number("eps", eps)


def check_probability(name: str, p: Any) -> float:
    """A number in [0, 1] as a float."""
    number = check_number(name, p, "a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {shown(p)}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """True or False; as numbers too, and NumPy's."""
    if type(value) is bool:
        return value
    numpys = getattr(sys.modules.get("numpy"), "bool_", bool)
    if isinstance(value, (bool, torch.SymBool, numpys)) or (isinstance(value, Integral) and value in (0, 1)):
        return value if isinstance(value, torch.SymBool) else bool(value)  # type: ignore[return-value]
    raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_epilogue(dropout_p: Any, drop_path_p: Any, residual_dtype: Any) -> tuple[float, float]:
    """Both probabilities as floats."""
    check_dtype("residual_dtype", residual_dtype)
    return check_probability("dropout_p", dropout_p), check_probability("drop_path_p", drop_path_p)


def check_branch_parameters(layer_scale: Any, x_bias: Any) -> None:
    """What a module's constructor takes: an initial value, and whether there is a bias."""
    if layer_scale is not None and (isinstance(layer_scale, bool) or not isinstance(layer_scale, Real)):
        raise TypeError(
            f"layer_scale: expected its initial value (a number) or None, got {type(layer_scale).__name__}; "
            "to start from a tensor, copy it into module.layer_scale"
        )
    if not isinstance(x_bias, bool):
        raise TypeError(
            f"x_bias: expected True or False, got {type(x_bias).__name__}; to start from a tensor, copy it into "
            "module.x_bias"
        )


def check_seed(seed: Any) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed: expected an int or a one-element int64 tensor, got {seed.dtype} of shape {tuple(seed.shape)}"
            )
    elif isinstance(seed, bool) or not isinstance(seed, Integral | torch.SymInt):
        raise TypeError(f"seed: expected an int or a one-element int64 tensor, got {type(seed).__name__}")


def check_mask_shape(shape: Any) -> None:
    sizes = shape if isinstance(shape, Sequence) else ("",)
    if not all(isinstance(n, (int, torch.SymInt)) and 0 <= n < 2**63 for n in sizes):
        got = shape if isinstance(shape, (list, tuple)) else type(shape).__name__
        raise ValueError(f"shape: expected a sequence of sizes >= 0, got {got!r}")


def check_device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)  # a device may be named that this torch, or this machine, does not have
    except (RuntimeError, TypeError, ValueError, AssertionError, OverflowError) as fault:
        got = device if isinstance(device, (str, torch.device)) else shown(device)
        raise ValueError(f"device: expected one that torch has here, got {got}: {fault}") from fault
    return found


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: is on {tensor.device}, {other_name} on {other.device}; move one of them with .to(device)"
        )


def check_normalized_shape(name: str, x: Tensor, normalized_shape: Any) -> tuple[int, ...]:
    """The normalized shape as a tuple, checked to be the trailing dimensions of x."""
    shape: tuple[int, ...]
    if type(normalized_shape) in (tuple, torch.Size):  # asked first: abstract classes are slow to ask
        shape = normalized_shape
    elif isinstance(normalized_shape, Integral | torch.SymInt):
        shape = (normalized_shape,)  # type: ignore[assignment]
    elif isinstance(normalized_shape, Sequence) and not isinstance(normalized_shape, str):
        shape = tuple(normalized_shape)
    else:
        raise TypeError(
            f"normalized_shape: expected an int or a sequence of ints, got {type(normalized_shape).__name__}"
        )
    if not shape:
        raise ValueError("normalized_shape: expected at least one dimension, got ()")
    if any(isinstance(size, (bool, float, str)) for size in shape):  # 64.0 equals 64
        raise TypeError(f"normalized_shape: expected an int or a sequence of ints, got {normalized_shape!r}")
    if len(shape) > x.ndim or x.shape[x.ndim - len(shape) :] != shape:
        end = tuple(x.shape[-len(shape) :])
        raise ValueError(
            f"normalized_shape: {shape} is not the end of {name}'s shape {tuple(x.shape)}; pass an {name} that ends so"
            + (f", or {end}" if end else " (a 0-d tensor has no trailing dimension)")
        )
    return shape


def check_parameter(name: str, parameter: Any, shape: tuple[int, ...], x_name: str, x: Tensor) -> None:
    """Weight, bias, x_bias or layer_scale: None, or of the normalized shape and on x's device."""
    if parameter is None:
        return
    check_tensor(name, parameter)
    if parameter.shape != shape:
        raise ValueError(f"{name}: expected the normalized shape {shape}, got {tuple(parameter.shape)}")
    check_same_device(name, parameter, x_name, x)


def check_residual(residual: Any, x: Tensor) -> None:
    if residual is None:
        return
    if isinstance(residual, (int, tuple, list)) and not isinstance(residual, bool):
        raise TypeError(
            f"residual: expected a torch.Tensor or None, got {type(residual).__name__}; the order of the arguments is "
            "(x, residual, normalized_shape, weight), so pass None for no residual"
        )
    check_tensor("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected x's shape {tuple(x.shape)}, got {tuple(residual.shape)}; expand it first")
    check_same_device("residual", residual, "x", x)


def check_last_dimension(name: str, parameter: Any, x_name: str, x: Tensor) -> None:
    """A vector along x's last dimension, or None."""
    if x.ndim == 0:
        raise ValueError(f"{x_name}: expected at least one dimension, got a 0-d tensor; reshape it to (1,)")
    if parameter is None:
        return
    check_tensor(name, parameter)
    if parameter.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: expected shape {tuple(x.shape[-1:])}, {x_name}'s last dimension, got {tuple(parameter.shape)}; "
            "reshape it, or pass None for no bias"
        )
    check_same_device(name, parameter, x_name, x)


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in known:
        near = difflib.get_close_matches(value, known, 1) if isinstance(value, str) else []
        remedy = f"; did you mean {near[0]!r}?" if near else ""
        got = repr(value) if isinstance(value, str) or callable(value) else type(value).__name__
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {got}{remedy}")
