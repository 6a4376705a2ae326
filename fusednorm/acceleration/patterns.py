"""Finds what can be fused in a method: sums whose next reader is a norm, and activations of linear layers."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..modules._fusible import class_path
from .handover import NormForm, without_hooks
from .modulations import Modulation, Modulations, values_before, vectors_of
from .products import Gating, gate_step, gating, gelu, helper, is_pure
from .reader import RETURNED, Consumer, Reader, short
from .sizes import Sizes
from .source import Method
from .steps import LINEAR, is_light
from .tree import (
    SIMPLE,
    UNKNOWN,
    Place,
    Tree,
    assigned,
    expressions,
    first_assigned,
    is_sum,
    reads,
    without_calls,
)


class Site(NamedTuple):
    """One thing seen in a method."""

    kind: str  # "modulation", "residual" or "feed_forward"
    what: str  # the source
    into: str
    reason: str = ""  # why it is left as it is, or nothing
    norms: tuple[Any, ...] = ()  # the modules that the change needs


class Found(NamedTuple):
    sites: list[Site]
    replaced: dict[int, ast.expr]  # by id of the old node
    removed: set[int]
    inserted: dict[int, ast.stmt]  # by id of the old statement before
    returns_sum: bool
    large_only: bool  # whether all of it is left to torch on small tensors


class Finder:
    """Collects the changes of one method of one instance.

    Args:
        tree: the method.
        form: the form of a norm that can take a sum's normed tensor, or None.
        consumer: the norm by which a module reads its first argument, as in :class:`Reader`.
        kind: the kind of a module that may be a step of a branch, or None.
        activation: the name of an activation module or function, or None.
        following: the norm after this block, or None where it is not known.
    """

    def __init__(
        self,
        tree: Tree,
        form: Callable[[Any], NormForm | None],
        consumer: Consumer,
        kind: Callable[[Any], str | None],
        activation: Callable[[Any], str | None],
        following: Any,
        norms: bool = True,
        residual: bool = True,
        feed_forward: bool = True,
    ) -> None:
        self.tree, self.form, self.activation, self.following = tree, form, activation, following
        self.kind, self.residual, self.feed_forward = kind, residual, feed_forward
        self.reader = Reader(tree, consumer)
        children = list(tree.module.children())
        self.has_linear = any(kind(child) in LINEAR for child in children)
        self.is_block = self.has_linear or any(map(self.is_norm, children))
        self.sites: list[Site] = []
        self.modulations = Modulations(tree, self.is_norm if norms else lambda module: False)
        self.replaced: dict[int, ast.expr] = dict(self.modulations.replaced)
        self.removed: set[int] = set(self.modulations.removed)
        self.used: set[int] = set()  # steps that a sum has taken
        self.returns_sum = False
        self.large_only = True

    def is_norm(self, module: Any) -> bool:
        return self.form(module) is not None

    @functools.cached_property
    def sizes(self) -> Sizes:
        return Sizes(self.tree, {id(part) for part in self.tree.module.modules() if self.is_norm(part)})

    def run(self) -> Found:
        for found in self.modulations.found:
            into = "" if found.reason else self.modulations.into(found)
            self.sites.append(Site("modulation", ast.unparse(found.node), into, found.reason, found.norms))
            self.large_only &= bool(found.reason) or self.sizes.read_by(found.norms)
        if self.residual:
            for place in self.tree.places:
                for node in expressions(place.statement):
                    if id(node) in self.modulations.parts:
                        continue
                    if isinstance(node, ast.BinOp) and is_sum(node):
                        self._sum(node, place)
                    else:
                        self._sum_in_other_words(node, place)
                if self.is_block and isinstance(place.statement, ast.AugAssign) and is_sum(place.statement):
                    self._left(place.statement, "it adds in place")
        if self.feed_forward:
            for place in self.tree.places:
                for node in expressions(place.statement):
                    if isinstance(node, ast.Call) and id(node) not in self.replaced:
                        self._activation(node, place)
        inserted = self.modulations.inserted
        return Found(self.sites, self.replaced, self.removed, inserted, self.returns_sum, self.large_only)

    # --- sums

    def _sum(self, node: ast.BinOp, place: Place) -> None:
        around = self.tree.parents.get(id(node))
        module, norm, reason = None, None, ""
        if isinstance(around, ast.Call) and self.is_norm(self.tree.called(around)):
            module, norm = self.tree.called(around), around.func
        elif assigned(place.statement) is not None and place.statement.value is node:  # type: ignore[attr-defined]
            module, reason = self.reader.after(place, {assigned(place.statement) or ""})
            norm = None if module is None else self.tree.expression(module)
            reason = reason or ("" if norm is not None else "the norm that reads it is in no module of this one")
        elif isinstance(place.statement, ast.Return) and place.statement.value is node:
            reason = RETURNED
        else:
            if self._calls_module(node):
                self._left(node, f"`{short(place.statement)}` reads it before a norm does")
            return
        text = ast.unparse(node)
        if reason == RETURNED:
            self.returns_sum = True
            if self.following is not None:
                norm = ast.Call(helper("following"), [ast.Name(self.tree.self_name, ast.Load())], [])
                into = self._fuse(node, place, norm, self.following)
                self.sites.append(Site("residual", text, f"{into}, with the norm of the next block"))
                return
            reason = "the method returns it, and the norm that reads it then could not be seen"
        if norm is not None and module is not None and not without_hooks(module):
            reason = f"{ast.unparse(norm)} has hooks"
        if norm is None or module is None or reason:
            self._left(node, reason)
            return
        modulation = self.modulations.of(module, place)
        into = self._fuse(node, place, norm, module, modulation)
        into += f", with {ast.unparse(norm)}" + (" and its modulation" if modulation is not None else "")
        self.sites.append(Site("residual", text, into, norms=(module,)))

    def _sum_in_other_words(self, node: ast.AST, place: Place) -> None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("add", "add_"):
            torchs = self.tree.method.global_value(node.func) is torch.add
            if self._calls_module(node) and (torchs or self.tree.resolve(node.func) is UNKNOWN):
                self._left(node, f"it is no `a + b` but a call of {node.func.attr}")

    def _of_module(self, node: ast.AST) -> bool:
        """Whether a value comes from a module of this one, as far as one assignment back."""
        if self._calls_module(node):
            return True
        every = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        names = {name for name in every if reads(self.tree, node, {name})}
        statements = (place.statement for place in self.tree.places)
        found = (s for s in statements if isinstance(s, SIMPLE) and first_assigned(s) in names)
        return any(self._calls_module(statement) for statement in found)

    def _left(self, node: ast.AST, reason: str) -> None:
        if not self._of_module(node):
            return  # of positions, masks or logits
        self.sites.append(Site("residual", ast.unparse(node), "", reason))

    def _calls_module(self, node: ast.AST) -> bool:
        calls = (n for n in ast.walk(node) if isinstance(n, ast.Call))
        return any(isinstance(self.tree.resolve(call.func), nn.Module) for call in calls)

    def _fuse(
        self, node: ast.BinOp, place: Place, norm: ast.expr, module: Any, modulation: Modulation | None = None
    ) -> str:
        movable = self.tree.alone(node, place) and self.tree.comes_first(node, place)
        base, steps, consumed = self._steps(node.right, place, movable and isinstance(node.left, ast.Name))
        residual, branch_first = node.left, False
        gates = self._gates(base, place) if movable and not steps else []
        left = self._steps(node.left, place, movable)
        left_gates = self._gates(left[0], place) if movable and not left[1] else []
        if not steps and not gates and (left[1] or left_gates) and without_calls(node.right):
            base, steps, consumed = left
            gates = left_gates
            residual, branch_first = node.right, True
        for value, parts in gates:
            self.replaced[id(value)] = ast.Call(helper("gated"), [parts.branch, gate_step(value, parts)], [])
        self.removed |= {id(p.statement) for p in consumed}
        self.used |= {id(step) for step in steps}
        operands = [ast.keyword("residual", residual), ast.keyword("branch", base)]
        keywords = [*(reversed(operands) if branch_first else operands), ast.keyword("norm", norm)]
        if steps:
            keywords.append(ast.keyword("steps", ast.Tuple(steps, ast.Load())))
        if branch_first:
            keywords.append(ast.keyword("branch_first", ast.Constant(True)))
        if modulation is not None:
            keywords.append(ast.keyword("modulation", vectors_of(modulation)))
        self.replaced[id(node)] = ast.Call(helper("add"), [], keywords)
        kinds = ["gate"] * bool(gates) + [self._kind(step) for step in steps]
        light = is_light(self.form(module).rms, kinds[-1] if kinds else None)  # type: ignore[union-attr]
        self.large_only &= light and (self.sizes.keeps(node.left) or self.sizes.keeps(node.right))
        names = {"linear": "bias", "conv1d": "bias", "layer_scale": "layer scale", "drop_path": "drop path"}
        return " + ".join([names.get(k, k) for k in kinds if k != "identity"] + ["sum"])

    def _steps(self, node: ast.expr, place: Place, movable: bool) -> tuple[ast.expr, list[ast.expr], list[Place]]:
        """(what the first step takes, the steps in running order, statements that they stood in)."""
        steps: list[ast.expr] = []
        consumed: list[Place] = []
        while True:
            if isinstance(node, ast.Name) and movable:
                found = self._moved(node.id, place)
                if found is None or self._step(found[0]) is None:
                    break
                node, place = found
                consumed.append(place)
            step = self._step(node)
            if step is None:
                break
            steps.insert(0, step)
            parts = self._gating(node)
            node = node.args[0] if parts is None else parts.branch  # type: ignore[attr-defined]
            if self._kind(step) in LINEAR:
                break
        return node, steps, consumed

    def _gating(self, node: ast.AST) -> Gating | None:
        if id(node) in self.modulations.parts:
            return None
        return gating(node, lambda part: is_pure(self.tree, part), self._of_module)

    def _gates(self, branch: ast.expr, place: Place) -> list[tuple[ast.expr, Gating]]:
        """The products with gates by which the ``if`` before a sum may end, where the sum alone reads them."""
        found = ((value, self._gating(value)) for value in values_before(self.tree, branch, place))
        return [(value, parts) for value, parts in found if parts is not None]

    def _moved(self, name: str, place: Place) -> tuple[ast.expr, Place] | None:
        """The definition of a variable, where it may be evaluated later: it assigns no other variable."""
        found = self.tree.definition(name, place)
        return None if found is None or any(isinstance(n, ast.NamedExpr) for n in ast.walk(found[0])) else found

    def _step(self, node: ast.expr) -> ast.expr | None:
        """The module, ``fused.Dropout(...)`` or ``fused.Gate(...)`` of what the operator can do, else None."""
        parts = self._gating(node)
        if parts is not None:
            return gate_step(node, parts)
        module = self.tree.called(node)
        if isinstance(module, nn.Module):
            return node.func if self.kind(module) is not None else None  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call) or not node.args or isinstance(node.args[0], ast.Starred):
            return None
        if self.tree.method.global_value(node.func) not in (F.dropout, torch.dropout):
            return None
        names = ["p", "training"] if self.tree.method.global_value(node.func) is F.dropout else ["p", "train"]
        values = dict(zip(names, node.args[1:], strict=False))
        values.update({k.arg: k.value for k in node.keywords if k.arg})
        if len(values) != len(node.args) - 1 + len(node.keywords) or not set(values) <= set(names):
            return None
        keywords = [ast.keyword("training" if name == "train" else name, value) for name, value in values.items()]
        return ast.Call(helper("Dropout"), [], keywords)

    def _kind(self, step: ast.expr) -> str:
        if isinstance(step, ast.Call):
            return "gate" if step.func.attr == "Gate" else "dropout"  # type: ignore[attr-defined]
        return self.kind(self.tree.resolve(step)) or ""

    # --- activations

    def _activation(self, node: ast.Call, place: Place) -> None:
        name, function, argument = self._activation_call(node)
        if name is None or argument is None:
            self._unknown_activation(node, place)
            return
        consumed: list[Place] = []
        linear = argument
        if isinstance(linear, ast.Name) and self.tree.alone(node, place) and self.tree.comes_first(node, place):
            found = self._moved(linear.id, place)
            if found is not None:
                linear, consumed = found[0], [found[1]]
        module = self.tree.called(linear)
        outer, dropout, dropped = self._dropout_after(node, place)
        reason = self._not_linear(linear, module)
        if not reason and module.bias is None and dropout is None:
            reason = f"{ast.unparse(linear.func)} has no bias, so there is nothing to fuse"  # type: ignore[attr-defined]
        if reason:
            if self.has_linear:
                self.sites.append(Site("feed_forward", ast.unparse(node), "", reason))
            return
        text = ast.unparse(linear) + " -> " + ast.unparse(function) + (" -> dropout" if dropout else "")
        keywords = [
            ast.keyword("x", linear.args[0]),  # type: ignore[attr-defined]
            ast.keyword("linear", linear.func),  # type: ignore[attr-defined]
            ast.keyword("activation", function),
            ast.keyword("name", ast.Constant(name)),
        ]
        if dropout is not None:
            keywords.append(ast.keyword("dropout", dropout))
        self.replaced[id(outer)] = ast.Call(helper("activate"), [], keywords)
        self.removed |= {id(p.statement) for p in (*consumed, *dropped)}
        into = f"bias + {name}" + (" + dropout" if dropout else "")
        self.sites.append(Site("feed_forward", text, into))
        self.large_only = False

    def _unknown_activation(self, node: ast.Call, place: Place) -> None:
        module = self.tree.called(node)
        if not isinstance(module, nn.Module) or self.kind(module) is not None or self.is_norm(module):
            return
        linear: ast.expr = node.args[0]
        if isinstance(linear, ast.Name):
            linear = (self.tree.definition(linear.id, place) or (linear,))[0]
        leaf = not module._modules and not module._parameters
        if leaf and not self._not_linear(linear, self.tree.called(linear)):
            reason = f"{class_path(type(module))} is no activation of bias_act_dropout"
            self.sites.append(Site("feed_forward", ast.unparse(node), "", reason))

    def _not_linear(self, node: ast.expr, module: Any) -> str:
        if not isinstance(module, nn.Module):
            return "its input is not that of a linear layer"
        name = ast.unparse(node.func)  # type: ignore[attr-defined]
        if self.kind(module) not in LINEAR:
            return f"{name} is {class_path(type(module))}, no linear layer"
        return "" if without_hooks(module) else f"{name} has hooks"

    def _activation_call(self, node: ast.Call) -> tuple[str | None, ast.expr, ast.expr | None]:
        module = self.tree.called(node)
        if module is not UNKNOWN:
            return self.activation(module), node.func, node.args[0]
        if len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
            return None, node.func, None
        function = self.tree.method.global_value(node.func)
        if function is F.gelu and node.keywords:
            name, called = gelu(self.tree, node)
            return name, called, None if name is None else node.args[0]
        if node.keywords or function is None:
            return None, node.func, None
        return self.activation(function), node.func, node.args[0]

    def _dropout_after(self, node: ast.Call, place: Place) -> tuple[ast.expr, ast.expr | None, list[Place]]:
        """(the outermost expression, the dropout, statements it stood in), where a dropout takes the activation."""
        around = self.tree.parents.get(id(node))
        if isinstance(around, ast.Call) and around.args and around.args[0] is node:
            step = self._free_dropout(around)
            if step is not None:
                return around, step, []
        after = place.next()
        name = assigned(place.statement)
        if after is not None and name is not None and place.statement.value is node:  # type: ignore[attr-defined]
            value = getattr(after.statement, "value", None)
            step = None if value is None or assigned(after.statement) != name else self._free_dropout(value)
            taken = None if step is None else value.args[0]  # type: ignore[union-attr]
            free = id(after.statement) not in self.removed and self.tree.definition(name, after) is not None
            if isinstance(taken, ast.Name) and taken.id == name and free:
                return node, step, [after]
        return node, None, []

    def _free_dropout(self, node: ast.expr) -> ast.expr | None:
        step = self._step(node)
        return None if step is None or id(step) in self.used or self._kind(step) != "dropout" else step


class _Apply(ast.NodeTransformer):
    def __init__(self, replaced: dict[int, ast.expr], removed: set[int], inserted: dict[int, ast.stmt]) -> None:
        self.replaced, self.removed, self.inserted = replaced, removed, inserted

    def visit(self, node: ast.AST) -> Any:
        if id(node) in self.removed:
            return None
        visited = self.generic_visit(self.replaced.get(id(node), node))
        return [visited, self.inserted[id(node)]] if id(node) in self.inserted else visited


def apply(method: Method, found: Found) -> ast.FunctionDef:
    """The changed tree. The method's own stays as it is."""
    memo: dict[int, Any] = {}
    tree = copy.deepcopy(method.tree, memo)
    replaced = {id(memo[old]): copy.deepcopy(new, memo) for old, new in found.replaced.items()}
    removed = {id(memo[old]) for old in found.removed}
    inserted = {id(memo[old]): new for old, new in found.inserted.items()}
    return ast.fix_missing_locations(_Apply(replaced, removed, inserted).visit(tree))
