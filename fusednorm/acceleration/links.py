"""Which norm reads what a block returns: seen in the methods that call the blocks one after another."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from typing import Any

from torch import nn

from .reader import RETURNED, Reader
from .tree import Place, Tree, first_assigned, is_sum, reads

Trees = Callable[[nn.Module], list[Tree]]


class Links:
    """Follows values from block to block.

    Args:
        trees: the methods of a module, as far as their source can be read.
        is_norm: whether a module is a norm that can take a sum's normed tensor.
    """

    def __init__(self, trees: Trees, is_norm: Callable[[Any], bool]) -> None:
        self.trees, self.is_norm = trees, is_norm
        self._first: dict[int, Any] = {}
        self._returning: dict[int, Any] = {}

    def consumer(self, module: nn.Module) -> Any:
        """The norm that reads the first argument of a module before anything else does, or None."""
        if self.is_norm(module):
            return module
        if id(module) not in self._first:
            self._first[id(module)] = None  # while it is looked for: a module may call itself
            self._first[id(module)] = self._first_norm(module)
        return self._first[id(module)]

    def _first_norm(self, module: nn.Module) -> Any:
        if type(module) is nn.Sequential:
            return self.consumer(module[0]) if len(module) else None
        tree = self._forward(module)
        if tree is None or len(tree.function.args.args) < 2:
            return None
        name = tree.function.args.args[1].arg
        return Reader(tree, self.consumer).starting(Place(tree.function.body, 0, None), {name})[0]

    def _forward(self, module: nn.Module) -> Tree | None:
        return next((tree for tree in self.trees(module) if tree.name == "forward"), None)

    def summing(self, module: nn.Module) -> Any:
        """The module whose sum is what a block returns, the block itself or one that it calls last, or None."""
        if id(module) not in self._returning:
            self._returning[id(module)] = None
            self._returning[id(module)] = self._summing(module)
        return self._returning[id(module)]

    def _summing(self, module: nn.Module) -> Any:
        if type(module) is nn.Sequential:
            return self.summing(module[-1]) if len(module) else None
        tree = self._forward(module)
        if tree is None:
            return None
        reader = Reader(tree, self.consumer)
        for place in tree.places:
            value, name = getattr(place.statement, "value", None), first_assigned(place.statement)
            returned = isinstance(place.statement, ast.Return)
            if value is None or not (returned or (name and reader.after(place, {name})[1] == RETURNED)):
                continue
            if is_sum(value):
                return module
            called = tree.resolve(value.func) if isinstance(value, ast.Call) else None
            if isinstance(called, nn.Module) and not self.is_norm(called):
                return self.summing(called)
        return None

    def of(self, parent: nn.Module) -> list[tuple[nn.Module, Any]]:
        """(module that returns a sum, the norm that reads it) of what `parent` calls."""
        found = self._chain(list(parent)) if type(parent) is nn.Sequential else []
        for tree in self.trees(parent):
            reader = Reader(tree, self.consumer)
            for place in tree.places:
                blocks, variable = _loop(tree, place)
                found += self._chain(blocks)
                if variable is None:
                    blocks, variable = self._call(tree, place)
                if variable is not None and blocks:
                    found += self._pair(blocks[-1], reader.after(place, {variable})[0])
        return found

    def _chain(self, blocks: list[nn.Module]) -> list[tuple[nn.Module, Any]]:
        pairs = itertools.pairwise(blocks)
        return [link for block, after in pairs for link in self._pair(block, self.consumer(after))]

    def _pair(self, block: nn.Module, norm: Any) -> list[tuple[nn.Module, Any]]:
        summing = None if norm is None else self.summing(block)
        return [] if summing is None else [(summing, norm)]

    def _call(self, tree: Tree, place: Place) -> tuple[list[nn.Module], str | None]:
        """The block of ``h = self.block(...)`` or ``h, other = self.block(...)``."""
        value, name = getattr(place.statement, "value", None), first_assigned(place.statement)
        block = tree.resolve(value.func) if name is not None and isinstance(value, ast.Call) else None
        return ([block], name) if isinstance(block, nn.Module) and not self.is_norm(block) else ([], None)


def _loop(tree: Tree, place: Place) -> tuple[list[nn.Module], str | None]:
    """The blocks of ``for block in self.blocks: h = block(h, ...)`` and the variable h, if nothing else reads h."""
    statement = place.statement
    if not isinstance(statement, ast.For) or statement.orelse:
        return [], None
    iterated, target = statement.iter, statement.target
    if isinstance(iterated, ast.Call) and isinstance(iterated.func, ast.Name) and iterated.func.id == "enumerate":
        if len(iterated.args) != 1 or not isinstance(target, ast.Tuple) or len(target.elts) != 2:
            return [], None
        iterated, target = iterated.args[0], target.elts[1]
    if isinstance(iterated, ast.Subscript) and isinstance(iterated.slice, ast.Slice):
        if iterated.slice.lower is not None or iterated.slice.step is not None:
            return [], None
        iterated = iterated.value
    blocks = tree.resolve(iterated)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not isinstance(target, ast.Name):
        return [], None
    for inner in tree.places:
        value, name = getattr(inner.statement, "value", None), first_assigned(inner.statement)
        if (
            inner.inside((ast.For,)) is place
            and name is not None
            and isinstance(value, ast.Call)
            and isinstance(value.func, ast.Name)
            and value.func.id == target.id
            and value.args
            and isinstance(value.args[0], ast.Name)
            and value.args[0].id == name
        ):
            others = [s for s in tree.places if s.inside((ast.For,)) is place and s is not inner]
            return ([], None) if _reads_elsewhere(tree, others, value, name) else (list(blocks), name)
    return [], None


def _reads_elsewhere(tree: Tree, places: list[Place], call: ast.Call, name: str) -> bool:
    arguments = [*call.args[1:], *(keyword.value for keyword in call.keywords)]
    simple = [p.statement for p in places if not hasattr(p.statement, "body")]
    return any(reads(tree, node, {name}) for node in (*simple, *arguments))
