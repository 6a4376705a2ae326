"""Changes one module instance by giving it a subclass of its class, and undoes that. Nothing global changes."""

from __future__ import annotations

import ast
import copyreg
import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autograd.linear import linear
from ..dispatch import settings
from ..modules import LayerNorm, RMSNorm
from ..norm import layer_norm
from . import fused, handover, patterns, source, steps
from .adaptive import PARAMETERS
from .handover import NormForm
from .steps import BASE

WAS = "_fusednorm_was"  # on instances of layers of torch.nn that became ours


class Rewritten(NamedTuple):
    """A method in another form."""

    name: str
    text: str  # of the new one
    before: str  # of the original
    large_only: bool = False  # whether the original is called for small inputs


class Plan(NamedTuple):
    """What is different in a generated class. It is pickled with an instance."""

    norm: NormForm | None = None
    linear: bool = False
    methods: tuple[Rewritten, ...] = ()


_torch_layer_norm = nn.LayerNorm.forward
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._get_tracing_state
_classes: weakref.WeakValueDictionary[tuple[type, Plan], type] = weakref.WeakValueDictionary()


def generated(base: type, plan: Plan, functions: dict[str, Any] | None = None) -> type:
    """The subclass of `base` for a plan, one for all instances; it has the name of `base`."""
    found = _classes.get((base, plan))
    if found is None:
        namespace: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__new__": _new,
            "__reduce_ex__": _reduce,
            BASE: base,
            "_fusednorm_plan": plan,
            **(functions or {}),
        }
        parent = base
        if plan.norm is not None:
            namespace |= {"_fusednorm_norm": plan.norm, "forward": _NORMS.get(base) or _norm_forward(base, plan.norm)}
            parent = {nn.LayerNorm: LayerNorm, nn.RMSNorm: RMSNorm}.get(base, base)
        if plan.linear:
            namespace["forward"] = _linear_forward
        found = _classes[base, plan] = type(base)(base.__name__, (parent,), namespace)
    return found


def _layer_norm_forward(self: Any, input: Tensor) -> Tensor:
    if not handover.waiting and getattr(input, "is_cpu", False) and not _is_compiling():
        # nothing was computed before: each step on the way counts
        if settings.current.use_torch_layer_norm:
            return _torch_layer_norm(self, input)
        own = self._parameters  # four times as fast as the attributes
        if "weight" not in own or "bias" not in own:  # parametrized
            return _torch_layer_norm(self, input)
        try:
            return layer_norm(input, self.normalized_shape, own["weight"], own["bias"], self.eps)
        except (TypeError, ValueError):  # what is wrong here is said as torch says it
            return _torch_layer_norm(self, input)
    return _own_forward(self, input, LayerNorm, nn.LayerNorm)


def _rms_norm_forward(self: Any, x: Tensor) -> Tensor:
    return _own_forward(self, x, RMSNorm, nn.RMSNorm)


def _own_forward(self: Any, x: Tensor, ours: Any, torchs: Any) -> Tensor:
    normed = handover.take(self, x)
    if normed is not None:
        return normed
    if torch.compiler.is_compiling():  # the compiler fuses torch's norm with what is around it
        return torchs.forward(self, x)
    try:
        return ours.forward(self, x)
    except (TypeError, ValueError):  # what is wrong here is said as torch says it
        return torchs.forward(self, x)


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    return linear(input, self.weight, self.bias)


_NORMS: dict[type, Any] = {nn.LayerNorm: _layer_norm_forward, nn.RMSNorm: _rms_norm_forward}


def _norm_forward(base: Any, form: NormForm) -> Any:
    """For a class of another library: ours where input and weight have one dtype, else its own forward."""
    original = base.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        x = given[0] if len(given) == 1 else None
        if type(x) is not Tensor or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        normed = handover.take(self, x)
        if normed is not None:
            return normed
        order = None
        if x.is_nested or not x.is_contiguous():
            order = _memory_order(x) if form.keeps_strides and not x.is_nested else ()
        weight, bias = form.parameters(self)
        if (
            order == ()
            or not x.is_floating_point()
            or (weight is not None and (weight.dtype != x.dtype or weight.shape != x.shape[-1:]))
            or (bias is not None and bias.dtype != x.dtype)
            or (form.float32_only and x.dtype != torch.float32)
            or handover.any_autocast()
        ):
            return original(self, *args, **kwargs)
        if order is None:
            return form(self, x)
        back = sorted(range(x.ndim), key=order.__getitem__)
        return form(self, x.permute(order)).permute(back)  # with the strides of x

    return forward


def _memory_order(x: Tensor) -> tuple[int, ...]:
    """The dimensions as they lie in memory, outermost first; () where there are gaps, or the last is not innermost."""
    strides = x.stride()
    order = tuple(sorted(range(x.ndim), key=lambda d: -strides[d]))
    return order if order[-1:] == (x.ndim - 1,) and x.permute(order).is_contiguous() else ()


def _new(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """A new instance is an original one. Without arguments it is an empty one, as nn.DataParallel asks for it."""
    made = next(c for c in cls.__mro__ if BASE in c.__dict__)
    return getattr(made, BASE)(*args, **kwargs) if args or kwargs else object.__new__(cls)


def _reduce(self: Any, protocol: Any) -> Any:
    """As for any module, but with the class made again from its base where the copy is made."""
    cls = type(self)
    made = next(c for c in cls.__mro__ if BASE in c.__dict__)
    reduced = getattr(made, BASE).__reduce_ex__(self, max(protocol, 2))
    if cls is not made or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return reduced
    return (_make, (getattr(made, BASE), made._fusednorm_plan), *reduced[2:])


def _make(base: type, plan: Plan) -> Any:
    """An empty instance, for pickle and copy. Where the class has other source now, it is the original one."""
    cls: Any = _classes.get((base, plan))
    if cls is None:
        try:
            cls = generated(base, plan, _methods(base, plan))
        except source.Unreadable as reason:
            warnings.warn(f"{base.__qualname__}: loaded as it was before accelerate(), since {reason}", stacklevel=2)
            cls = base
    return object.__new__(cls)


def _methods(base: type, plan: Plan) -> dict[str, Any]:
    made = {}
    for method in plan.methods:
        original = source.read(base, method.name)
        if original.text != method.before:
            raise source.Unreadable(f"the source of {method.name} is another now")
        tree = ast.parse(method.text).body[0]
        new = source.rebuild(original, tree)[0]  # type: ignore[arg-type]
        made[method.name] = _chosen(base, method, new)
    return made


def _for_large_inputs(new: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A method that is `new` where an argument is a large tensor, else `original`.

    For methods all of whose changes are left to torch on small tensors, and by the compiler.
    """

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling() or _is_tracing() is not None:
            return original(self, *args, **kwargs)
        if fused._listener is None:
            for value in (*args, *kwargs.values()):  # a loop here takes a third of the time of any()
                if type(value) in PARAMETERS and value.numel() >= fused._LARGE:
                    break
            else:
                return original(self, *args, **kwargs)
        return new(self, *args, **kwargs)

    return method


def _chosen(base: type, method: Rewritten, new: Any) -> Any:
    return _for_large_inputs(new, getattr(base, method.name)) if method.large_only else new


def swap_norm(module: nn.Module, form: NormForm) -> None:
    module.__class__ = generated(type(module), Plan(norm=form))


def swap_linear(module: nn.Module) -> None:
    module.__class__ = generated(type(module), Plan(linear=True))


def rewrite(module: nn.Module, found: dict[str, tuple[source.Method, patterns.Found]]) -> None:
    """Give a module the methods in their new form."""
    functions, methods = {}, []
    for name, (method, sites) in found.items():
        new, text = source.rebuild(method, patterns.apply(method, sites))
        methods.append(Rewritten(name, text, method.text, sites.large_only))
        functions[name] = _chosen(type(module), methods[-1], new)
    module.__class__ = generated(type(module), Plan(methods=tuple(methods)), functions)


def is_swapped(module: nn.Module) -> bool:
    return BASE in type(module).__dict__ or WAS in module.__dict__


def is_changed_since(module: nn.Module) -> bool:
    """Whether another library has derived a class from the generated one, as torch's parametrizations do."""
    return BASE not in type(module).__dict__ and hasattr(type(module), BASE)


def restore(module: nn.Module) -> None:
    """Give one instance its class back."""
    module.__dict__.pop(handover.NEXT, None)
    steps.unmark(module)
    was = module.__dict__.pop(WAS, None)
    if was is not None:
        module.__class__ = was
    elif BASE in type(module).__dict__:
        module.__class__ = type(module).__dict__[BASE]


def texts(module: nn.Module) -> dict[str, str]:
    """The source of each rewritten method of a module."""
    plan = getattr(type(module), "_fusednorm_plan", None)
    return {} if plan is None else {method.name: method.text for method in plan.methods}
