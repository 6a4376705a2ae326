"""``fusednorm doctor``: checks what runs on this machine, and prints what to paste into a report of a fault."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fusednorm

from . import dispatch
from ._saved_bytes import saved_bytes
from .dispatch import fastpath

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLUMNS, HEADS, LENGTH, HEAD_DIM = 24, 136, 2, 40, 24


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    outcome: str  # "ok", "FAILED" or "left out"
    detail: str


class Case(NamedTuple):
    """One operator, and torch's own operations for the same values."""

    name: str
    sizes: tuple[tuple[int, ...], ...]  # of its tensors
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]


def _add_norm(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, residual, weight: norm(x + residual, (COLUMNS,), weight)


def _hidden_keys(q: Tensor) -> Tensor:
    """A key mask of (batch, keys): the second sample's last seven keys are padding."""
    shown = torch.ones(2, LENGTH, dtype=torch.bool, device=q.device)
    shown[1, -7:] = False
    return shown


def _masked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    past = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, past & _hidden_keys(q)[:, None, None])


def _bounds(q: Tensor) -> Tensor:
    return torch.tensor([0, 13, LENGTH], dtype=torch.int32, device=q.device)


def _each_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = []
    for begin, end in ((0, 13), (13, LENGTH)):
        a, b, c = (t[begin:end].transpose(0, 1) for t in (q, k, v))
        parts.append(F.scaled_dot_product_attention(a, b, c).transpose(0, 1))
    return torch.cat(parts)


def cases() -> list[Case]:
    rows, vector, heads = (ROWS, COLUMNS), (COLUMNS,), (2, HEADS, LENGTH, HEAD_DIM)
    return [
        Case(
            "layer_norm",
            (rows, vector, vector),
            lambda x, w, b: fusednorm.layer_norm(x, COLUMNS, w, b),
            lambda x, w, b: F.layer_norm(x, (COLUMNS,), w, b),
        ),
        Case(
            "rms_norm",
            (rows, vector),
            lambda x, w: fusednorm.rms_norm(x, COLUMNS, w, 1e-6),
            lambda x, w: F.rms_norm(x, (COLUMNS,), w, 1e-6),
        ),
        Case(
            "add_layer_norm",
            (rows, rows, vector),
            lambda x, r, w: fusednorm.add_layer_norm(x, r, COLUMNS, w)[0],
            _add_norm(F.layer_norm),
        ),
        Case(
            "add_rms_norm",
            (rows, rows, vector),
            lambda x, r, w: fusednorm.add_rms_norm(x, r, COLUMNS, w)[0],
            _add_norm(F.rms_norm),
        ),
        Case(
            "bias_act_dropout",
            (rows, vector),
            lambda x, b: fusednorm.bias_act_dropout(x, b, "gelu"),
            lambda x, b: F.gelu(x + b),
        ),
        Case(
            "scaled_dot_product_attention",
            (heads, heads, heads),
            lambda q, k, v: fusednorm.scaled_dot_product_attention(q, k, v, is_causal=True, key_mask=_hidden_keys(q)),
            _masked_attention,
        ),
        Case(
            "varlen_attention",
            ((LENGTH, HEADS, HEAD_DIM),) * 3,
            lambda q, k, v: fusednorm.varlen_attention(q, k, v, _bounds(q), _bounds(q), 27, 27),
            _each_sequence,
        ),
    ]


def _values(function: Callable[..., Tensor], tensors: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The output and the gradients of all tensors."""
    given = [t.detach().requires_grad_() for t in tensors]
    out = function(*given)
    gradients = torch.autograd.grad(out, given, cotangent.to(out.dtype))
    return [out.detach(), *gradients]


def _worst(case: Case, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error against float64, forward and gradients, in units of what is allowed."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator).to(device, dtype) for size in case.sizes]
    found = case.eager(*tensors)
    cotangent = torch.randn(found.shape, generator=generator).to(device, dtype)
    exact = _values(case.eager, [t.double() for t in tensors], cotangent)
    eager = _values(case.eager, tensors, cotangent)
    worst = 0.0
    for ours, theirs, true in zip(_values(case.ours, tensors, cotangent), eager, exact, strict=True):
        if ours.shape != true.shape or ours.dtype != dtype:
            return float("inf")
        allowed = 2 * (theirs.double() - true).abs().max() + true.abs().max() * torch.finfo(dtype).eps / 2
        error = ((ours.double() - true).abs().max() / allowed).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _accuracy(provider: str, case: Case, device: torch.device) -> Finding:
    """All dtypes of one operator."""
    parts = []
    failed = False
    try:
        with fusednorm.use_provider(provider):
            for dtype in DTYPES:
                worst = _worst(case, dtype, device)
                failed |= worst > 1.0
                parts.append(f"{str(dtype).removeprefix('torch.')} {worst:.0%}")
    except ValueError as reason:  # the provider does not take such calls
        return Finding(f"{provider}: {case.name}", "left out", str(reason).partition(";")[0])
    detail = f"error of what is allowed: {', '.join(parts)}"
    return Finding(f"{provider}: {case.name}", "FAILED" if failed else "ok", detail)


def _dropout(provider: str, device: torch.device) -> Finding:
    """The mask of a seed, which is one on every provider."""
    x = torch.ones(ROWS, COLUMNS, device=device)
    with fusednorm.use_provider(provider):
        _, total = fusednorm.add_layer_norm(x, torch.zeros_like(x), COLUMNS, dropout_p=0.3, seed=7)
    same = torch.equal(total.cpu() != 0.0, fusednorm.dropout_mask((ROWS, COLUMNS), 0.3, 7, "cpu"))
    return Finding(f"{provider}: dropout's mask", "ok" if same else "FAILED", "of a seed, element by element")


def _automatic(device: torch.device) -> Finding:
    """A call as a user makes it, by FUSEDNORM_PROVIDER where that is set."""
    x = torch.randn(ROWS, COLUMNS, device=device)
    served = fusednorm.explain(fusednorm.add_rms_norm, x, x, COLUMNS)
    return Finding("a call", "ok", str(served).splitlines()[0])


def _fast_path() -> Finding:
    reason = fastpath.load()[1]
    return Finding("fast path", "left out" if reason else "ok", reason or "small calls go straight to C++")


def _compiles(device: torch.device) -> Finding:
    x, residual = (torch.randn(ROWS, COLUMNS, device=device, requires_grad=True) for _ in range(2))

    def step(x: Tensor, residual: Tensor) -> Tensor:
        normed, total = fusednorm.add_layer_norm(x, residual, COLUMNS)
        return (normed * total).sum()

    start = time.perf_counter()
    try:
        compiled = torch.compile(step, fullgraph=True)(x, residual)
    except Exception as fault:
        if "InvalidCxxCompiler" not in f"{type(fault).__name__} {fault}":
            raise
        return Finding("torch.compile", "left out", "it finds no C++ compiler here")
    found = torch.autograd.grad(compiled, (x, residual))
    true = torch.autograd.grad(step(x, residual), (x, residual))
    close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, true, strict=True))
    seconds = time.perf_counter() - start
    return Finding("torch.compile", "ok" if close else "FAILED", f"one graph, forward and backward, {seconds:.0f} s")


def _memory(device: torch.device) -> Finding:
    """Bytes that a training step of an encoder layer keeps, beside torch.nn's."""
    arguments = (64, 4, 128, 0.1)
    x = torch.randn(2, 32, 64, device=device, requires_grad=True)
    kept = []
    for kind in (nn.TransformerEncoderLayer, fusednorm.TransformerEncoderLayer):
        layer = kind(*arguments, batch_first=True).to(device)
        kept.append(saved_bytes(layer.parameters(), functools.partial(layer, x)))
    theirs, ours = kept
    detail = f"an encoder layer keeps {ours / theirs:.0%} of the bytes that torch.nn's keeps"
    return Finding("memory", "ok" if ours < theirs else "FAILED", detail)


def _checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Finding]]]:
    for provider in dispatch.PROVIDERS:
        if dispatch.unavailable_reason(provider) is None and _runs_on(provider, device):
            for case in cases():
                yield f"{provider}: {case.name}", lambda p=provider, c=case: _accuracy(p, c, device)  # type: ignore[misc]
            if provider != "torch":  # which draws from torch's own generator
                yield f"{provider}: dropout's mask", lambda p=provider: _dropout(p, device)  # type: ignore[misc]
    yield "a call", lambda: _automatic(device)
    yield "fast path", _fast_path
    yield "torch.compile", lambda: _compiles(device)
    yield "memory", lambda: _memory(device)


def _runs_on(provider: str, device: torch.device) -> bool:
    """Whether a provider takes tensors of a device, as far as one call shows."""
    with contextlib.suppress(ValueError), fusednorm.use_provider(provider):
        fusednorm.layer_norm(torch.ones(1, 8, device=device), 8)
        return True
    return False


def doctor(device: str | torch.device | None = None) -> list[Finding]:
    """Check each provider that runs here against float64, the fast path, ``torch.compile`` and the bytes kept.

    The error of an output or gradient may be twice that of torch's own operations, plus half a unit in the last place
    of the largest result.

    Args:
        device: what to check; None takes a GPU if there is one.

    Returns:
        A finding for each check. A check that raises has failed, and its detail is the error.

    Example:
        >>> findings = fusednorm.doctor.doctor("cpu")  # doctest: +SKIP
        >>> [finding.name for finding in findings if finding.outcome == "FAILED"]  # doctest: +SKIP
        []
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    findings = []
    for name, check in tqdm(list(_checks(where)), "doctor", leave=False, disable=None):
        try:
            findings.append(check())
        except Exception as fault:  # whatever it is, the user is to see it
            findings.append(Finding(name, "FAILED", f"{type(fault).__name__}: {str(fault).splitlines()[0]}"))
    return findings


def page(findings: list[Finding], info: str) -> str:
    """What to paste into a report."""
    width = max(len(finding.name) for finding in findings)
    lines = [f"{finding.outcome:<8}  {finding.name:<{width}}  {finding.detail}" for finding in findings]
    failed = sum(finding.outcome == "FAILED" for finding in findings)
    said = (
        f"{failed} of {len(findings)} checks failed. Paste all of this into your report." if failed else "All is well."
    )
    return "\n".join([info, "", *lines, "", said])
