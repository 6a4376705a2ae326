"""Whether what a method fuses is as large as one of its arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from torch import nn

from .tree import Tree

# methods of a tensor that have as many elements as it
_SAME = {"squeeze", "unsqueeze", "contiguous", "view", "reshape", "flatten", "transpose", "permute", "to", "float"}


class Sizes:
    """The arguments of a method that stay as large as they came, whatever is assigned to them.

    Args:
        tree: the method.
        norms: the ids of the norms that the method calls.
    """

    def __init__(self, tree: Tree, norms: set[int]) -> None:
        self.tree, self.norms = tree, norms
        arguments = tree.function.args
        self.names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)} - {
            tree.self_name
        }
        lost = True
        while lost:  # what is made of a name that was lost is lost too
            stored = {name for name in self.names if not all(map(self._may_follow, self._assigned(name)))}
            self.names -= stored
            lost = bool(stored)

    def _assigned(self, name: str) -> list[Any]:
        """The values of a name; None where one cannot be seen."""
        values: list[Any] = []
        seen = 0
        for node in ast.walk(self.tree.function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and _is_name(node.targets[0], name):
                values.append(node.value)
                seen += 1
            elif isinstance(node, (ast.AugAssign, ast.AnnAssign)) and _is_name(node.target, name):
                values.append(node.target if isinstance(node, ast.AugAssign) else node.value)
                seen += 1
        stores = sum(_is_name(n, name) and isinstance(n.ctx, ast.Store) for n in ast.walk(self.tree.function))  # type: ignore[attr-defined]
        return values if stores == seen else [None]

    def _may_follow(self, value: Any) -> bool:
        """Whether a name may be assigned it. A constant is no tensor, and a module that is missing is not called."""
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
            owner = self.tree.resolve(value.func.value)
            if isinstance(owner, nn.Module) and not hasattr(owner, value.func.attr):
                return True
        return isinstance(value, ast.Constant) or self.keeps(value)

    def keeps(self, node: Any) -> bool:
        """Whether an expression has the elements of one of the arguments."""
        if isinstance(node, ast.Name):
            return node.id in self.names
        if isinstance(node, ast.BinOp):
            return self.keeps(node.left) or self.keeps(node.right)
        if isinstance(node, ast.IfExp):
            return self.keeps(node.body) and self.keeps(node.orelse)
        if not isinstance(node, ast.Call):
            return False
        if id(self.tree.called(node)) in self.norms:
            return self.keeps(node.args[0])
        method = node.func
        return isinstance(method, ast.Attribute) and method.attr in _SAME and self.keeps(method.value)

    def read_by(self, norms: Iterable[Any]) -> bool:
        """Whether each call of these norms reads something as large as an argument."""
        wanted = {id(norm) for norm in norms}
        calls = (node for node in ast.walk(self.tree.function) if isinstance(node, ast.Call))
        return all(self.keeps(call.args[0]) for call in calls if id(self.tree.called(call)) in wanted)


def _is_name(node: Any, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
