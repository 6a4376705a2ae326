"""Calls of the native libraries that have to end in a result or an exception.

``python tests/helpers/hostile.py GROUP [SEED]`` makes the calls of one group in a process of its own, which a fault
would end.
It prints each call before it is made, so the last line names the one that did.
"""

from __future__ import annotations

import faulthandler
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusednorm
from fusednorm import dispatch
from fusednorm._activations import ACTIVATIONS
from fusednorm._options import NormGradOptions, NormOptions
from fusednorm.providers import native
from fusednorm.providers.cpu import library as cpu
from fusednorm.providers.cuda import library as cuda_library

F32 = torch.float32
HUGE = 2**60
ONE = torch.tensor([1])


def huge(n: int, like: Tensor | None = None) -> Tensor:
    """One number, n times."""
    return (torch.ones(1) if like is None else like[:1]).expand(n)


def expect(expected: Any, call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """A call that returns a tensor of the shape `expected`, or raises an error whose text it matches."""
    print(call, [described(arg) for arg in args], {name: described(arg) for name, arg in options.items()}, flush=True)
    try:
        result = call(*args, **options)
    except (RuntimeError, ValueError, TypeError) as error:
        assert isinstance(expected, str), f"expected {expected}, got {error}"
        assert re.search(expected, str(error)), f"expected {expected!r} in {error}"
    else:
        shape = tuple((result if isinstance(result, Tensor) else result[0]).shape)
        assert shape == expected, f"expected {expected!r}, got {shape}"


def norm_options(ndim: int = 1, mask: tuple[bool, ...] = (), saved_is_normed: bool = False) -> int:
    if mask:
        return native.packed_norm_grad(NormGradOptions(ndim, 0.0, 0.0, F32, F32, False, False, saved_is_normed), mask)
    return native.packed_norm(NormOptions(ndim, 1e-5, 0.0, 0.0, F32, F32, False, False, True))


def forward_args() -> dict[str, Any]:
    """Of add_layer_norm_fwd, valid and with every operand."""
    x, residual = torch.randn(2, 4, 8)
    parameters = {name: torch.rand(8) for name in ("weight", "bias", "x_bias", "layer_scale")}
    rates = {"eps": 1e-5, "dropout_p": 0.5, "drop_path_p": 0.5}
    return {"x": x, "residual": residual, **parameters, "seed": ONE.clone(), "options": norm_options(), **rates}


def backward_args() -> dict[str, Any]:
    dnormed, dresidual_out, saved, x = torch.randn(4, 4, 8)
    rows = {"dnormed": dnormed, "dresidual_out": dresidual_out, "saved": saved, "stats": torch.rand(2, 4) + 1}
    parameters = {"weight": torch.rand(8) + 1, "bias": torch.rand(8), "x": x, "x_bias": torch.rand(8)}
    last = {"layer_scale": torch.rand(8), "seed": ONE.clone(), "options": norm_options(1, (True,) * 6, True)}
    return rows | parameters | last | {"dropout_p": 0.5, "drop_path_p": 0.5}


def activation_args() -> dict[str, Any]:
    operands = {"x": torch.randn(4, 8), "bias": torch.rand(8), "seed": ONE.clone()}
    return operands | {"options": native.FORWARD_OPTIONS["gelu"], "dropout_p": 0.5}


def activation_backward_args() -> dict[str, Any]:
    return {"dy": torch.randn(4, 8), **activation_args(), "options": native.activation_options("gelu", (True, True))}


def attention_options() -> dict[str, Any]:
    masks = {"attn_mask": torch.randn(1, 1, 5, 7), "key_mask": torch.rand(2, 7) > 0.3, "seed": ONE.clone()}
    rest = {"cu_seqlens_q": None, "cu_seqlens_k": None, "scale": 0.3, "dropout_p": 0.5, "lower_right": False}
    return masks | rest | {"window_left": 3, "window_right": -1, "softcap": 0.0}


def attention_args() -> dict[str, Any]:
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 24)
    return {"q": q, "k": k, "v": v, **attention_options(), "out": torch.empty(2, 4, 5, 24), "lse": torch.empty(2, 4, 5)}


def packed_args() -> dict[str, Any]:
    args = attention_args() | {"attn_mask": None, "key_mask": None}
    args |= {"q": torch.randn(10, 4, 16), "k": torch.randn(14, 2, 16), "v": torch.randn(14, 2, 24)}
    bounds = torch.tensor([[0, 3, 10], [0, 9, 14]], dtype=torch.int32)
    return args | {
        "cu_seqlens_q": bounds[0].clone(),
        "cu_seqlens_k": bounds[1].clone(),
        "out": torch.empty(10, 4, 24),
        "lse": torch.empty(4, 10),
    }


def attention_backward_args() -> dict[str, Any]:
    args = attention_args()
    q, k, v, out, lse = (args.pop(name) for name in ("q", "k", "v", "out", "lse"))
    operands = {"dout": torch.randn_like(out), "dlse": torch.randn_like(lse), "q": q, "k": k, "v": v}
    operands |= {"out": torch.randn_like(out), "lse": torch.randn_like(lse)}
    gradients = {"dq": q, "dk": k, "dv": v, "dmask": args["attn_mask"]}
    return operands | args | {name: torch.empty_like(of) for name, of in gradients.items()}


def mask_args() -> dict[str, Any]:
    return {"seed": ONE.clone(), "rows": 3, "columns": 7, "p": 0.5}


def few_rows_args() -> dict[str, Any]:
    return {"x": torch.randn(3, 18), "weight": torch.randn(7, 18), "bias": torch.randn(7)}


def operators() -> dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]]:
    """Every operator of the CPU library that takes a tensor, with valid arguments for it."""
    ops = torch.ops.fusednorm_cpu
    return {
        "add_layer_norm_fwd": (ops.add_layer_norm_fwd, forward_args),
        "add_layer_norm_bwd": (ops.add_layer_norm_bwd, backward_args),
        "bias_act_dropout_fwd": (ops.bias_act_dropout_fwd, activation_args),
        "bias_act_dropout_bwd": (ops.bias_act_dropout_bwd, activation_backward_args),
        "dropout_mask": (ops.dropout_mask, mask_args),
        "attention_fwd": (ops.attention_fwd, attention_args),
        "attention_fwd, packed": (ops.attention_fwd, packed_args),
        "attention_bwd": (ops.attention_bwd, attention_backward_args),
        "all_bounded": (ops.all_bounded, lambda: dict(zip("abc", torch.randn(3, 4, 8), strict=True))),
        "transposed": (ops.transposed, lambda: {"x": torch.randn(5, 18)}),
        "few_rows": (ops.few_rows, few_rows_args),
    }


def cuda_operators() -> dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]]:
    """Those of the CUDA library, which its emulation runs on CPU tensors; it drops no samples and saves z."""
    assert dispatch.unavailable_reason("cuda") is None, dispatch.unavailable_reason("cuda")
    ops = cuda_library.ops
    return {
        "add_layer_norm_fwd": (ops.add_layer_norm_fwd, forward_args),
        "add_layer_norm_bwd": (ops.add_layer_norm_bwd, backward_args),
        "bias_act_dropout_fwd": (ops.bias_act_dropout_fwd, activation_args),
        "bias_act_dropout_bwd": (ops.bias_act_dropout_bwd, activation_backward_args),
    }


def sizes() -> None:
    """Sizes whose products and byte counts no int64 holds."""
    empty, scale, n = torch.empty, huge(HUGE), 2**61
    for name in ("automatic", "cpu"):
        with fusednorm.use_provider("cpu") if name == "cpu" else torch.no_grad():
            expect((HUGE, 0), fusednorm.rms_norm, empty(HUGE, 0), 0)
            expect((0, HUGE), fusednorm.rms_norm, empty(0, HUGE), HUGE, scale)
            args = (empty(0, HUGE), empty(0, HUGE), HUGE, scale, scale)
            expect((0, HUGE), fusednorm.add_layer_norm, *args, dropout_p=0.5, seed=1)
            expect((0, n), fusednorm.bias_act_dropout, empty(0, n), huge(n), "relu")
            expect((2**40, 0), fusednorm.bias_act_dropout, empty(2**40, 0), empty(0), "relu")
            expect((2**40, 0), fusednorm.bias_act_dropout, empty(2**40, 0), None, "gelu", 0.5, seed=1)
    expect((2**40, 0), fusednorm.dropout_mask, (2**40, 0), 0.5, 1)
    ops = torch.ops.fusednorm_cpu
    one_row, columns = huge(2**58)[None], huge(2**58)
    last = (*[None] * 4, norm_options(), 1e-5, 0.0, 0.0)
    expect(r"out of memory: no tensor of shape \(1, 2882", ops.add_layer_norm_fwd, one_row, None, None, *last)
    expect(r"out of memory: no tensor of shape \(1, 2882", ops.add_layer_norm_fwd, one_row, None, columns, *last)
    none = torch.ones(0, 1, 1).expand(0, 2**40, 2**40)
    expect((0, 2**40, 2**40), ops.add_layer_norm_fwd, none, *[None] * 6, norm_options(2), 1e-5, 0.0, 0.0)
    args = (empty(HUGE, 0), *[None] * 6, norm_options(), 1e-5, 0.0, 0.0)
    expect(r"out of memory.*shape \(2, 1152", ops.add_layer_norm_fwd, *args)
    nothing = backward_args() | dict.fromkeys(("dnormed", "dresidual_out", "saved", "x"), one_row)
    nothing |= dict.fromkeys(("weight", "bias", "x_bias", "layer_scale"), columns)
    nothing |= {"stats": torch.ones(2, 1), "options": norm_options(1, (False,) * 6)}
    found = ops.add_layer_norm_bwd(**nothing)
    assert all(gradient is None for gradient in found), found  # at once: nothing of 2**58 columns is asked for
    expect("rows: expected", ops.dropout_mask, ONE, -1, 4, 0.5)
    expect("columns: expected", ops.dropout_mask, ONE, 4, -1, 0.5)
    expect("out of memory: 92", ops.dropout_mask, ONE, 2**62, 2**62, 0.5)
    for name, value in (("q", 2**57), ("k", 2**57), ("v", 2**57), ("v", 257), ("q", 257)):
        changed = attention_args()
        changed[name] = changed[name][..., :1].expand(*changed[name].shape[:-1], value)
        said = "key: its shape" if name == "k" else f"head dim of at most 256, got {value}"
        expect(said, ops.attention_fwd, **changed)
    assert ops.all_bounded(huge(HUGE), empty(0, 2**40), torch.ones(1, 1).expand(2**30, 2**30))


def gradients() -> None:
    """Of parameters beside no rows: zeros of the parameter's shape and dtype."""
    weight, bias = torch.randn(2, 8).bfloat16().requires_grad_().unbind(0)
    for name in ("cpu", "reference"):
        with fusednorm.use_provider(name):
            print(name, flush=True)
            x = torch.empty(3, 0, 8, requires_grad=True)
            outputs = [*fusednorm.add_layer_norm(x, x, 8, weight, bias), fusednorm.bias_act_dropout(x, bias, "silu")]
            found = torch.autograd.grad([o.sum() for o in outputs], (x, weight, bias))
            for gradient, of in zip(found, (x, weight, bias), strict=True):
                assert gradient.dtype == of.dtype and torch.equal(gradient, torch.zeros_like(of))
    with fusednorm.use_provider("cpu"):
        x = torch.empty(5, 0, requires_grad=True)
        normed = fusednorm.rms_norm(x, 0)
        assert torch.autograd.grad(normed.sum(), x)[0].shape == (5, 0)
    stats = torch.ops.fusednorm_cpu.add_layer_norm_fwd(torch.empty(5, 0), *[None] * 6, norm_options(), 1e-5, 0.0, 0.0)[
        2
    ]
    assert stats.shape == (2, 5) and stats.isnan().all()


def behind_an_offset(tensor: Tensor, left: int = 0) -> Tensor:
    """The tensor, as a view whose storage has been cut down to `left` bytes since."""
    base = torch.cat([tensor[:1], tensor]) if tensor.ndim else tensor[None].repeat(2)
    view = base[1:] if tensor.ndim else base[1]
    base.untyped_storage().resize_(left)
    return view


def libraries() -> Iterator[tuple[str, Callable[..., Any], Callable[[], dict[str, Any]]]]:
    tables = [operators()] + ([cuda_operators()] if "FUSEDNORM_EMULATE" in os.environ else [])
    for table in tables:
        for op, (call, valid) in table.items():
            yield op, call, valid


FREED = r": its storage was freed or is too small \({} bytes, \d+ needed\)"


def freed() -> None:
    """Every operand of every operator."""
    names = {"q": "query", "k": "key", "v": "value"}
    for op, call, valid in libraries():
        for name in [name for name, value in valid().items() if isinstance(value, Tensor)]:
            for left in (0, valid()[name].element_size()):  # the second: some bytes, and not the view's
                args = valid()
                args[name] = behind_an_offset(args[name], left)
                shown = names.get(name, name) if op.startswith("attention") else name
                expect(shown + FREED.format(left), call, **args)
    x, y, weight = behind_an_offset(torch.ones(8, 64)), torch.ones(8, 64), torch.ones(64)
    gone = FREED.format(0)
    for name in ("automatic", "cpu", *(["cuda"] if "FUSEDNORM_EMULATE" in os.environ else [])):
        with torch.no_grad() if name == "automatic" else fusednorm.use_provider(name):
            expect("x" + gone, fusednorm.rms_norm, x, 64)
            expect("residual" + gone, fusednorm.add_layer_norm, y, x, 64)
            expect("weight" + gone, fusednorm.add_layer_norm, y, y, 64, behind_an_offset(weight))
            expect("bias" + gone, fusednorm.bias_act_dropout, y, behind_an_offset(weight), "silu", 0.1, seed=1)
    q, mask = torch.randn(1, 2, 5, 8), behind_an_offset(torch.ones(1, 5, dtype=torch.bool))
    expect("key_mask" + gone, fusednorm.scaled_dot_product_attention, q, q, q, key_mask=mask)
    base = torch.randn(9, 64)  # freed between forward and backward
    with fusednorm.use_provider("cpu"):
        out = fusednorm.bias_act_dropout(base[1:], weight.requires_grad_(), "silu")
    base.untyped_storage().resize_(0)
    expect("x" + gone, torch.autograd.grad, out.sum(), weight)


def arguments() -> None:
    """What the operators look at before they read."""
    floats = [torch.ones(1, dtype=dtype) for dtype in (F32, torch.int32, torch.uint8, torch.bool)]
    seeds = [*floats, torch.tensor([1, 2]), torch.ones(0, dtype=torch.int64), None]
    for op, call, valid in libraries():
        args = valid()
        for seed in seeds[: -1 if op == "dropout_mask" else None] if "seed" in args else []:
            expect("seed: ", call, **args | {"seed": seed})
        if "options" in args and "norm" in op:
            for ndim in (128, 129, 0, -1, 3, 2**40):
                options = norm_options(ndim, (True,) * 6 if "bwd" in op else ())
                expect(f"normalized_ndim from 1 to 2, got {ndim}", call, **args | {"options": options})
        elif "options" in args:
            last = len(ACTIVATIONS) - 1
            for number in (last + 1, last + 4, -1, 2**60):
                options = number << native.ACTIVATION_SHIFT
                expect(f"activation from 0 to {last}, got {number}", call, **args | {"options": options})
        for name in {"weight", "bias", "x_bias", "layer_scale"} & args.keys():
            expect(f"{name}: its shape", call, **args | {name: torch.rand(1)})
        for name in {"dy", "dnormed", "residual", "dresidual_out"} & args.keys():
            for other in (torch.rand(8), torch.rand(4, 1), torch.rand(4, 8, 1, 1)):
                expect(f"{name}: its shape", call, **args | {name: other})


def hostile_tensor(rng: random.Random, valid: Tensor | None) -> Tensor | None:
    """What stands where a tensor is expected; `valid` is what would fit."""
    like = torch.randn(4, 8) if valid is None else valid
    plain = like if like.dtype.is_floating_point else like.float()
    dtypes = [torch.float64, F32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
    layout, lead = rng.choice([torch.strided, torch.jagged]), like.shape[:-1]
    wide = rng.choice([2**57, 2**62 // max(lead.numel(), 1)])
    makers: list[Callable[[], Tensor | None]] = [
        lambda: None,
        lambda: like.to(rng.choice([*dtypes, torch.complex64])),
        lambda: like.to("meta"),
        lambda: plain.to_sparse(),
        lambda: torch.nested.nested_tensor([torch.rand(2, 8), torch.rand(3, 8)], layout=layout),
        lambda: like.new_empty([0 if rng.random() < 0.4 else size for size in like.shape]),
        lambda: like.new_ones([rng.choice([0, 1, 2, size]) for size in like.shape]),
        lambda: like[None],
        lambda: like.flatten(),
        lambda: like.new_ones(()),
        lambda: like.new_ones([1] * rng.choice([5, 64, 65])),
        lambda: like.flatten()[:1].expand(like.shape),
        lambda: like.flatten()[:1].reshape([1] * like.ndim).expand(*lead, wide),
        lambda: like.new_empty(0).reshape(0, 1).expand(0, rng.choice([2**58, 2**61, 2**62])),
        lambda: like.new_ones(4096).as_strided(like.shape, [rng.choice([0, 1, 2, 3, 7, 16]) for _ in like.shape], 5),
        lambda: like.mT.contiguous().mT if like.ndim > 1 else like.repeat_interleave(2)[::2],
        lambda: behind_an_offset(like.contiguous(), rng.choice([0, 1, like.element_size() * like.numel()])),
        lambda: torch.view_as_complex(torch.stack([plain.float(), plain.float()], -1).contiguous()).conj().imag,
        lambda: torch.quantize_per_tensor(plain.float(), 0.1, 0, torch.qint8),
        lambda: torch.nn.Parameter(plain.clone()),
    ]
    return rng.choice(makers)()


INTS = (-1, 0, 1, 2, 3, 5, 7, 64, 127, 128, 2**20, 2**31, 2**58, 2**62, 2**63 - 1, -(2**31), -(2**63))
FLOATS = (0.0, 0.5, 1.0, -1.0, 5e-324, 1e308, float("nan"), float("inf"), -float("inf"), 1 - 2**-53)
LENGTHS = (-1, 0, 1, 5, 4097, 2**58, 2**62)  # of a mask, of which memory can be had at once or not at all


def fuzz(seed: int, count: int = 1500) -> None:
    """Valid calls of every operator, of which up to three arguments are replaced."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    table = list(operators().items())
    refused = 0
    for number in range(count):
        op, (call, valid) = table[number % len(table)]
        args = valid()
        for name in rng.sample(list(args), min(len(args), rng.choice([0, 1, 1, 2, 3]))):
            value = args[name]
            if value is None or isinstance(value, Tensor):
                args[name] = hostile_tensor(rng, value)
            elif isinstance(value, bool):
                args[name] = not value
            elif isinstance(value, float):
                args[name] = rng.choice(FLOATS)
            elif op == "dropout_mask":
                args[name] = rng.choice(LENGTHS)
            else:
                args[name] = rng.choice([rng.choice(INTS), rng.getrandbits(14) | rng.choice([0, 1, 2, 3]) << 14])
        print(number, op, {name: described(value) for name, value in args.items()}, flush=True)
        try:
            call(**args)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, OverflowError):
            refused += 1
    print(f"refused {refused} of {count}")
    assert 0.2 * count < refused < 0.9 * count, refused


def described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    strides = tuple(value.stride()) if value.layout == torch.strided and not value.is_nested else None
    shape = "nested" if value.is_nested else tuple(value.shape)
    return f"{value.dtype} {shape} {strides} {value.layout} {value.device}"


def main() -> None:
    if "FUSEDNORM_TEST_LIBRARY" in os.environ:  # as in conftest.py
        cpu.LIBRARY = Path(os.environ["FUSEDNORM_TEST_LIBRARY"])
    assert dispatch.unavailable_reason("cpu") is None, dispatch.unavailable_reason("cpu")
    torch.ops.fusednorm_cpu.use_instruction_set(os.environ.get("FUSEDNORM_TEST_INSTRUCTION_SET", ""))
    faulthandler.enable()  # where a fault ends it
    group, *seed = sys.argv[1:]
    {"sizes": sizes, "gradients": gradients, "freed": freed, "arguments": arguments, "fuzz": fuzz}[group](
        *map(int, seed)
    )
    print("survived")


if __name__ == "__main__":
    main()
