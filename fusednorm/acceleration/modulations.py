"""Finds modulations of norms in a method, and how a norm's value gets there."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from ..modules._fusible import class_path
from .products import function_of, helper, is_pure, modulated, reading
from .tree import SIMPLE, TRIES, UNKNOWN, Place, Tree, assigned, mentions, without_calls


class Modulation(NamedTuple):
    """A modulation in a method.

    Attributes:
        node: the expression.
        norms: the modules whose normed tensor it may take.
        vectors: scale, shift and whether both get a dimension after the first.
        reason: why it is left as it is, or nothing.
    """

    node: ast.expr
    norms: tuple[nn.Module, ...]
    vectors: tuple[ast.expr, ast.expr | None, bool]
    reason: str = ""


class Seen(NamedTuple):
    """A modulation before it is known how the norm's value gets there."""

    node: ast.expr  # what is replaced
    normed: ast.expr
    vectors: tuple[ast.expr, ast.expr | None, bool]
    value: ast.expr  # the whole, with a product that stood in the statement before
    reader: Place  # the statement of the node
    place: Place  # the statement that reads the normed value: that one, or the one before
    removed: tuple[ast.stmt, ...] = ()
    by: ast.expr | None = None  # the function that computes it


class Modulations:
    """The modulations of one method of one instance, and what takes their place.

    Args:
        tree: the method.
        is_norm: whether a module is a norm whose form is known.
    """

    def __init__(self, tree: Tree, is_norm: Callable[[Any], bool]) -> None:
        self.tree, self.is_norm = tree, is_norm
        self.found: list[Modulation] = []
        self.replaced: dict[int, ast.expr] = {}
        self.removed: set[int] = set()
        self.inserted: dict[int, ast.stmt] = {}  # by id of the statement before
        self.parts: set[int] = set()  # ids of all nodes of modulations
        seen = [s for place in tree.places for s in self._seen(place)]
        for each in sorted(seen, key=lambda s: s.vectors[1] is None):  # first those that add a shift
            if id(each.node) not in self.parts:
                self._decide(each)

    def of(self, norm: nn.Module, place: Place) -> Modulation | None:
        """The one of a norm that is called after a statement, where its vectors may be known there already."""
        line, own = place.statement.lineno, assigned(place.statement)
        for found in self.found:
            if found.reason or norm not in found.norms or found.node.lineno <= line:
                continue
            parts = [part for part in found.vectors[:2] if part is not None]
            names = {n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)}
            stored = (
                n.lineno
                for n in ast.walk(self.tree.function)
                if isinstance(n, ast.Name) and n.id in names and not isinstance(n.ctx, ast.Load)
            )
            later = any(line < stored_at < found.node.lineno for stored_at in stored)
            return None if later or own in names else found
        return None

    def into(self, found: Modulation) -> str:
        """What it becomes, in words."""
        names = (ast.unparse(self.tree.expression(norm) or ast.Constant("a norm")) for norm in found.norms)
        return f"{' or '.join(names)} + scale" + (" + shift" if found.vectors[1] is not None else "")

    def _pure(self, node: ast.expr) -> bool:
        return is_pure(self.tree, node)

    def _seen(self, place: Place) -> Iterator[Seen]:
        value = getattr(place.statement, "value", None)
        if not isinstance(place.statement, SIMPLE) or value is None:
            return
        for node in ast.walk(value):
            if isinstance(node, ast.Call):
                yield from self._call(node, place)
            if not isinstance(node, ast.BinOp):
                continue
            found = modulated(node, self._pure)
            if found is not None:
                yield Seen(node, found.normed, (found.scale, found.shift, found.unsqueezed), node, place, place)
            elif isinstance(node.op, ast.Add):
                yield from self._in_two_statements(node, place)

    def _in_two_statements(self, node: ast.BinOp, place: Place) -> Iterator[Seen]:
        """``h = h * (1 + scale)``, then ``h = h + shift``."""
        for side in (node.left, node.right):
            before = self.tree.definition(side.id, place) if isinstance(side, ast.Name) else None
            if before is None or modulated(before[0], self._pure) is None:
                continue
            whole = copy.deepcopy(node, {id(side): before[0]})
            found = modulated(whole, self._pure)
            if found is not None and found.shift is not None:
                vectors = found.scale, found.shift, found.unsqueezed
                yield Seen(node, found.normed, vectors, whole, place, before[1], (before[1].statement,))

    def _call(self, node: ast.Call, place: Place) -> Iterator[Seen]:
        """``modulate(normed, shift, scale)`` of a function of the user's own."""
        parts = reading(self.tree.method.global_value(node.func))
        every = [*node.args, *(keyword.value for keyword in node.keywords)]
        if parts is None or node.keywords or len(every) != 2 + (parts.shift is not None):
            return
        shift = None if parts.shift is None else node.args[parts.shift]
        scale = node.args[parts.scale]
        if self._pure(scale) and (shift is None or self._pure(shift)):
            yield Seen(
                node, node.args[parts.normed], (scale, shift, parts.unsqueezed), node, place, place, (), node.func
            )

    def _decide(self, seen: Seen) -> None:
        every = {id(n) for part in (seen.node, *seen.removed) for n in ast.walk(part)}
        every -= {id(n) for n in ast.walk(seen.normed)}
        if self.tree.is_left_out(seen.reader):
            self.parts |= every
            return
        calls, settle = self._calls(seen)
        norms, reasons = [], []
        for call in calls:
            module = self.tree.called(call)
            reasons.append(self._why_left(module))
            norms.append(module)
        if not calls:
            if not isinstance(seen.normed, ast.Name) or not self._is_normed(seen.normed.id):
                return
            reasons.append(f"{seen.normed.id} is no norm's output alone, or is read elsewhere too")
        self.parts |= every
        reason = next(filter(None, reasons), "")
        self.found.append(Modulation(seen.node, tuple(norms), seen.vectors, reason))
        if reason:
            return
        for call in calls:
            self.replaced[id(call)] = ast.Call(helper("later"), [call.func, *call.args], [])
        if settle is not None:
            statement, name = settle
            value = ast.Call(helper("settled"), [ast.Name(name, ast.Load())], [])
            self.inserted[id(statement)] = ast.Assign([ast.Name(name, ast.Store())], value)
        self.removed |= {id(statement) for statement in seen.removed}
        scale, shift, unsqueezed = seen.vectors
        keywords = [ast.keyword("scale", scale), *([] if shift is None else [ast.keyword("shift", shift)])]
        keywords += [ast.keyword("unsqueezed", ast.Constant(True))] if unsqueezed else []
        otherwise = function_of(seen.value, seen.normed, "normed")
        new = ast.Call(helper("modulate"), [seen.normed, otherwise], keywords)
        if seen.by is not None:
            new = ast.Call(helper("modulate_by"), [seen.by, *seen.node.args], [])  # type: ignore[attr-defined]
        self.replaced[id(seen.node)] = new

    def _why_left(self, module: nn.Module) -> str:
        """Why the modulation of a norm is left, or nothing."""
        kind = type(module)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and kind not in (nn.LayerNorm, nn.RMSNorm):
            return f"{class_path(kind)} has a forward of its own"
        return ""

    def _is_normed(self, name: str) -> bool:
        statements = (place.statement for place in self.tree.places)
        return any(assigned(s) == name and self._is_call(s.value) for s in statements)  # type: ignore[attr-defined]

    def _is_call(self, node: ast.expr) -> bool:
        """Whether it calls a norm with one argument."""
        module = self.tree.called(node)
        return module is not UNKNOWN and self.is_norm(module)

    def _calls(self, seen: Seen) -> tuple[list[Any], tuple[ast.stmt, str] | None]:
        """(the calls of norms whose value is modulated and not read elsewhere; where it may not come to that)."""
        normed, place = seen.normed, seen.place
        moved = isinstance(normed, ast.Name) or seen.removed
        if moved and not (self.tree.alone(seen.node, seen.reader) and self.tree.comes_first(seen.node, seen.reader)):
            return [], None
        if not isinstance(normed, ast.Name):
            return ([normed] if self._is_call(normed) else []), None
        name = normed.id
        if place.inside((*TRIES, ast.With)) is not None:
            return [], None
        outer = self._outer(name, place)
        before = outer.previous()
        if outer is not place:
            if before is None or not _assigns_always(outer.body[: outer.index], name):
                return [], None
            settle = outer.statement, name
        else:
            settle = None
        if not read_once(self.tree, name, place):
            return [], None
        ends = [] if before is None else [e.statement for e in ends_of(before) if assigned(e.statement) == name]
        calls = [end.value for end in ends if self._is_call(end.value)]  # type: ignore[attr-defined]
        return calls, settle if calls else None

    def _outer(self, name: str, place: Place) -> Place:
        """The ``if`` of whose branch a statement is the first, where no other branch or test reads the variable."""
        outer, parent = place, place.parent
        while (
            outer.index == 0
            and parent is not None
            and isinstance(parent.statement, ast.If)
            and assigned(place.statement) == name
        ):
            test, *ways = parent.statement.test, parent.statement.body, parent.statement.orelse
            others = [s for way in ways if way is not outer.body for s in way]
            if not without_calls(test) or any(mentions(part, {name}) for part in (test, *others)):
                break
            outer, parent = parent, parent.parent
        return outer


def vectors_of(modulation: Modulation) -> ast.Lambda:
    """``lambda: (scale, shift, unsqueezed)``."""
    scale, shift, unsqueezed = modulation.vectors
    every = [scale, ast.Constant(None) if shift is None else shift, ast.Constant(unsqueezed)]
    nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    return ast.Lambda(nothing, ast.Tuple(every, ast.Load()))


def values_before(tree: Tree, name: ast.expr, place: Place) -> list[ast.expr]:
    """What the ``if`` before a statement may assign last to a variable that the statement alone reads."""
    before = place.previous()
    if not isinstance(name, ast.Name) or before is None or not isinstance(before.statement, ast.If):
        return []
    if place.inside((*TRIES, ast.With)) is not None or not read_once(tree, name.id, place):
        return []
    ends = (end.statement for end in ends_of(before))
    return [end.value for end in ends if assigned(end) == name.id]  # type: ignore[attr-defined]


def read_once(tree: Tree, name: str, place: Place) -> bool:
    """Whether a statement alone reads what a variable holds before it, and reads it once."""
    inner = (ast.FunctionDef, ast.Lambda, ast.ClassDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    scopes = (n for n in ast.walk(tree.function) if isinstance(n, inner) and n is not tree.function)
    if any(mentions(scope, {name}) for scope in scopes):
        return False
    again = assigned(place.statement) == name
    times = sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(place.statement))
    return times - again == 1 and (again or tree.dead_after(name, place))


def ends_of(place: Place) -> Iterator[Place]:
    """The last statements of an ``if``'s branches, or the statement itself where it is none."""
    statement = place.statement
    if not isinstance(statement, ast.If):
        yield place
        return
    for body in (statement.body, statement.orelse):
        if body:
            yield from ends_of(Place(body, len(body) - 1, place))


def _assigns_always(statements: list[ast.stmt], name: str) -> bool:
    """Whether a variable has a value behind these statements, whichever way they go."""
    for statement in statements:
        if isinstance(statement, (ast.Return, ast.Raise)):
            return True
        if isinstance(statement, ast.If):
            if _assigns_always(statement.body, name) and _assigns_always(statement.orelse, name):
                return True
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            stored = (n for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            if getattr(statement, "value", None) is not None and any(n.id == name for n in stored):
                return True
    return False
