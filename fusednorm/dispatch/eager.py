"""Plain eager calls: tensors of torch's own class, and no compiler, tracer, transform, mode or autocast around them.

All plain eager calls of one signature are served alike. So their plan is looked up among the settings'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

from .. import _options
from .._options import Inputs, Options
from .._transforms import capturing
from . import registry, settings
from .settings import Plan

TensorGuards: Any  # torch's own may be missing from a torch to come: every call is then resolved anew
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

TENSORS = frozenset({Tensor, torch.nn.Parameter})
# Types of a plain call's arguments. A subclass of Tensor intercepts operators: the dispatcher has to show it the op.
PLAIN = TENSORS | {type(None), bool, int, float, str, list, torch.dtype}
MAX_PLANS = 4096
MAX_ALIKE = 8  # plans of one key: their calls differ in dtypes, strides, gradients wanted or a later tensor's shape

_INT = frozenset({int})
_is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_autocast_active = torch._C._is_any_autocast_enabled
_grad_enabled = torch.is_grad_enabled


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part. Nobody has one who has not imported it."""
    module = None if type(x) in TENSORS else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def plain_on_cpu(x: Tensor) -> bool:
    """Whether torch's own operator may serve a call on the CPU at once; it handles modes and tracing itself.

    One expression of look-ups bound beforehand: all of it is paid on a call that itself takes 7 microseconds.
    """
    return (
        x.is_cpu
        and not x.is_nested
        and not _functorch_active()
        and forward_ad._current_level < 0
        and not _is_compiling()
        and (type(x) in TENSORS or not is_sharded(x))
    )


# What the plan of a plain eager call depends on: the plans among which it stands, what is no tensor, the tensors, and
# where among them each stands first.
Signature = tuple[settings.Plans, tuple[Any, ...], Sequence[Tensor | None], list[int]]


def find(inputs: Sequence[Tensor | None], *rest: Any) -> tuple[Plan | None, Signature | None]:
    """The plan that was kept for calls like this one, and what `keep` takes; None for what is not there.

    One guard of torch.compile's looks at all tensors: at class, dtype, sizes, strides, device and requires_grad. It
    looks at the thread's dispatch keys too, which transforms, tracing and autocast change.

    `rest` is what is no tensor, the function's name first. Values that compare equal must mean the same: the caller
    has looked at types, since True equals 1. It does not call while torch.compile traces, when no plan is kept. Each
    look-up counts, because eager's own call takes 7 microseconds.
    """
    if forward_ad._current_level >= 0 or _dispatch_modes():  # guards do not see those of fake tensors
        return None, None
    try:
        key = (rest, _grad_enabled(), inputs[0].shape, *map(type, inputs))  # type: ignore[union-attr]
        plans = settings.current.plans
        for guard, there, plan in plans.get(key, ()):
            if guard(*there(inputs)):
                return plan, None
    except (AttributeError, LookupError, RuntimeError, TypeError):  # nested tensors; what is no tensor at all
        return None, None
    places = [i for i, t in enumerate(inputs) if t is not None]
    tensors: list[Any] = [inputs[i] for i in places]
    names = [*map(id, tensors)]
    firsts = [*map(names.index, names)]
    if firsts != [*range(len(firsts))]:  # a guard takes no tensor twice
        key, places = (*key, *firsts), [place for i, place in enumerate(places) if firsts[i] == i]
        for guard, there, plan in plans.get(key, ()):
            if guard(*there(inputs)):
                return plan, None
    if not TENSORS.issuperset(map(type, tensors)) or _watched() or is_functorch_wrapped_tensor(tensors[0]):
        return None, None
    return None, (plans, key, inputs, places)


def _watched() -> bool:
    """Whether somebody else takes part in what the thread computes, besides modes, which `find` asks for first."""
    return bool(_functorch_active() or _tracing_state() is not None or _autocast_active() or settings.current.listeners)


def unwatched() -> bool:
    """Whether nobody takes part in what the thread computes: no compiler, transform, mode, tracer or autocast."""
    return not (_is_compiling() or forward_ad._current_level >= 0 or _dispatch_modes() or _watched())


def sizes(normalized_shape: Any) -> Any:
    """A ``normalized_shape`` for a signature: an int or a tuple of ints. Else None, which no signature has."""
    if _is_compiling():
        return None
    if type(normalized_shape) is int:
        return normalized_shape
    if isinstance(normalized_shape, (tuple, list)) and _INT.issuperset(map(type, normalized_shape)):
        return tuple(normalized_shape)
    return None


def keep(signature: Signature | None, plan: Plan) -> None:
    """Remember the plan of a signature; not while a CUDA graph is captured, when no GPU can be tested."""
    if signature is None or TensorGuards is None:
        return
    plans, key, inputs, places = signature
    tensors: list[Any] = [inputs[i] for i in places]
    if tensors[0].is_cuda and capturing(tensors[0].get_device()):
        return
    if len(plans) >= MAX_PLANS:
        plans.clear()
    shapes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    guard = TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
    there = itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))
    plans[key] = ((guard, there, plan), *plans.get(key, ())[: MAX_ALIKE - 1])


def differentiated(*cotangents: Tensor | None) -> bool:
    """Whether a backward is differentiated or vmapped itself: it is then to be composed of torch's operators.

    Never while torch.compile traces, because a graph keeps the operator. `is_grads_batched` hides a batch from kernels.
    """
    if _is_compiling():
        return False
    if _grad_enabled() or _functorch_active() or forward_ad._current_level >= 0:
        return True
    return any(t is not None and (is_batchedtensor(t) or is_legacy_batchedtensor(t)) for t in cotangents)


def call(name: str, *args: Any, provider: str) -> Any:
    """Run an op: by the provider's function in a plain eager call, else through torch's dispatcher.

    `args` are those of the provider's function.
    """
    first = args[0]
    if isinstance(first, tuple):  # a forward: the options after its inputs hold no tensor
        intercepted, first = not PLAIN.issuperset(map(type, first)), first[0]
    else:
        intercepted = False
        for arg in args:
            if not PLAIN.issuperset(map(type, arg)) if isinstance(arg, tuple) else type(arg) not in PLAIN:
                intercepted = True
    if intercepted or _is_compiling() or _dispatch_modes() or first.is_meta:
        return getattr(torch.ops.fusednorm, name)(*_options.to_flat(name, args), provider)
    function = registry.functions.get((provider, name)) or registry.function(provider, name)
    return function(*args)


def runner(name: str, provider: str, inputs: Inputs, options: Options) -> Callable[[Inputs], Any]:
    """What runs a forward op for all calls like this one, as `call` does."""
    plain = PLAIN.issuperset(map(type, inputs)) and not (_is_compiling() or _dispatch_modes() or inputs[0].is_meta)
    if not plain:
        return lambda inputs: call(name, inputs, options, provider=provider)
    function = registry.function(provider, name)
    prepare = getattr(function, "prepare", None)
    return prepare(inputs, options) if prepare is not None else lambda inputs: function(inputs, options)


def forward(inputs: Any, options: Options, draw: Callable[..., Any], run: Callable[..., Any]) -> Any:
    """What a plan with a mask but without gradients does; `draw` adds a seed."""
    return run(draw(inputs, options))


def differentiable(
    inputs: Any,
    options: Options,
    draw: Callable[..., Any] | None,
    apply: Callable[..., Any],
    rest: tuple[Any, ...],
) -> Any:
    """What a plan with gradients does: it applies an autograd Function to the flat arguments."""
    return apply(*(inputs if draw is None else draw(inputs, options)), *options, *rest)


def recorded(name: str, inputs: Inputs, options: Options) -> Any:
    """A forward op of a program that may run elsewhere, which names a provider only where one is requested."""
    return getattr(torch.ops.fusednorm, name).recorded(*inputs, *options, settings.requested())
