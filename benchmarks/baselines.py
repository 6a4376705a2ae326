"""What the package is compared with: torch's own ways, each backend of its attention, and other libraries' norms."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.cases import DROPOUT_P, EPS, Call, Leaves, Norm, Operation
from fusednorm.dispatch import rules, tuned
from fusednorm.providers.torch.attention import BACKENDS


class BaselineError(Exception):
    """A baseline cannot serve a case; the message says why."""


def _compiled(mode: str | None) -> Callable[[Any, Leaves], Call]:
    def build(op: Operation, t: Leaves) -> Call:
        import torch._functorch.config as functorch_config

        functorch_config.donated_buffer = False  # a kept graph (direction "backward") could not be run twice
        return torch.compile(op.eager(t), mode=mode, dynamic=False)

    return build


def _attribute(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise BaselineError(f"{path} cannot be imported: {error}") from error


def _liger(op: Norm, t: Leaves) -> Call:
    if op.epilogue:
        raise BaselineError("has no dropout")
    x, w = t["x"], t["weight"]
    # offset 0; in place would overwrite the cotangent, which is used again
    if op.add:
        if not op.rms:
            raise BaselineError("has no add + layer_norm that returns both")
        add = _attribute("liger_kernel.ops.fused_add_rms_norm.LigerFusedAddRMSNormFunction").apply
        return lambda: add(x, t["residual"], w, EPS, 0.0, "llama", False)
    if op.rms:
        rms = _attribute("liger_kernel.ops.rms_norm.LigerRMSNormFunction").apply
        return lambda: (rms(x, w, EPS, 0.0, "llama", False),)
    norm = _attribute("liger_kernel.ops.layer_norm.LigerLayerNormFunction").apply
    return lambda: (norm(x, w, t["bias"], EPS),)


def _quack(op: Norm, t: Leaves) -> Call:
    if op.epilogue or not op.rms:
        raise BaselineError("has rms_norm and add_rms_norm only")
    rms, x, w, residual = _attribute("quack.rmsnorm.rmsnorm"), t["x"], t["weight"], t.get("residual")
    if op.add:
        return lambda: rms(x, w, residual=residual, eps=EPS, prenorm=True)
    return lambda: (rms(x, w, eps=EPS),)


def _fla(op: Norm, t: Leaves) -> Call:
    if op.epilogue:
        raise BaselineError("has no dropout")
    norm = _attribute("fla.modules.layernorm." + ("rms_norm" if op.rms else "layer_norm"))
    x, w, b, residual = t["x"], t["weight"], t.get("bias"), t.get("residual")
    if op.add:
        return lambda: norm(x, w, b, residual=residual, eps=EPS, prenorm=True)
    return lambda: (norm(x, w, b, eps=EPS),)


def _flash_attn(op: Norm, t: Leaves) -> Call:
    norm = _attribute("flash_attn.ops.triton.layer_norm.layer_norm_fn")
    x, w, b, residual, x_bias = t["x"], t["weight"], t.get("bias"), t.get("residual"), t.get("x_bias")
    options = {"eps": EPS, "is_rms_norm": op.rms}
    if op.epilogue:  # it has no bias of the branch: that add stays torch's
        return lambda: norm(x + x_bias, w, b, residual=residual, dropout_p=DROPOUT_P, prenorm=True, **options)
    if op.add:
        return lambda: norm(x, w, b, residual=residual, prenorm=True, **options)
    return lambda: (norm(x, w, b, **options),)


def _forced(name: str) -> Callable[[Any, Leaves], Call]:
    return lambda op, t: op.eager(t, BACKENDS[name])


UNTUNED = "untuned"  # our own, without the file of `fusednorm tune`
ATTENTION = {f"sdpa-{name}": name for name in BACKENDS}  # torch's function with one of its backends and no other


# name -> (module to import, or None for torch's own; function (op, leaves) -> Call)
BASELINES: dict[str, tuple[str | None, Callable[[Any, Leaves], Call]]] = {
    "eager": (None, lambda op, t: op.eager(t)),
    "compile": (None, _compiled(None)),
    # without CUDA graphs: those copy every input of this isolated call first, as no real model would
    "compile-max-autotune": (None, _compiled("max-autotune-no-cudagraphs")),
    **{name: (None, _forced(backend)) for name, backend in ATTENTION.items()},
    "liger_kernel": ("liger_kernel", _liger),
    "quack": ("quack", _quack),
    "fla": ("fla", _fla),
    "flash_attn": ("flash_attn", _flash_attn),
    UNTUNED: (None, lambda op, t: op.fused(t)),  # inside `served`
}


@contextlib.contextmanager
def served(name: str) -> Iterator[None]:
    """Calls inside are served as a variant's name says."""
    if name == UNTUNED:
        files = dict.fromkeys(tuned._files) | {("cpu", None, torch.get_num_threads()): None}
        before, tuned._files = tuned._files, files
        _choose_anew()
        try:
            yield
        finally:
            tuned._files = before
            _choose_anew()
        return
    yield


def _choose_anew() -> None:
    """By the files that are in force now, providers and their launches."""
    tuned.prepare_anew()
    rules.choose_anew()


def applies(name: str, op: Operation) -> bool:
    """Whether the baseline is one of such operations at all."""
    if name in ATTENTION:
        return op.family == "attention"
    return op.family == "norm" or BASELINES[name][0] is None
