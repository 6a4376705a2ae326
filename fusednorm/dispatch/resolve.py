"""Where a provider is chosen: once for each signature of plain eager calls, anew for every other call."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from typing import NamedTuple

import torch

from .._once import first_time
from .._options import AttentionInputs, AttentionOptions, Inputs, NormOptions, Options
from .._transforms import traced, transform_active, wants_gradients
from ..providers.forms import Place
from . import registry, rules, rules_attention, settings, tuned
from .settings import Decision, Settings

_log = logging.getLogger("fusednorm")
_Refusals = tuple[tuple[str, str], ...]

_ELEMENTARY = "elementary operators, because a torch.func transform or forward-mode AD is active"
_FUSED = "one fused op each way"


class Request(NamedTuple):
    """A call of a public function, after its checks."""

    function: str  # its name
    op: str
    inputs: Inputs
    options: Options
    without: tuple[str, str] | None = None  # a provider that automatic choice passes over, and why
    return_lse: bool = False  # of attention, as are the next two
    dims: int = 4  # of the operands as they were given
    bounded: bool | None = None  # no operand holds NaN or huge numbers; None: check only if that decides


def resolve(request: Request) -> Decision:
    """Who serves a call, and how. An explicit request never falls back: it raises ValueError."""
    if not torch.compiler.is_compiling():
        settings.load_fastpath()
    decision = _decide(request, settings.current)
    settings.record(decision, request)
    return decision


def _decide(request: Request, setting: Settings) -> Decision:
    if transform_active():
        # An autograd.Function would silently drop tangents; torch.layer_norm's forward-over-reverse and third
        # derivatives are wrong. The reference's forward is made of elementary operators and right to any order.
        return Decision(request.function, "reference", _ELEMENTARY, elementary=True)
    if setting.provider is not None:
        check_request(setting.provider, request)
        how = _FUSED
        if setting.provider == "torch":
            attention = isinstance(request.inputs, AttentionInputs)
            how = "torch's own operator" if attention else "torch's own operators"
        return Decision(request.function, setting.provider, how + _form_note(setting.provider, request))
    provider, refusals, why = _first(request, setting)
    if isinstance(request.inputs, AttentionInputs):
        return _attention(request, provider, refusals, setting)
    how = "torch's own operators" if provider == "torch" else _FUSED
    how = f"{how}: {why}" if why else how
    return Decision(request.function, provider, how + _form_note(provider, request), refusals)


def _form_note(provider: str, request: Request) -> str:
    inputs, options = request.inputs, request.options
    if not isinstance(options, NormOptions) or torch.compiler.is_compiling() or traced():
        return ""
    x = inputs[0]
    dtypes = (x.dtype,) if provider == "cuda" else (x.dtype, options.residual_dtype, options.normed_dtype)
    widest = max(dtype.itemsize for dtype in dtypes)
    columns = math.prod(x.shape[x.ndim - options.normalized_ndim :])
    directions = ("forward", "backward") if wants_gradients(inputs) else ("forward",)
    return tuned.form_note(provider, x, [Place(direction, columns, widest) for direction in directions])


def _first(request: Request, setting: Settings) -> tuple[str, _Refusals, str]:
    """What was measured to be fastest, or else the first provider of the table that can serve the call.

    With it (name, reason) of those passed over, each of which is logged once, and what was measured on this machine.
    """
    if traced():  # its sizes are tensors, and it may run without this package
        return "torch", (), ""
    call, without = (request.op, request.inputs, request.options), request.without or ("", "")
    preferred = None
    if not torch.compiler.is_compiling() and setting.by_shape:  # a graph would be compiled anew for each number of rows
        preferred = rules.preference(*call[1:])
        if preferred is not None and (preferred.provider == without[0] or not _serves(preferred.provider, *call)):
            preferred = None
    refusals: _Refusals = ()
    for name in registry.PROVIDERS:
        measured = preferred is not None and preferred.provider == name
        reason = registry.refusal(name, *call) or rules.reluctance(name, *call, measured)
        if reason is None and name == without[0]:
            reason = without[1]
        if reason is None and preferred is not None and preferred.provider != name:
            reason = preferred.why
        if reason is None:
            passed_over = name == "torch" and request.inputs[0].is_cpu and "cpu" in dict(refusals)
            if passed_over and registry.unavailable_reason("cpu") and not rules.reluctance("cpu", *call):
                _tell_missing_library()
            return name, refusals, preferred.why if preferred is not None and preferred.own else ""
        refusals += ((name, reason),)
        if not torch.compiler.is_compiling() and first_time((name, reason)):
            _log.info("provider %s is not used: %s", name, reason)
    raise RuntimeError(f"no provider can run {request.op}: {refusals}")


def _serves(name: str, op: str, inputs: Inputs, options: Options) -> bool:
    """Whether a provider that was measured to be the fastest can take a call."""
    call = name, op, inputs, options
    known = name in registry.PROVIDERS and registry.refusal(*call) is None
    return known and rules.reluctance(*call, measured=True) is None


def _attention(request: Request, provider: str, refusals: _Refusals, setting: Settings) -> Decision:
    """Torch's operator where it means the same and is not slower; else the first provider, or the reference."""
    inputs, options = request.inputs, request.options
    assert isinstance(inputs, AttentionInputs) and isinstance(options, AttentionOptions)
    asked = rules_attention.Asked(
        provider, request.return_lse, request.dims, wants_gradients(inputs), setting.by_shape, request.bounded
    )
    differs = rules_attention.why_not_torch(inputs, options, asked)
    if not differs:
        refusals += ((provider, "torch's own operator means the same here"),) if provider != "torch" else ()
        how = rules_attention.how_torch_serves(inputs, options)
        backend = rules_attention.torch_backend(inputs, options, asked.needs_grad)
        how += f", by its {backend} kernel, measured fastest on this machine" if backend is not None else ""
        return Decision(request.function, "torch", how, refusals)
    refusals = (*[r for r in refusals if r[0] != "torch"], ("torch's own operator", differs))
    return Decision(request.function, "reference" if provider == "torch" else provider, _FUSED, refusals)


def check_request(name: str, request: Request) -> None:
    """Raise ValueError if the requested provider cannot run a call, or if there is none of that name."""
    if name not in registry.PROVIDERS:
        raise ValueError(f"FUSEDNORM_PROVIDER: {settings.unknown(name)}")
    reason = registry.unavailable_reason(name)
    reason = reason or registry.refusal(name, request.op, request.inputs, request.options)
    if reason is not None:
        raise ValueError(
            f"provider {name!r} cannot run {request.op}: {reason}; leave {settings.request_in_words()} out for "
            "automatic choice"
        )
    if name == "torch" and request.return_lse:
        raise ValueError(
            "provider 'torch' cannot run attention_fwd: torch's attention returns no log-sum-exp; leave `return_lse` "
            "out, or the request, for automatic choice"
        )


def provider_of_raw_op(name: str, inputs: Inputs, options: Options) -> str:
    """For a forward op that names no provider: the requested one, or else the first of the table that can run it.

    What was measured to be fastest is not looked at: there torch's own operators are meant, which are no op of ours.
    """
    requested = settings.requested()
    if requested is not None:
        check_request(requested, Request(name, name, inputs, options))
        return requested
    return next(p for p in registry.PROVIDERS if registry.refusal(p, name, inputs, options) is None)


def _tell_missing_library() -> None:
    """Warn once, for a call on CPU tensors that our library would have served, that torch's operators do."""
    if torch.compiler.is_compiling():
        return
    settings.warned_of_missing_library()
    if not first_time("no CPU library"):
        return
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusednorm", "torch"):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(
        f"fusednorm's CPU kernels are not used: {registry.unavailable_reason('cpu')}. Torch's own operators serve "
        "calls on CPU tensors instead. FUSEDNORM_PROVIDER=torch in the environment asks for them and ends "
        "this warning.",
        UserWarning,
        stacklevel=depth,
    )
