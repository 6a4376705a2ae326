"""Which norm, activation or step a module computes, found by running it beside the known ones."""

from __future__ import annotations

import abc
import contextlib
import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._activations import FUNCTIONS
from ..modules._fusible import class_path
from . import steps
from .handover import NormForm, without_hooks

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps", "rms_norm_eps")
_PLAIN = {nn.LayerNorm, nn.RMSNorm}


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module._parameters.items() if p is not None}


def _leaf(module: nn.Module) -> bool:
    return not module._modules and not any(b is not None for b in module._buffers.values())


def may_be_norm(module: nn.Module) -> bool:
    """Whether it looks like a norm: by its name, or by one vector or two and an epsilon."""
    if not _leaf(module) or type(module).__module__.startswith("torch.nn.utils."):
        return False
    parameters = _parameters(module)
    vectors = len(parameters) in (1, 2) and all(p.ndim == 1 for p in parameters.values())
    named = "norm" in type(module).__name__.lower()
    return named or (vectors and any(hasattr(module, name) for name in _EPS_NAMES))


@contextlib.contextmanager
def _quietly() -> Any:
    """Without gradients, autocast or a change of any generator."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _run(module: nn.Module, parameters: dict[str, Tensor], x: Tensor, **attributes: Any) -> Tensor | None:
    probe = object.__new__(type(module))  # forward alone, without hooks
    probe.__dict__.update(module.__dict__, _parameters={**module._parameters, **parameters})
    probe.__dict__.update(attributes)
    try:
        with _quietly():
            y = probe.forward(x)
    except Exception:  # whatever a stranger's forward raises on this input
        return None
    return y if isinstance(y, Tensor) else None


def _candidates(module: nn.Module) -> list[tuple[NormForm, Any]]:
    """(form, function of x and parameters) of each norm the module may be."""
    names = list(_parameters(module))
    if len(names) > 2:
        return []
    weight = names[0] if names else None
    bias = names[1] if len(names) == 2 else None
    if bias is not None and "bias" in names:
        weight, bias = next(n for n in names if n != "bias"), "bias"
    found: list[tuple[NormForm, Any]] = []
    for eps_name in [n for n in _EPS_NAMES if isinstance(getattr(module, n, None), float)]:
        eps = getattr(module, eps_name)

        def layer(x: Tensor, p: dict[str, Tensor], eps: float = eps) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], p.get(weight or ""), p.get(bias or ""), eps)

        def rms(x: Tensor, p: dict[str, Tensor], eps: float = eps, shift: float = 0.0) -> Tensor:
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            return y if weight is None else y * (shift + p[weight])

        found.append((NormForm(False, eps_name, weight, bias), layer))
        if bias is None:
            found.append((NormForm(True, eps_name, weight), rms))
            if weight is not None:
                found.append((NormForm(True, eps_name, weight, None, True), functools.partial(rms, shift=1.0)))
    return found


def why_not_derived(kind: type) -> str:
    """Why no class can be derived from a class without knowing more of it, or nothing."""
    if type(kind) not in (type, abc.ABCMeta):
        return f"{class_path(kind)} has a metaclass"
    hook = kind.__init_subclass__
    parameters = inspect.signature(hook).parameters.values() if inspect.ismethod(hook) else ()
    if any(p.default is p.empty and p.kind is p.KEYWORD_ONLY for p in parameters):
        return f"{class_path(kind)} can only be derived from with keywords"
    return ""


def norm_form(module: nn.Module) -> tuple[NormForm | None, str]:
    """(what the module computes, or None; why not)."""
    kind = type(module)
    if "forward" in module.__dict__:
        return None, "its forward was replaced"
    if why_not_derived(kind):
        return None, why_not_derived(kind)
    if kind is nn.LayerNorm or kind is nn.RMSNorm:
        if len(module.normalized_shape) != 1:  # type: ignore[arg-type]
            return None, "it normalizes more than the last dimension"
        rms = kind is nn.RMSNorm
        if not isinstance(module.eps, float) and not (rms and module.eps is None):
            return None, f"its eps is a {type(module.eps).__name__}, no float"
        return NormForm(rms, None if module.eps is None else "eps", "weight", None if rms else "bias"), ""
    known = _PLAIN.intersection(kind.__mro__)
    parameters = _parameters(module)
    if any(p.ndim != 1 for p in parameters.values()) or len({p.shape for p in parameters.values()}) > 1:
        return None, f"{class_path(kind)} has other parameters than a norm over the last dimension"
    size = next((p.shape[0] for p in parameters.values()), 0)
    if not size:
        shape = getattr(module, "normalized_shape", None) or getattr(module, "dim", None)
        only = shape[0] if isinstance(shape, (tuple, list)) and len(shape) == 1 else shape
        size = only if isinstance(only, int) else 16
    with _quietly():
        random = {name: torch.randn(p.shape) for name, p in parameters.items()}
        inputs = [torch.randn(2, 5, size), 1e-3 * torch.randn(3, size), 30.0 + torch.randn(2, 3, 2, size)]
    results = [_run(module, random, x, training=training) for x in inputs for training in (False, True)]
    if all(y is not None for y in results):
        for form, function in _candidates(module):
            with _quietly():
                expected = [function(x, random) for x in inputs for _ in range(2)]
            if all(_equal(y, e) for y, e in zip(results, expected, strict=True)):
                half = _run(module, {n: p.bfloat16() for n, p in random.items()}, inputs[0].bfloat16())
                only = half is None or half.dtype != torch.bfloat16
                return form._replace(float32_only=only, keeps_strides=_keeps_strides(module, random, size)), ""
    what = "its own forward" if known else "something else than LayerNorm or RMSNorm over the last dimension"
    return None, f"{class_path(kind)} has {what}" if known else f"{class_path(kind)} computes {what}"


def _keeps_strides(module: nn.Module, parameters: dict[str, Tensor], size: int) -> bool:
    """As torch's elementwise operations do; its own norms give contiguous results."""
    x = torch.ones(2, 3, 5, size).transpose(1, 2)
    y = _run(module, parameters, x)
    return y is not None and y.stride() == x.stride()


def _equal(y: Tensor | None, expected: Tensor) -> bool:
    """To a few float32 roundings of the largest value: the formulas differ in the order of operations."""
    if y is None or y.dtype != expected.dtype or y.shape != expected.shape:
        return False
    return bool((y - expected).abs().max() <= 2e-5 * expected.abs().max())


_GRID_STEPS = 401


def activation_name(activation: Any) -> str | None:
    """What ``bias_act_dropout`` calls an activation, or None."""
    known = steps.activation_name(activation)
    if known is not None or not isinstance(activation, nn.Module) or type(activation).__module__.startswith("torch."):
        return known
    if not _leaf(activation) or _parameters(activation) or not without_hooks(activation):
        return None
    grid = torch.linspace(-6.0, 6.0, _GRID_STEPS)
    y = _run(activation, {}, grid)
    if y is None or y.shape != grid.shape:
        return None
    for name, function in FUNCTIONS.items():
        if float((y - function(grid)).abs().max()) <= 1e-6:
            return name
    return None


def step_kind(module: nn.Module) -> str | None:
    """Whether a module is a linear layer, dropout, layer scale or drop path, and which; or None."""
    if type(module) in steps.STEP_KINDS:
        return steps.step_kind(module)
    if type(module).__module__.startswith("torch."):
        return None
    if not _leaf(module) or "forward" in module.__dict__ or getattr(module, "inplace", False):
        return None
    parameters = _parameters(module)
    shapes = [p.ndim for p in parameters.values()]
    if shapes == [1] and not may_be_norm(module) and _is_layer_scale(module, parameters):
        return "layer_scale"
    if sorted(parameters) == ["bias", "weight"] and shapes in ([1, 2], [2, 1]) and _is_conv1d(module):
        return "conv1d"
    if not parameters and isinstance(getattr(module, "drop_prob", None), float) and _is_drop_path(module):
        return "drop_path"
    return None


def _is_layer_scale(module: nn.Module, parameters: dict[str, Tensor]) -> bool:
    ((name, parameter),) = parameters.items()
    with _quietly():
        scale, x = torch.randn(parameter.shape), torch.randn(2, 3, *parameter.shape)
    y = _run(module, {name: scale}, x.clone())
    return y is not None and torch.equal(y, x * scale)


def _is_conv1d(module: Any) -> bool:
    rows, columns = module.weight.shape
    if module.bias is None or module.bias.shape != (columns,):
        return False
    with _quietly():
        weight, bias, x = torch.randn(rows, columns), torch.randn(columns), torch.randn(2, 3, rows)
    y = _run(module, {"weight": weight, "bias": bias}, x)
    return y is not None and y.shape == (2, 3, columns) and torch.allclose(y, x @ weight + bias, atol=1e-4)


def _is_drop_path(module: nn.Module) -> bool:
    """Whether it drops whole samples and scales the others by 1 / (1 - p), in training mode alone."""
    p, x = 0.5, torch.ones(64, 2, 3)
    dropped = _run(module, {}, x, drop_prob=p, training=True)
    kept = _run(module, {}, x, drop_prob=p, training=False)
    if dropped is None or dropped.shape != x.shape or kept is None or not torch.equal(kept, x):
        return False
    samples = dropped.flatten(1)
    whole = bool((samples == samples[:, :1]).all())
    return whole and set(samples[:, 0].tolist()) == {0.0, 1.0 / (1.0 - p)}
