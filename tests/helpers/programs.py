"""Every public function and module as the first call of a process: `python programs.py KIND [...]`.

KIND is trace, export, strict_export or compile. Each call runs in a process of its own, forked before anything of the
package was called. Arguments after the first: `reference` (the provider to ask for), `without` (the native library is
absent). Prints, for each call, what was wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusednorm as fn

BOUNDS = torch.tensor([0, 3, 5], dtype=torch.int32)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # sums of 32 float32 terms in another order, through up to four layers


class Program(nn.Module):
    """A call as a module: its first output."""

    def __init__(self, call: Callable[..., Any], module: nn.Module | None = None) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: Tensor) -> Tensor:
        result = self.call(*inputs) if self.module is None else self.call(self.module, *inputs)
        return result[0] if isinstance(result, tuple) else result


def _of(make: Callable[[], nn.Module], call: Callable[..., Any] | None = None) -> Callable[[], Program]:
    return lambda: Program(call or (lambda module, *inputs: module(*inputs)), make())


def _function(call: Callable[..., Any]) -> Callable[[], Program]:
    return lambda: Program(call)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


def _sdpa(x: Tensor, y: Tensor, **options: Any) -> Any:
    return fn.scaled_dot_product_attention(_heads(x), _heads(y), _heads(y), **options)


LAYER = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True}
RECOMPUTE = ("norms", "activation", "attention")

# two inputs (2, 5, 16) each; modules in training mode, without dropout where their masks would differ from eager's
CALLS: dict[str, Callable[[], Program]] = {
    "layer_norm": _function(lambda x, y: fn.layer_norm(x + y, 16)),
    "rms_norm": _function(lambda x, y: fn.rms_norm(x + y, 16)),
    "add_layer_norm": _function(lambda x, y: fn.add_layer_norm(x, y, 16)),
    "add_rms_norm": _function(lambda x, y: fn.add_rms_norm(x, y, 16)),
    "add_layer_norm_dropped": _function(
        lambda x, y: fn.add_layer_norm(x, y, 16, x_bias=y[0, 0], dropout_p=0.5, drop_path_p=0.5, seed=3)
    ),
    "bias_act_dropout": _function(lambda x, y: fn.bias_act_dropout(x, y[0, 0], "gelu")),
    "bias_act_dropout_dropped": _function(lambda x, y: fn.bias_act_dropout(x, None, "silu", 0.5, seed=3) + y),
    "dropout_mask": _function(lambda x, y: x * fn.dropout_mask(x.shape, 0.5, 3) + y),
    "attention": _function(_sdpa),
    "attention_causal": _function(lambda x, y: _sdpa(x, y, is_causal=True)),
    "attention_window": _function(lambda x, y: _sdpa(x, y, window=(2, 0), softcap=3.0, return_lse=True)),
    "attention_dropped": _function(lambda x, y: _sdpa(x, y, dropout_p=0.5, seed=3)),
    "varlen_attention": _function(
        lambda x, y: fn.varlen_attention(
            *(t[0].unflatten(-1, (2, 8)) for t in (x, y, y)), BOUNDS, BOUNDS, 3, 3, dropout_p=0.5, seed=3
        )
    ),
    "LayerNorm": _of(lambda: fn.LayerNorm(16), lambda module, x, y: module(x + y)),
    "RMSNorm": _of(lambda: fn.RMSNorm(16), lambda module, x, y: module(x + y)),
    "AddLayerNorm": _of(lambda: fn.AddLayerNorm(16)),
    "AddRMSNorm": _of(lambda: fn.AddRMSNorm(16)),
    "MultiheadAttention": _of(
        lambda: fn.MultiheadAttention(16, 2, batch_first=True), lambda module, x, y: module(x, y, y)
    ),
    "TransformerEncoderLayer": _of(
        lambda: fn.TransformerEncoderLayer(**LAYER, dropout=0.0), lambda module, x, y: module(x + y)
    ),
    "TransformerEncoderLayer_recompute": _of(
        lambda: fn.TransformerEncoderLayer(**LAYER, dropout=0.0, recompute=RECOMPUTE),
        lambda module, x, y: module(x + y),
    ),
    "TransformerEncoderLayer_padded": _of(
        lambda: fn.TransformerEncoderLayer(**LAYER, bias=False).eval(),
        lambda module, x, y: module(x + y, src_key_padding_mask=PADDING),
    ),
    "TransformerDecoderLayer": _of(lambda: fn.TransformerDecoderLayer(**LAYER, dropout=0.0)),
    "TransformerEncoder": _of(
        lambda: fn.TransformerEncoder(fn.TransformerEncoderLayer(**LAYER), 2).eval(), lambda module, x, y: module(x + y)
    ),
    "Transformer": _of(lambda: fn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)),
}


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 16, generator=generator), torch.randn(2, 5, 16, generator=generator)


def gradients(program: Callable[..., Tensor], parameters: list[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The output at fresh inputs, and its gradients for these inputs and for the parameters."""
    leaves = [t.requires_grad_() for t in inputs(1)]
    output = program(*leaves)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return output.detach(), torch.autograd.grad(output, (*leaves, *parameters), cotangent, allow_unused=True)


def run_trace(program: Program) -> None:
    traced = torch.jit.trace(program, inputs(), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    compare(torch.jit.load(file), program)


def run_export(program: Program, strict: bool = False) -> None:
    compare(torch.export.export(program, inputs(), strict=strict).module(), program)


def run_strict_export(program: Program) -> None:
    run_export(program, strict=True)


def run_compile(program: Program) -> None:
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    output, found = gradients(compiled, list(program.parameters()))
    torch.testing.assert_close((output, found), gradients(program, list(program.parameters())), **CLOSE)


def compare(written: nn.Module, program: Program) -> None:
    """Parameters by name: an exported program has them in another order."""
    names = [name for name, _ in program.named_parameters()]
    theirs = dict(written.named_parameters())
    output, found = gradients(written, [theirs[name] for name in names])
    torch.testing.assert_close((output, found), gradients(program, list(program.parameters())), **CLOSE)


def main(kind: str, *options: str) -> None:
    warnings.simplefilter("ignore")
    if "without" in options:
        from fusednorm.providers.cpu import library as cpu

        cpu.LIBRARY = Path("nowhere.so")
    globals()[f"run_{kind}"](Program(torch.add))  # torch's own machinery, imported once for all
    asked = fn.use_provider("reference") if "reference" in options else contextlib.nullcontext()
    for name, make in CALLS.items():
        read, write = os.pipe()
        if os.fork() == 0:
            problem = ""
            try:
                torch.manual_seed(0)
                program = make()
                with asked:
                    globals()[f"run_{kind}"](program)
            except BaseException:
                problem = traceback.format_exc(limit=-3)
            os.write(write, problem.encode()[:60000])
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as said:
            problem = said.read()
        os.wait()
        print(json.dumps([name, problem]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
