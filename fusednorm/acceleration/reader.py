"""Follows a value through a method to the norm that reads it next."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .tree import COMPREHENSIONS, SIMPLE, Place, Tree, assigned, mentions

RETURNED = "returned"


class Reader:
    """Who reads a value next, in one method of one instance.

    Args:
        tree: the method.
        is_norm: whether a module is a norm that can take a sum's normed tensor.
    """

    def __init__(self, tree: Tree, is_norm: Callable[[Any], bool]) -> None:
        self.tree, self.is_norm = tree, is_norm

    def after(self, place: Place, names: set[str]) -> tuple[ast.expr | None, str]:
        """The norm that is certain to read a value next, which the variables `names` hold, or why there is none."""
        after = place.next()
        if after is None:
            outer = place.parent
            if outer is None:
                return None, "no norm reads it"
            if not isinstance(outer.statement, ast.If):
                return None, "a loop or block ends before a norm reads it"
            return self.after(outer, names)
        return self.starting(after, names)

    def starting(self, place: Place, names: set[str]) -> tuple[ast.expr | None, str]:
        statement = place.statement
        if isinstance(statement, ast.If):
            return self._reader_if(place, statement, names)
        if not mentions(statement, names):
            if isinstance(statement, (ast.Return, ast.Raise, ast.Break, ast.Continue)):
                return None, "no norm reads it"
            return self.after(place, names)
        if isinstance(statement, ast.Return):
            value = statement.value
            first = value.elts[0] if isinstance(value, ast.Tuple) and value.elts else value
            others = value.elts[1:] if isinstance(value, ast.Tuple) else []
            if isinstance(first, ast.Name) and not any(mentions(other, names) for other in others):
                return None, RETURNED
        if isinstance(statement, (*SIMPLE, ast.AugAssign)):
            target = assigned(statement)
            norms = [n for n in ast.walk(statement) if self._reads(n, names) and self._unconditional(n, place)]
            if norms and not isinstance(statement, ast.AugAssign) and not self._passed(statement, norms[0], names):
                if self._escapes(place, names):
                    return None, "the method returns the sum too, whose gradient has to be whole"
                return norms[0].func, ""  # type: ignore[attr-defined]
            value = getattr(statement, "value", None)
            if target is not None and isinstance(value, ast.Name) and value.id in names:
                return self.after(place, names | {target})
            if target is not None and value is not None and not mentions(value, names):
                left = names - {target}
                return self.after(place, left) if left else (None, "no norm reads it")
        return None, f"`{short(statement)}` reads it before a norm does"

    def _reader_if(self, place: Place, statement: ast.If, names: set[str]) -> tuple[ast.expr | None, str]:
        known = self.tree.test(statement.test)
        if mentions(statement.test, names):
            return None, f"`if {short(statement.test)}` reads it before a norm does"
        if known is None:
            if mentions(statement, names):
                return None, f"whether a norm reads it next depends on `{short(statement.test)}`"
            return self.after(place, names)
        body = statement.body if known else statement.orelse
        if not body:
            return self.after(place, names)
        return self.starting(Place(body, 0, place), names)

    def _reads(self, node: ast.AST, names: set[str]) -> bool:
        if not isinstance(node, ast.Call) or not self.is_norm(self.tree.called(node)):
            return False
        return isinstance(node.args[0], ast.Name) and node.args[0].id in names

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
        return any(mentions(call, names) and not self._reads(call, names) for call in calls)

    def _escapes(self, place: Place | None, names: set[str]) -> bool:
        """Whether the method returns the value itself after its norm has read it."""
        while place is not None and names:
            statement = place.statement
            if isinstance(statement, ast.Return):
                value = statement.value
                parts = value.elts if isinstance(value, (ast.Tuple, ast.List)) else [value]
                return any(isinstance(part, ast.Name) and part.id in names for part in parts)
            target = assigned(statement)
            if target is not None:
                value = statement.value  # type: ignore[attr-defined]
                alias = isinstance(value, ast.Name) and value.id in names
                names = names | {target} if alias else names - {target}
            place = place.following()
        return False


def short(node: ast.AST) -> str:
    text = ast.unparse(node).split("\n")[0]
    return text if len(text) <= 60 else text[:57] + "..."
