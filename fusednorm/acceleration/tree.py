"""Questions about one method's syntax tree: which module an expression names, who reads a variable, what runs next."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import keyword
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .source import HELPER, Method

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

    def __init__(self, module: nn.Module, method: Method, name: str) -> None:
        self.module, self.method, self.name = module, method, name
        self.self_name = method.self_name
        self.function = method.tree
        self.places = list(_places(self.function.body, None))
        self.parents = {id(child): node for node in ast.walk(self.function) for child in ast.iter_child_nodes(node)}
        stored = (n.id for n in ast.walk(self.function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
        self.stores = Counter(stored)
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

    def expression(self, module: nn.Module) -> ast.expr | None:
        """``self.a``, or ``fused.inner(self, "a.0")``, for a module inside this one."""
        path = next((name for name, part in self.module.named_modules() if part is module and name), None)
        if path is None or self.rebinds_self:
            return None
        own = ast.Name(self.self_name, ast.Load())
        if path.isidentifier() and not keyword.iskeyword(path):
            return ast.Attribute(own, path, ast.Load())
        helper = ast.Attribute(ast.Name(HELPER, ast.Load()), "inner", ast.Load())
        return ast.Call(helper, [own, ast.Constant(path)], [])

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
        times = sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(reader.statement))
        reassigned = assigned(reader.statement) == name
        if times - reassigned != 1:
            return None
        if not reassigned and not self.dead_after(name, reader):
            return None
        return place.statement.value, place  # type: ignore[attr-defined]

    def dead_after(self, name: str, place: Place) -> bool:
        """Whether nothing reads a variable after a statement, before it is assigned again."""
        inner = (n for n in ast.walk(self.function) if isinstance(n, (*SCOPES, *COMPREHENSIONS)))
        if any(mentions(scope, {name}) for scope in inner if scope is not self.function):
            return False
        if isinstance(place.statement, ast.Return):
            return place.inside((*TRIES, ast.With)) is None
        if place.inside((ast.For, ast.While, *TRIES)) is not None:
            return False
        after = place.following()
        while after is not None:
            dead = _ends(after.statement, name)
            if dead is not None:
                return dead
            after = after.following()
        return True

    def comes_first(self, node: ast.AST, place: Place) -> bool:
        """Whether a statement evaluates nothing but names and modules' attributes before a node."""
        while node is not place.statement:
            around = self.parents[id(node)]
            if isinstance(around, ast.Call):
                if not (around.args and around.args[0] is node and isinstance(self.resolve(around.func), nn.Module)):
                    return False
            elif isinstance(around, ast.BinOp):
                if around.right is node and not isinstance(around.left, (ast.Name, ast.Constant)):
                    return False
            elif not isinstance(around, SIMPLE):
                return False
            node = around
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

    def branch(self, statement: ast.If) -> bool | None:
        """Which way an ``if`` goes, as far as this instance and the defaults of the arguments say.

        An argument that is None by default is given where the instance has the modules that then run.
        """
        known = self.test(statement.test)
        argument = any(isinstance(n, ast.Name) and n.id != self.self_name for n in ast.walk(statement.test))
        if known is not False or not argument:
            return known
        calls = (n for part in statement.body for n in ast.walk(part) if isinstance(n, ast.Call))
        return any(isinstance(self.resolve(call.func), nn.Module) for call in calls)

    def test(self, node: ast.expr) -> bool | None:
        """The value of a condition, or None if it is not known."""
        if isinstance(node, ast.Name):
            values = [p.statement.value for p in self.places if assigned(p.statement) == node.id]  # type: ignore[attr-defined]
            return self.test(values[0]) if len(values) == 1 == self.stores.get(node.id) else None
        if isinstance(node, ast.BoolOp):
            parts = [self.test(part) for part in node.values]
            decisive = isinstance(node.op, ast.Or)
            return decisive if decisive in parts else None if None in parts else not decisive
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            known = self.test(node.operand)
            return None if known is None else not known
        if isinstance(node, ast.Attribute):
            value = self.resolve(node)
            return value if isinstance(value, bool) and node.attr != "training" else None
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _EQUALITIES:
            equal = self._equal(node.left, node.comparators[0], isinstance(node.ops[0], (ast.In, ast.NotIn)))
            return equal if equal is None else equal is isinstance(node.ops[0], (ast.Eq, ast.In))
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and _constant(node.comparators[0], False) is None:
            is_none = None
            if isinstance(node.left, ast.Name) and not self.stores.get(node.left.id):
                parameter = inspect.signature(self.method.function).parameters.get(node.left.id)
                is_none = True if parameter is not None and parameter.default is None else None
            elif isinstance(node.left, ast.Name):
                is_none = True if self._is_optional(node.left.id) else None
            elif isinstance(node.left, ast.Attribute):
                value = self.resolve(node.left)
                is_none = None if value is UNKNOWN else value is None
            if is_none is not None and isinstance(node.ops[0], (ast.Is, ast.IsNot)):
                return is_none is isinstance(node.ops[0], ast.Is)
        return None

    def is_left_out(self, place: Place) -> bool:
        """Whether a statement is in a branch that this instance does not take, as its attributes say."""
        outer = place.parent
        while outer is not None:
            if isinstance(outer.statement, ast.If):
                test, known = outer.statement.test, self.test(outer.statement.test)
                own = not any(isinstance(n, ast.Name) and n.id != self.self_name for n in ast.walk(test))
                if own and known is not None and (place.body is outer.statement.body) is not known:
                    return True
            place, outer = outer, outer.parent
        return False

    def _is_optional(self, name: str) -> bool:
        """Whether a variable is ``options.pop(key, None)`` or ``options.get(key)``: None unless it is given."""
        values = [p.statement.value for p in self.places if assigned(p.statement) == name]  # type: ignore[attr-defined]
        if len(values) != 1 or self.stores.get(name) != 1 or not isinstance(values[0], ast.Call):
            return False
        function, given = values[0].func, values[0].args
        if not isinstance(function, ast.Attribute) or function.attr not in ("pop", "get"):
            return False
        return (len(given) == 2 and _constant(given[1]) is None) or (len(given) == 1 and function.attr == "get")

    def _equal(self, left: ast.expr, right: ast.expr, among: bool) -> bool | None:
        """``x.dtype == torch.float16``, ``x.ndim == 4``, ``self.kind == "plain"`` or ``self.kind in ("plain", ...)``.

        x has three dimensions: samples, tokens and features.
        """
        if isinstance(left, ast.Attribute) and left.attr == "ndim" and not among and isinstance(left.value, ast.Name):
            rank = _constant(right)
            return rank == 3 if type(rank) is int else None
        own = self.resolve(left) if isinstance(left, ast.Attribute) else UNKNOWN
        if type(own) in (str, int):
            if among and not isinstance(right, (ast.Tuple, ast.List, ast.Set)):
                return None
            values = [_constant(value) for value in (right.elts if among else [right])]  # type: ignore[attr-defined]
            return None if UNKNOWN in values else own in values
        return None if among else self._dtype_test(left, right)

    def _dtype_test(self, left: ast.expr, right: ast.expr) -> bool | None:
        """x has the dtype of the parameters, or of autocast."""
        dtype = self.method.global_value(right)
        if not isinstance(left, ast.Attribute) or left.attr != "dtype" or not isinstance(dtype, torch.dtype):
            return None
        own = {p.dtype for p in self.module.parameters() if p.is_floating_point()}
        return own == {dtype} if len(own) == 1 and torch.float16 not in own else None


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
TRIES = (ast.Try, getattr(ast, "TryStar", ast.Try))
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
SIMPLE = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)
_EQUALITIES = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)


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


def _ends(statement: ast.stmt, name: str) -> bool | None:
    """Whether a variable's value is lost by a statement, or read (False); None where it is neither."""
    if isinstance(statement, ast.If):
        if mentions(statement.test, {name}):
            return False
        ways = [
            next((end for end in (_ends(inner, name) for inner in body) if end is not None), None)
            for body in (statement.body, statement.orelse)
        ]
        return False if False in ways else True if all(ways) else None
    found = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == name]
    if isinstance(statement, (ast.Return, ast.Raise)):
        return not found
    if not found:
        return None
    stored = isinstance(statement, ast.Assign) or assigned(statement) == name
    return stored and all(isinstance(n.ctx, ast.Store) for n in found)


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


def first_assigned(statement: ast.stmt) -> str | None:
    """The variable of ``name = value`` or of ``name, other = value``, else None."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        if isinstance(target, ast.Tuple) and target.elts and isinstance(target.elts[0], ast.Name):
            return target.elts[0].id
    return assigned(statement)


def mentions(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))


_METADATA = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda"}
_METADATA_CALLS = {"size", "dim", "numel", "is_floating_point", "stride"}


def reads(tree: Tree, node: ast.AST, names: set[str]) -> bool:
    """Whether a node uses more of a variable than shape, dtype or device. An assignment to it counts too."""
    for found in ast.walk(node):
        if isinstance(found, ast.Name) and found.id in names:
            around = tree.parents.get(id(found))
            if not isinstance(around, ast.Attribute):
                return True
            called = isinstance(tree.parents.get(id(around)), ast.Call)
            if around.attr not in (_METADATA_CALLS if called else _METADATA):
                return True
    return False


def changes(node: ast.AST, names: set[str]) -> bool:
    """Whether a node may change a variable's tensor in place."""
    for found in ast.walk(node):
        if isinstance(found, ast.AugAssign) and mentions(found.target, names):
            return True
        if isinstance(found, ast.Subscript) and isinstance(found.ctx, ast.Store) and mentions(found, names):
            return True
        called = found.func if isinstance(found, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr.endswith("_") and mentions(called.value, names):
            return True
    return False


def without_calls(node: ast.expr) -> bool:
    return not any(isinstance(n, (ast.Call, ast.Await, ast.NamedExpr)) for n in ast.walk(node))


def is_sum(node: ast.AST) -> bool:
    """``a + b`` or ``a += b`` of what may be tensors."""
    if not isinstance(node, (ast.BinOp, ast.AugAssign)) or not isinstance(node.op, ast.Add):
        return False
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
    return not any(isinstance(side, (ast.Constant, ast.Tuple, ast.List, ast.JoinedStr)) for side in sides)


def expressions(statement: ast.stmt) -> list[ast.AST]:
    """The nodes of a statement itself, outermost first, without those of the statements inside it."""
    found: list[ast.AST] = []
    stack: list[ast.AST] = [c for c in ast.iter_child_nodes(statement) if not isinstance(c, ast.stmt)]
    while stack:
        node = stack.pop(0)
        if isinstance(node, (ast.ExceptHandler, ast.Lambda, *COMPREHENSIONS)):
            continue
        found.append(node)
        stack += [c for c in ast.iter_child_nodes(node) if not isinstance(c, ast.stmt)]
    return found
