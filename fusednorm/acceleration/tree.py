"""Questions about one method's syntax tree: which module an expression names, who reads a variable, what runs next."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from .source import Method

UNKNOWN = object()


@dataclasses.dataclass(frozen=True)
class Place:
    """A statement: the list that holds it, its index, and the statement around that list."""

    body: list[ast.stmt]
    index: int
    parent: Place | None

    @property
    def statement(self) -> ast.stmt:
        return self.body[self.index]

    def previous(self) -> Place | None:
        return dataclasses.replace(self, index=self.index - 1) if self.index else None

    def next(self) -> Place | None:
        return dataclasses.replace(self, index=self.index + 1) if self.index + 1 < len(self.body) else None

    def following(self) -> Place | None:
        """The next statement of this list or of the lists around it."""
        place: Place | None = self
        while place is not None:
            after = place.next()
            if after is not None:
                return after
            place = place.parent
        return None

    def inside(self, kinds: tuple[type, ...]) -> Place | None:
        """The nearest statement of some kinds around this one."""
        place = self.parent
        while place is not None and not isinstance(place.statement, kinds):
            place = place.parent
        return place


class Tree:
    """One method of one module instance."""

    def __init__(self, module: nn.Module, method: Method) -> None:
        self.module, self.method = module, method
        self.self_name = method.self_name
        self.function = method.tree
        self.places = list(_places(self.function.body, None))
        self.parents = {id(child): node for node in ast.walk(self.function) for child in ast.iter_child_nodes(node)}
        self.loads: dict[str, int] = {}
        self.stores: dict[str, int] = {}
        for node in ast.walk(self.function):
            if isinstance(node, ast.Name):
                counts = self.loads if isinstance(node.ctx, ast.Load) else self.stores
                counts[node.id] = counts.get(node.id, 0) + 1
        self.rebinds_self = bool(self.stores.get(self.self_name))

    def resolve(self, node: ast.expr) -> Any:
        """The object that ``self.a.b[0]`` names on this instance, else UNKNOWN."""
        if isinstance(node, ast.Name):
            return self.module if node.id == self.self_name and not self.rebinds_self else UNKNOWN
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            if not isinstance(owner, nn.Module):
                return UNKNOWN
            static = inspect.getattr_static(type(owner), node.attr, UNKNOWN)
            if isinstance(static, property) or (node.attr not in owner.__dict__ and not _has(owner, node.attr)):
                return UNKNOWN if static is UNKNOWN or isinstance(static, property) else static
            return getattr(owner, node.attr, UNKNOWN)
        if isinstance(node, ast.Subscript):
            owner, key = self.resolve(node.value), _constant(node.slice)
            if isinstance(owner, (nn.ModuleList, nn.Sequential)) and isinstance(key, int):
                return owner[key] if -len(owner) <= key < len(owner) else UNKNOWN
            if isinstance(owner, nn.ModuleDict) and isinstance(key, str) and key in owner:
                return owner[key]
        return UNKNOWN

    def called(self, node: ast.AST) -> Any:
        """The module of ``self.module(one_argument)``, else UNKNOWN."""
        if not isinstance(node, ast.Call) or len(node.args) != 1 or node.keywords:
            return UNKNOWN
        return UNKNOWN if isinstance(node.args[0], ast.Starred) else self.resolve(node.func)

    def definition(self, name: str, reader: Place) -> tuple[ast.expr, Place] | None:
        """The value of a variable that the statement before `reader` assigns and that `reader` alone reads."""
        place = reader.previous()
        if place is None or assigned(place.statement) != name:
            return None
        reads = sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(reader.statement))
        reassigned = assigned(reader.statement) == name
        if reads - reassigned != 1:
            return None
        if not reassigned and not self._dead_after(name, reader):
            return None
        return place.statement.value, place  # type: ignore[attr-defined]

    def _dead_after(self, name: str, place: Place) -> bool:
        """Whether nothing reads a variable after a statement, before it is assigned again."""
        inner = (n for n in ast.walk(self.function) if isinstance(n, (*SCOPES, *COMPREHENSIONS)))
        if any(mentions(scope, {name}) for scope in inner if scope is not self.function):
            return False
        if isinstance(place.statement, ast.Return):
            return place.inside((ast.Try, ast.With)) is None
        if place.inside((ast.For, ast.While, ast.Try)) is not None:
            return False
        after = place.following()
        while after is not None:
            statement = after.statement
            if assigned(statement) == name and not mentions(statement.value, {name}):  # type: ignore[attr-defined]
                return True
            if mentions(statement, {name}):
                return False
            after = after.following()
        return True

    def alone(self, node: ast.AST, place: Place) -> bool:
        """Whether every other call of the statement is inside the node or around it: nothing else runs before it."""
        inside = {id(n) for n in ast.walk(node)}
        around = set()
        parent = self.parents.get(id(node))
        while parent is not None and parent is not place.statement:
            if isinstance(parent, (ast.IfExp, ast.BoolOp, ast.Lambda, ast.comprehension, ast.ListComp)):
                return False
            around.add(id(parent))
            parent = self.parents.get(id(parent))
        calls = (n for n in ast.walk(place.statement) if isinstance(n, (ast.Call, ast.Await, ast.NamedExpr)))
        return isinstance(place.statement, SIMPLE) and all(id(n) in inside or id(n) in around for n in calls)

    def test(self, node: ast.expr) -> bool | None:
        """What an ``if`` will find, as far as this instance and the defaults of the arguments say."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            known = self.test(node.operand)
            return None if known is None else not known
        if isinstance(node, ast.Attribute):
            value = self.resolve(node)
            return value if isinstance(value, bool) and node.attr != "training" else None
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and _constant(node.comparators[0], False) is None:
            is_none = None
            if isinstance(node.left, ast.Name) and not self.stores.get(node.left.id):
                parameter = inspect.signature(self.method.function).parameters.get(node.left.id)
                is_none = True if parameter is not None and parameter.default is None else None
            elif isinstance(node.left, ast.Attribute):
                value = self.resolve(node.left)
                is_none = None if value is UNKNOWN else value is None
            if is_none is not None and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
                return is_none is isinstance(node.ops[0], ast.Is)
        return None


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
SIMPLE = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)


def _places(body: list[ast.stmt], parent: Place | None) -> Iterator[Place]:
    for index, statement in enumerate(body):
        place = Place(body, index, parent)
        yield place
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        for field in ("body", "orelse", "finalbody"):
            inner = getattr(statement, field, None)
            if isinstance(inner, list):
                yield from _places(inner, place)
        for handler in getattr(statement, "handlers", []):
            yield from _places(handler.body, place)


def _has(module: nn.Module, name: str) -> bool:
    return name in module._modules or name in module._parameters or name in module._buffers


def _constant(node: ast.expr, default: Any = UNKNOWN) -> Any:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value if isinstance(node.operand.value, int) else default  # type: ignore[unused-ignore]
    return node.value if isinstance(node, ast.Constant) else default


def assigned(statement: ast.stmt) -> str | None:
    """The variable of ``name = value``, else None."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: ast.expr = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target = statement.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None


def mentions(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))


def without_calls(node: ast.expr) -> bool:
    return not any(isinstance(n, (ast.Call, ast.Await, ast.NamedExpr)) for n in ast.walk(node))


def is_sum(node: ast.AST) -> bool:
    """``a + b`` or ``a += b`` of what may be tensors."""
    if not isinstance(node, (ast.BinOp, ast.AugAssign)) or not isinstance(node.op, ast.Add):
        return False
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
    return not any(isinstance(side, (ast.Constant, ast.Tuple, ast.List, ast.JoinedStr)) for side in sides)
