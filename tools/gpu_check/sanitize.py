"""A few calls that reach every form of the Triton and CUDA C++ kernels, for compute-sanitizer to watch each access.

    python3 -m tools.gpu_check.sanitize
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python3 -m tools.gpu_check.sanitize

Tensors are made on the CPU and copied, so that nearly all that runs on the device is ours. Every result is held against
the reference on the CPU. Exit status: 0; 1 when a result is wrong or a form of the kernels was not reached.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

if "--device=cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch
from torch import Tensor

import fusednorm
from fusednorm import dispatch
from fusednorm.providers.triton import launch as triton_launch
from fusednorm.providers.triton import norm as triton_norm
from fusednorm.providers.triton import norm_config as table
from tools.gpu_check import sanitize_cuda


class Work(NamedTuple):
    name: str
    function: str
    rows: int
    columns: int
    dtype: torch.dtype
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to
    parameters: tuple[str, ...] = ()  # of the epilogue
    strided: bool = False  # of attention: the mask broadcasts
    provider: str = "triton"


ATTENTION = "scaled_dot_product_attention"
DROPOUT = {"dropout_p": 0.25, "seed": 11}
BOTH = {**DROPOUT, "drop_path_p": 0.25}
WORKS = (
    Work("narrow, several rows a tile", "layer_norm", 37, 64, torch.float32),
    Work("narrow, odd width", "add_rms_norm", 37, 61, torch.bfloat16),
    Work("several tiles", "add_layer_norm", 9, 2500, torch.float32),
    Work("every epilogue", "add_layer_norm", 9, 384, torch.float32, BOTH, ("x_bias", "layer_scale")),
    Work("dropout, several tiles", "add_rms_norm", 5, 3000, torch.bfloat16, DROPOUT, ("x_bias",)),
    Work("strided", "add_layer_norm", 6, 100, torch.float32, DROPOUT, (), True),
    Work("memory efficient", "add_layer_norm", 9, 128, torch.float32, {"memory_efficient": True}),
    Work("wide, slabs", "layer_norm", 3, 33_001, torch.float32),
    Work("wide, dropout", "add_layer_norm", 3, 40_960, torch.bfloat16, DROPOUT, ("x_bias",)),
    Work("one column", "rms_norm", 5, 1, torch.float32),
    Work("activation", "bias_act_dropout", 37, 64, torch.float32, {"activation": "gelu"}),
    Work("activation, odd width", "bias_act_dropout", 37, 61, torch.float16, {"activation": "silu", **DROPOUT}),
    Work("activation, wide", "bias_act_dropout", 9, 4096, torch.bfloat16, {"activation": "gelu_tanh", **DROPOUT}),
    Work("causal", ATTENTION, 80, 64, torch.bfloat16, {"is_causal": True}),
    Work("masked, odd lengths", ATTENTION, 37, 32, torch.float32, DROPOUT, ("attn_mask",)),
    Work("one mask for all heads", ATTENTION, 40, 64, torch.float16, {}, ("attn_mask",), True),
    Work("window, wide heads", ATTENTION, 70, 128, torch.float16, {"window": (16, 8), "softcap": 20.0}),
)
CUDA_WORKS = tuple(
    work._replace(provider="cuda")
    for work in (
        Work("narrow, several rows a block", "layer_norm", 37, 64, torch.float32),
        Work("narrow, odd width", "add_rms_norm", 37, 61, torch.bfloat16),
        Work("every epilogue", "add_layer_norm", 9, 384, torch.float32, BOTH, ("x_bias", "layer_scale")),
        Work("two vectors a thread", "add_layer_norm", 9, 512, torch.bfloat16, DROPOUT, ("x_bias",)),
        Work("four vectors a thread", "layer_norm", 5, 4096, torch.float32),
        Work("memory efficient", "add_layer_norm", 9, 128, torch.float16, {"memory_efficient": True}),
        Work("two row strides", "add_layer_norm", 6, 100, torch.float32, DROPOUT, (), True),
        Work("16 bits into float32", "add_layer_norm", 9, 384, torch.bfloat16, {"residual_dtype": torch.float32}),
        Work("cluster", "add_layer_norm", 3, 16_384, torch.float32, DROPOUT, ("x_bias",)),
        Work("wider than a cluster", "add_layer_norm", 3, 70_000, torch.float32, DROPOUT, ("x_bias",)),
        # rows that are fetched while others are computed with: more than all multiprocessors take at once
        Work("many rounds", "add_layer_norm", 600, 4096, torch.bfloat16),
        Work("many rounds of clusters", "add_rms_norm", 300, 8192, torch.bfloat16, DROPOUT),
        Work("wide, odd width", "layer_norm", 3, 33_001, torch.bfloat16),
        Work("float64", "add_layer_norm", 9, 100, torch.float64, BOTH, ("layer_scale",)),
        Work("narrow", "bias_act_dropout", 37, 64, torch.float32, {"activation": "gelu"}),
        Work("odd width", "bias_act_dropout", 37, 61, torch.float16, {"activation": "silu", **DROPOUT}),
        Work("several warps", "bias_act_dropout", 9, 1024, torch.bfloat16, {"activation": "gelu_tanh", **DROPOUT}),
        Work("slabs", "bias_act_dropout", 9, 4096, torch.float32, {"activation": "relu", **DROPOUT}),
        Work("two row strides", "bias_act_dropout", 6, 100, torch.float32, {"activation": "gelu"}, (), True),
        Work("causal", ATTENTION, 80, 64, torch.bfloat16, {"is_causal": True}),
        Work("masked, odd lengths", ATTENTION, 37, 32, torch.float32, DROPOUT, ("attn_mask",)),
        Work("one mask for all heads", ATTENTION, 40, 64, torch.float16, DROPOUT, ("attn_mask",), True),
        Work("window, wide heads", ATTENTION, 70, 128, torch.float16, {"window": (16, 8), "softcap": 20.0}),
        Work("wide heads", ATTENTION, 33, 128, torch.bfloat16, {"window": (16, 8)}),
        Work("widest heads", ATTENTION, 33, 256, torch.bfloat16, {"window": (16, 8)}),
        Work("widest heads, masked", ATTENTION, 20, 256, torch.float32, DROPOUT, ("attn_mask",)),
        Work("widest heads, every mask", ATTENTION, 20, 256, torch.float16, {"softcap": 20.0}),
        Work("wide heads in float32", ATTENTION, 20, 128, torch.float32, {"is_causal": True}),
    )
)
FORMS = (
    *(f"forward, {form}" for form in ("rows side by side", "one tile", "several tiles", "wide")),
    *(f"backward, {form}" for form in ("rows side by side", "one tile", "several tiles", "slabs")),
    *("row sums", "finalize", "dropout", "strided", "bias_act_dropout_fwd", "bias_act_dropout_bwd", "attention_fwd"),
    *(f"attention_bwd_{kernel}" for kernel in ("delta", "dkv", "dq", "dmask")),
)


@contextmanager
def noted() -> Iterator[set[str]]:
    """The forms of kernels that are chosen and launched inside."""
    reached: set[str] = set()
    forward, backward, launch = table.forward, table.backward, triton_launch.Variant.launch

    def note(direction: str, unheld: str, config: table.Config) -> table.Config:
        if not config.chunks:
            reached.add(f"{direction}, {unheld}")
        else:
            reached.add(f"{direction}, several tiles" if config.chunks > 1 else f"{direction}, one tile")
            reached.update({f"{direction}, rows side by side"} if config.block_m > 1 else ())
        return config

    def launching(self: triton_launch.Variant, *args: Any) -> None:
        name = self.function.__name__.strip("_").removesuffix("_kernel")
        reached.update({name} & set(FORMS))
        reached.update({"row sums"} if "bwd_sums" in name else ())
        reached.update({"finalize"} if "sum_partials" in name else ())
        launch(self, *args)

    triton_norm.forget_variants()
    with (
        mock.patch.object(table, "forward", lambda *a, **k: note("forward", "wide", forward(*a, **k))),
        mock.patch.object(table, "backward", lambda *a, **k: note("backward", "slabs", backward(*a, **k))),
        mock.patch.object(triton_launch.Variant, "launch", launching),
    ):
        yield reached


def tensors(work: Work) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Inputs by name, and the cotangents of the results, on the CPU."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(work.dtype)

    if work.function == ATTENTION:
        shape, square = (1, 2, work.rows, work.columns), (1, 1 if work.strided else 2, work.rows, work.rows)
        values = {name: draw(*shape) for name in ("query", "key", "value")}
        return values | {name: draw(*square) for name in work.parameters}, (draw(*shape), draw(*shape))
    shape = (2, work.rows, work.columns) if work.strided else (work.rows, work.columns)
    names = ["weight", *(["bias"] if "rms" not in work.function else []), *work.parameters]
    if work.function == "bias_act_dropout":
        names = ["bias"]
    values = {"x": draw(*shape), **({"residual": draw(*shape)} if "add" in work.function else {})}
    # weights near 1: beside a weight near 0 the memory-efficient form keeps z after all
    values |= {name: 0.1 * draw(work.columns) + float(name != "bias") for name in names}
    return values, (draw(*shape), draw(*shape))


def results(work: Work, device: str, provider: str, inputs: dict[str, Tensor], cotangents: tuple[Tensor, ...]) -> dict:
    """Outputs and gradients, on the CPU."""
    leaves = {}
    for name, value in inputs.items():
        if work.strided and name in ("x", "residual") and work.provider == "cuda":  # rows at two strides
            value = value.transpose(0, 1).contiguous().to(device)
            leaves[name] = value.transpose(0, 1).detach().requires_grad_()
        elif work.strided and name in ("x", "residual"):  # neither rows nor columns lie side by side
            value = torch.stack([value, torch.full_like(value, 7.0)], -1).transpose(0, 1).to(device)
            leaves[name] = value[..., 0].transpose(0, 1).detach().requires_grad_()
        else:
            leaves[name] = value.to(device).requires_grad_()
    positional = [leaves[name] for name in ("x", "residual") if name in leaves]
    named = {name: leaf for name, leaf in leaves.items() if name not in ("x", "residual")}
    with fusednorm.use_provider(provider):
        function = getattr(fusednorm, work.function)
        if work.function == ATTENTION:
            outputs = function(**leaves, **work.options)
        elif work.function == "bias_act_dropout":
            outputs = function(*positional, **named, **work.options)
        else:
            outputs = function(*positional, (work.columns,), **named, **{"eps": 1e-5, **work.options})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = [c.to(device) for c in cotangents[: len(outputs)]]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), given)
    found = [*outputs, *gradients]
    return {name: t.detach().cpu().double() for name, t in zip([*("normed", "z")[: len(outputs)], *leaves], found)}


def fault(work: Work, device: str) -> str:
    """What is wrong with the results, if anything is."""
    inputs, cotangents = tensors(work)
    ours = results(work, device, work.provider, inputs, cotangents)
    wide = work._replace(dtype=torch.float64)
    exact = results(
        wide, "cpu", "reference", {n: t.double() for n, t in inputs.items()}, [c.double() for c in cotangents]
    )
    # generous: the tests hold the error budget, this finds what a stray access does
    tolerance = 64 * torch.finfo(work.dtype).eps
    for name, value in ours.items():
        worst = (value - exact[name]).abs().max().item()
        if not worst <= tolerance * max(1.0, exact[name].abs().max().item()):
            return f"{name} is off by {worst:.3g}"
    return ""


def native_forms(work: Work, device: str) -> set[str]:
    """What of sanitize_cuda.FORMS a call reaches."""
    x = torch.empty(1, work.columns, dtype=work.dtype, device=device)
    if work.function == ATTENTION:
        return sanitize_cuda.attention(x, work.options, bool(work.parameters))
    named = {"two row strides"} if work.strided else set()
    named |= {"epilogue"} if work.parameters or "drop_path_p" in work.options else set()
    named |= {work.name} if work.name.startswith("many rounds") else set()
    named |= {"float32 stream"} if "residual_dtype" in work.options else set()
    return named | sanitize_cuda.reached(work.function, x)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: in Triton's interpreter")
    device = parser.parse_args(argv).device
    wrong = 0

    def hold(work: Work) -> None:
        nonlocal wrong
        if device == "cpu" and (work.provider, work.dtype) == ("triton", torch.bfloat16):
            work = work._replace(dtype=torch.float16)  # the interpreter computes wrongly with the other
        found = fault(work, device)
        wrong += bool(found)
        said = f"{work.provider:<6} {work.name:<28} {work.function:<16} {work.rows}x{work.columns}"
        print(f"{said}  {found or 'right'}", flush=True)

    with noted() as reached:
        for work in WORKS:
            hold(work)
            reached.update({"dropout"} if work.options.get("dropout_p") else (), {"strided"} if work.strided else ())
    missing = [form for form in FORMS if form not in reached]
    calls = len(WORKS)
    unavailable = dispatch.unavailable_reason("cuda")
    if unavailable is None:
        native: set[str] = set()
        for work in CUDA_WORKS:
            hold(work)
            native |= native_forms(work, device)
        missing += [f"cuda {form}" for form in sanitize_cuda.forms(device) if form not in native]
        calls += len(CUDA_WORKS)
    else:
        print(f"the CUDA C++ kernels are left out: {unavailable}")
    print(f"{calls - wrong} of {calls} calls right; not reached: {', '.join(missing) or 'nothing'}")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
