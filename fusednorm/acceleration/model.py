"""``accelerate(model)`` and ``restore(model)``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .._checks import check_flag
from ..autograd.linear import gains_by_onednn
from ..modules._fusible import class_path
from . import handover, layers, recognise, source, steps, swap
from .example import Example, Mismatch, check_batch
from .links import Links
from .methods import methods
from .patterns import Finder, Found
from .report import COMPILED, LINEARS, WEIGHTS, WITHOUT_FLOAT64, Entry, Report
from .tree import Tree

_OPTIONS = ("norms", "residual", "feed_forward", "attention", "layers", "linear")


class Change(NamedTuple):
    """One change of one module, not yet made."""

    path: str
    apply: Callable[[], Any]


def accelerate(
    model: nn.Module,
    *,
    norms: bool = True,
    residual: bool = True,
    feed_forward: bool = True,
    attention: bool = True,
    layers: bool = True,
    linear: bool = True,
    dry_run: bool = False,
    example: Any = None,
) -> Report:
    r"""Replace norms, residual sums, activations and attention of one model by fused operators.

    .. math:: \mathrm{norm}(r + \mathrm{dropout}(W x + b)) \to \mathrm{add\_layer\_norm}(W x, r, x\_bias = b), \qquad
              \mathrm{act}(W x + b) \to \mathrm{bias\_act\_dropout}(W x, b)

    Code, parameters and ``state_dict`` stay. Only this instance changes: modules get subclasses of their classes, so
    ``isinstance``, hooks, optimizers, tied weights and checkpoints stay as they are. Residual sums are found in the
    source of each block's ``forward``. What does not match is left, and the report says why. :func:`restore` undoes
    everything.

    Under ``torch.compile`` and ``torch.export``, the rewritten methods run the original operations: the compiler fuses
    them itself.

    Args:
        model: any module, on any device and of any dtype, before it is compiled or wrapped for several devices.
        norms: swap ``nn.LayerNorm``, ``nn.RMSNorm``, and what computes the same; fuse scales and shifts after them.
        residual: fuse a sum with the norm that reads it next, and with bias, dropout, layer scale, gate and drop path.
        feed_forward: fuse the bias of a linear layer, the activation after it and dropout.
        attention: give Hugging Face models the attention of :mod:`fusednorm.integrations.transformers`.
        layers: swap ``nn.MultiheadAttention`` and the Transformer classes of ``torch.nn``.
        linear: swap each ``nn.Linear`` in float32 whose product another CPU library was measured to compute faster than
            the one that torch takes. So far that is so on AMD's processors with AVX-512.
        dry_run: change nothing, and report what would change.
        example: a batch: a dict of keywords, a tuple of arguments, or one tensor. Outputs and gradients in eval mode
            are compared before and after, with their distance from float64.

    Returns:
        A :class:`Report`. ``print(report)`` shows a table.

    Raises:
        TypeError: `model` is no module, or an option no bool.
        ValueError: the model is compiled, scripted, or wrapped by DDP or FSDP.
        RuntimeError: with `example`: results differ. Everything was undone, and the message names the module.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        >>> report = fusednorm.accelerate(layer, example=torch.randn(2, 5, 8))
        >>> isinstance(layer, fusednorm.TransformerEncoderLayer)
        True
        >>> fusednorm.restore(layer)
        >>> type(layer) is torch.nn.TransformerEncoderLayer
        True
    """
    given = dict(zip(_OPTIONS, (norms, residual, feed_forward, attention, layers, linear), strict=True))
    options = {name: check_flag(name, value) for name, value in given.items()}
    dry_run = check_flag("dry_run", dry_run)
    _check(model, "accelerate")
    batch = None if example is None else check_batch(example)
    accelerated = any(map(swap.is_swapped, model.modules())) or _attention_is_switched(model)
    if accelerated and dry_run:
        raise ValueError("dry_run: the model is accelerated already; call fusednorm.restore(model) first")
    if accelerated:
        restore(model)
    before = None if batch is None or dry_run else Example(model, batch)
    report, changes, readers = _Analysis(model, options, dry_run).run()
    if dry_run:
        return report
    try:
        for change in changes:
            change.apply()
        _sources(model, report)
        if before is not None:
            if before.exact is None:
                report.notes.append(WITHOUT_FLOAT64)
            _compare(model, before, report, changes, readers)
    except BaseException:
        restore(model)
        raise
    return report


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every module has its own class and ``forward`` again. Parameters are not touched.

    Args:
        model: a model, accelerated or not, or a copy of an accelerated one.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model is compiled, scripted, or wrapped by DDP or FSDP.

    Example:
        >>> norm = torch.nn.LayerNorm(8)
        >>> report = fusednorm.accelerate(norm)
        >>> fusednorm.restore(norm)
        >>> type(norm) is torch.nn.LayerNorm
        True
    """
    _check(model, "restore")
    for module in model.modules():
        swap.restore(module)
    if _attention_is_switched(model):
        sys.modules["fusednorm.integrations.transformers"].restore_attention(model)


def _attention_is_switched(model: nn.Module) -> bool:
    integration = sys.modules.get("fusednorm.integrations.transformers")
    return integration is not None and integration.is_switched(model)


def _check(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        where = f"model{'.' + path if path else ''}"
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(f"{where}: is wrapped for several devices; {name} before wrapping")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where}: is scripted; {name} the original module")
        if "OptimizedModule" in kinds or module._compiled_call_impl is not None:
            raise ValueError(f"{where}: is compiled; {name} first, then compile")
        if swap.is_changed_since(module):
            kind = class_path(type(module))
            raise ValueError(f"{where}: was given the class {kind} after accelerate; undo that first")
        for key, parameter in module._parameters.items():
            if parameter is not None and "DTensor" in {kind.__name__ for kind in type(parameter).__mro__}:
                raise ValueError(f"{where}.{key}: is sharded over several devices; {name} before sharding")


def _sources(model: nn.Module, report: Report) -> None:
    for path, module in model.named_modules():
        texts = swap.texts(module)
        if texts:
            report._sources[path] = texts


def _compare(model: nn.Module, before: Example, report: Report, changes: list[Change], readers: dict[int, str]) -> None:
    try:
        report.savings = before.compare(model, readers)
    except Mismatch as difference:
        culprit = "no module alone, only all together"
        for change in changes:
            restore(model)
            change.apply()
            try:
                before.compare(model, readers)
            except Mismatch:
                culprit = f"module {change.path!r} ({type(model.get_submodule(change.path)).__name__})"
                break
        restore(model)
        raise RuntimeError(
            f"example: {difference}, first by {culprit}. Everything was undone. Leave that kind of change out by its "
            "option, such as residual=False"
        ) from None


class _Analysis:
    """Looks at every module once, and lists the changes."""

    def __init__(self, model: nn.Module, options: dict[str, bool], dry_run: bool) -> None:
        self.model, self.options = model, options
        self.report = Report(class_path(type(model)), dry_run)
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.forms: dict[int, handover.NormForm] = {}
        self.changes: list[Change] = []
        self.norm_changes: dict[int, Change] = {}
        self.kept: dict[int, list[Tree]] = {}
        self.kinds: dict[int, str | None] = {}  # of steps
        self.names: dict[int, str | None] = {}  # of activations
        self.inside: set[int] = set()  # modules of layers that become ours, or are

    def run(self) -> tuple[Report, list[Change], dict[int, str]]:
        if self.options["layers"]:
            self._layers()
        self._norms()
        if self.options["norms"] or self.options["residual"] or self.options["feed_forward"]:
            self._methods()
        self.changes = [*self.norm_changes.values(), *self.changes]
        if self.options["attention"]:
            self._attention()
        if self.options["linear"]:
            self._linears()
        if any(entry.kind in ("norm", "modulation", "residual", "feed_forward") for entry in self.report.fused):
            self.report.notes.append(COMPILED)
        if any(entry.kind == "attention" for entry in self.report.fused):
            self.report.notes.append(WEIGHTS)
        order = {path: i for i, path in enumerate(self.paths.values())}
        self.report.entries.sort(key=lambda entry: order.get(entry.path, len(order)))
        return self.report, self.changes, {key: self.paths[key] for key in self.forms}

    def _add(self, path: str, kind: str, what: str, into: str = "", reason: str = "") -> None:
        self.report.entries.append(Entry(path, kind, what, into, reason))

    def _layers(self) -> None:
        for path, module in self.model.named_modules():
            reason = layers.why_left(module)
            if reason is None:
                continue
            if not reason:
                self.inside |= {id(part) for part in module.modules()}
                self.changes.append(Change(path, functools.partial(layers.convert, module)))
            into = class_path(layers.OURS[type(module)]) if not reason else ""
            self._add(path, "layer", class_path(type(module)), into, reason)

    def _norms(self) -> None:
        ours = tuple(layers.OURS.values())
        for module in self.model.modules():
            if isinstance(module, ours):
                self.inside |= {id(part) for part in module.modules()}
        for path, module in self.model.named_modules():
            if id(module) in self.inside or not recognise.may_be_norm(module):
                continue
            form, reason = recognise.norm_form(module)
            if form is not None:
                self.forms[id(module)] = form
                if self.options["norms"]:
                    self._swap(module)
            if self.options["norms"]:
                name = "fusednorm.rms_norm" if form is not None and form.rms else "fusednorm.layer_norm"
                self._add(path, "norm", class_path(type(module)), "" if reason else name, reason)

    def _swap(self, module: nn.Module) -> None:
        if id(module) in self.norm_changes:
            return
        change = functools.partial(swap.swap_norm, module, self.forms[id(module)])
        self.norm_changes[id(module)] = Change(self.paths[id(module)], change)

    def _linears(self) -> None:
        """They are no entries of the report: nothing is fused."""
        found = [
            (path, module)
            for path, module in self.model.named_modules()
            if type(module) is nn.Linear and id(module) not in self.inside and gains_by_onednn(module.weight)
        ]
        self.changes += [Change(path, functools.partial(swap.swap_linear, module)) for path, module in found]
        if found:
            self.report.notes.append(f"{len(found)} {LINEARS}")

    def _form(self, module: Any) -> handover.NormForm | None:
        return self.forms.get(id(module))

    def _is_norm(self, module: Any) -> bool:
        return self._form(module) is not None

    def _kind(self, module: Any) -> str | None:
        if not isinstance(module, nn.Module):
            return None
        if id(module) not in self.kinds:
            self.kinds[id(module)] = recognise.step_kind(module)
            self._mark(module, self.kinds[id(module)])
        return self.kinds[id(module)]

    def _activation(self, activation: Any) -> str | None:
        if not isinstance(activation, nn.Module) or id(activation) not in self.paths:  # nothing global is marked
            return steps.activation_name(activation)
        if id(activation) not in self.names:
            self.names[id(activation)] = recognise.activation_name(activation)
            self._mark(activation, self.names[id(activation)])
        return self.names[id(activation)]

    def _mark(self, module: nn.Module, computes: str | None) -> None:
        if computes is not None and not type(module).__module__.startswith("torch."):
            self.changes.append(Change(self.paths[id(module)], functools.partial(steps.mark, module, computes)))

    def _trees(self, module: nn.Module) -> list[Tree]:
        """The methods of a module that may hold something to fuse: forward, and those it calls on self."""
        known = self.kept.get(id(module))
        if known is None:
            known = self.kept[id(module)] = []
            if id(module) not in self.inside and not type(module).__module__.startswith(("torch.", "fusednorm.")):
                try:
                    known += methods(module)
                except source.Unreadable as reason:
                    if any(isinstance(child, nn.Linear) or self._is_norm(child) for child in module.children()):
                        path = self.paths[id(module)]
                        self._add(path, "residual", class_path(type(module)), reason=str(reason))
        return known

    def _methods(self) -> None:
        following: dict[int, Any] = {}
        links = Links(self._trees, self._is_norm)
        if self.options["residual"]:
            for module in self.model.modules():
                for block, norm in links.of(module):
                    if following.setdefault(id(block), norm) is not norm:
                        following[id(block)] = None  # called in two places
        for path, module in self.model.named_modules():
            found: dict[str, tuple[source.Method, Found]] = {}
            norm = following.get(id(module))
            returns = False
            for tree in self._trees(module):
                main = tree.name == "forward"
                finder = Finder(
                    tree, self._form, links.consumer, self._kind, self._activation, norm if main else None,
                    self.options["norms"], self.options["residual"], self.options["feed_forward"],
                )  # fmt: skip
                sites = finder.run()
                returns |= main and sites.returns_sum
                for site in sites.sites:
                    self._add(path, site.kind, site.what, site.into, site.reason)
                    if not site.reason:
                        for module_norm in site.norms:
                            self._swap(module_norm)
                if sites.replaced:
                    found[tree.name] = (tree.method, sites)
            if found:
                self.changes.append(Change(path, functools.partial(swap.rewrite, module, found)))
            if returns and norm is not None:
                self._swap(norm)
                self.changes.append(Change(path, functools.partial(_link, module, norm)))

    def _attention(self) -> None:
        transformers = sys.modules.get("transformers")
        base = getattr(transformers, "PreTrainedModel", None)
        if base is None or not any(isinstance(module, base) for module in self.model.modules()):
            return
        try:
            from ..integrations import transformers as integration
        except ImportError as error:  # an older transformers
            self._add("", "attention", class_path(type(self.model)), reason=str(error))
            return
        switches = integration.switch_attention(self.model, dry_run=True)
        for path, ok, reason in switches:
            module = self.model.get_submodule(path)
            into = "fusednorm.scaled_dot_product_attention" if ok else ""
            self._add(path, "attention", class_path(type(module)), into, "" if ok else reason)
        if any(switch.fused for switch in switches):
            self.changes.append(Change("", functools.partial(integration.switch_attention, self.model)))


def _link(block: nn.Module, norm: nn.Module) -> None:
    block.__dict__[handover.NEXT] = handover.Next(norm)
