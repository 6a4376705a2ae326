"""Follows a value through a method to the norm that reads it next."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from torch import nn

from .tree import COMPREHENSIONS, SIMPLE, UNKNOWN, Place, Tree, assigned, changes, mentions, reads

RETURNED = "returned"
Consumer = Callable[[nn.Module], Any]


class Reader:
    """Who reads a value next, in one method of one instance.

    Args:
        tree: the method.
        consumer: for a module, the norm that reads its first argument before anything else does: itself, one inside, or
            None.
    """

    def __init__(self, tree: Tree, consumer: Consumer) -> None:
        self.tree, self.consumer = tree, consumer

    def after(self, place: Place, names: set[str]) -> tuple[Any, str]:
        """The norm that is certain to read a value after a statement, or (None, why there is none).

        Args:
            place: the statement.
            names: the variables that hold the value.
        """
        following = place.next()
        if following is not None:
            return self.starting(following, names)
        outer = place.parent
        if outer is None:
            return None, "no norm reads it"
        if not isinstance(outer.statement, ast.If):
            return None, "a loop or block ends before a norm reads it"
        return self.after(outer, names)

    def starting(self, place: Place, names: set[str]) -> tuple[Any, str]:
        """As `after`, with this statement."""
        statement = place.statement
        if isinstance(statement, ast.If):
            return self._if(place, statement, names)
        if not reads(self.tree, statement, names):
            if isinstance(statement, (ast.Return, ast.Raise, ast.Break, ast.Continue)):
                return None, "no norm reads it"
            return self.after(place, names)
        if isinstance(statement, ast.Return) and returns_first(statement, names):
            return None, RETURNED
        if isinstance(statement, SIMPLE):
            target, value = assigned(statement), getattr(statement, "value", None)
            for call in ast.walk(statement):
                norm = self._reads(call, names)
                if norm is not None and self._unconditional(call, place) and not self._passed(statement, call, names):
                    if self._escapes(place, names):
                        return None, "the sum is kept or changed after the norm too"
                    return norm, ""
            if target is not None and isinstance(value, ast.Name) and value.id in names:
                return self.after(place, names | {target})
            if target is not None and value is not None and not reads(self.tree, value, names):
                left = names - {target}
                return self.after(place, left) if left else (None, "no norm reads it")
        return None, f"`{short(statement)}` reads it before a norm does"

    def _if(self, place: Place, statement: ast.If, names: set[str]) -> tuple[Any, str]:
        known = self.tree.branch(statement)
        if reads(self.tree, statement.test, names):
            return None, f"`if {short(statement.test)}` reads it before a norm does"
        if known is None:
            if mentions(statement, names):
                return None, f"whether a norm reads it next depends on `{short(statement.test)}`"
            return self.after(place, names)
        body, other = (statement.body, statement.orelse) if known else (statement.orelse, statement.body)
        if any(changes(part, names) for part in other):
            return None, f"`if {short(statement.test)}` may change it in place"
        return self.starting(Place(body, 0, place), names) if body else self.after(place, names)

    def _reads(self, node: ast.AST, names: set[str]) -> Any:
        """The norm by which a call reads the value, or None."""
        if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Name):
            return None
        module = self.tree.resolve(node.func)
        if node.args[0].id not in names or module is UNKNOWN or not isinstance(module, nn.Module):
            return None
        others = (*node.args[1:], *(keyword.value for keyword in node.keywords))
        return None if any(reads(self.tree, other, names) for other in others) else self.consumer(module)

    def _unconditional(self, node: ast.AST, place: Place) -> bool:
        while node is not place.statement:
            node = self.tree.parents[id(node)]
            if isinstance(node, (ast.IfExp, ast.BoolOp, ast.Lambda, ast.comprehension, *COMPREHENSIONS)):
                return False
        return True

    def _passed(self, statement: ast.stmt, norm: ast.AST, names: set[str]) -> bool:
        """Whether another call of the statement takes the sum, and may change it in place."""
        around = set()
        node: ast.AST | None = norm
        while node is not None:
            around.add(id(node))
            node = self.tree.parents.get(id(node))
        calls = (n for n in ast.walk(statement) if isinstance(n, ast.Call) and id(n) not in around)
        return any(reads(self.tree, call, names) and self._reads(call, names) is None for call in calls)

    def _escapes(self, place: Place | None, names: set[str]) -> bool:
        """Whether the method gives the value itself away after its norm has read it: returned, kept or hooked."""
        while place is not None and names:
            if any(self._gives_away(node, names) for node in ast.walk(place.statement)):
                return True
            if changes(place.statement, names):
                return True
            if isinstance(place.statement, ast.Return):
                return False
            names = self._holders(place.statement, names)
            place = place.following()
        return False

    def _gives_away(self, node: ast.AST, names: set[str]) -> bool:
        if not isinstance(node, ast.Name) or node.id not in names or not isinstance(node.ctx, ast.Load):
            return False
        around, held = self.tree.parents.get(id(node)), False
        while isinstance(around, (ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Starred, ast.IfExp, ast.keyword)):
            held = held or not isinstance(around, (ast.IfExp, ast.keyword))
            around = self.tree.parents.get(id(around))
        if isinstance(around, ast.Attribute):
            return around.attr in ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
        if isinstance(around, (ast.Assign, ast.AnnAssign)):
            return held or assigned(around) is None  # an attribute, an element or several variables
        if isinstance(around, ast.Call):
            called = self.tree.resolve(around.func)
            if called is None or isinstance(called, nn.Module):  # None: a branch for other instances
                return False
            function = self.tree.method.global_value(around.func)
            home = getattr(function, "__module__", None) or ""
            return not (home.startswith("torch") and not home.startswith("torch.autograd"))
        return isinstance(around, (ast.Return, ast.Yield, ast.Lambda, ast.NamedExpr))

    def _holders(self, statement: ast.stmt, names: set[str]) -> set[str]:
        """Which variables may hold the value after a statement, if these did before."""
        if isinstance(statement, ast.If):
            known = self.tree.branch(statement)
            ways = (
                [statement.body, statement.orelse] if known is None else [statement.body if known else statement.orelse]
            )
            ends: set[str] = set()
            for body in ways:
                held = names
                for inner in body:
                    held = self._holders(inner, held)
                ends |= held
            return ends
        target = assigned(statement)
        if target is None:
            return names
        value = statement.value  # type: ignore[attr-defined]
        alias = isinstance(value, ast.Name) and value.id in names
        return names | {target} if alias else names - {target}


def returns_first(statement: ast.Return, names: set[str]) -> bool:
    """Whether a method returns the value, alone or as the first of several, and no other part of it is returned."""
    value = statement.value
    first = value.elts[0] if isinstance(value, ast.Tuple) and value.elts else value
    others = value.elts[1:] if isinstance(value, ast.Tuple) else []
    return isinstance(first, ast.Name) and first.id in names and not any(mentions(other, names) for other in others)


def short(node: ast.AST) -> str:
    text = ast.unparse(node).split("\n")[0]
    return text if len(text) <= 60 else text[:57] + "..."
