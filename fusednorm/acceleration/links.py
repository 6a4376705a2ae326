"""Which norm reads what a block returns: seen in the loop of the module that calls the blocks one after another."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from typing import Any

from torch import nn

from .reader import Reader
from .tree import Place, Tree, assigned, mentions

Trees = Callable[[nn.Module], list[Tree]]


def first_norm(block: nn.Module, trees: Trees, is_norm: Callable[[Any], bool]) -> Any:
    """The norm that reads a block's first argument before anything else does, or None."""
    tree = next((t for t in trees(block) if t.function.name == "forward"), None)
    if tree is None or len(tree.function.args.args) < 2 or not tree.function.body:
        return None
    name = tree.function.args.args[1].arg
    reader = Reader(tree, is_norm)
    found, _ = reader.starting(Place(tree.function.body, 0, None), {name})
    return None if found is None else tree.resolve(found)


def links(parent: nn.Module, trees: Trees, is_norm: Callable[[Any], bool]) -> list[tuple[nn.Module, Any]]:
    """(block, the norm that reads its output) of the blocks that `parent` calls in turn."""
    found: list[tuple[nn.Module, Any]] = []
    if type(parent) is nn.Sequential:
        found += _chain(list(parent), trees, is_norm)
    for tree in trees(parent):
        reader = Reader(tree, is_norm)
        for place in tree.places:
            blocks, variable = _loop(tree, place)
            if not blocks:
                blocks, variable = _sequential(tree, place)
                new: list[tuple[nn.Module, Any]] = []
            else:
                new = _chain(blocks, trees, is_norm)
            if variable is None or not blocks:
                continue
            last, _ = reader.after(place, {variable})
            if last is not None:
                new.append((blocks[-1], tree.resolve(last)))
            found += new
    return found


def _chain(blocks: list[nn.Module], trees: Trees, is_norm: Callable[[Any], bool]) -> list[tuple[nn.Module, Any]]:
    pairs = itertools.pairwise(blocks)
    found = [
        (block, following if is_norm(following) else first_norm(following, trees, is_norm))
        for block, following in pairs
    ]
    return [(block, norm) for block, norm in found if norm is not None]


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
    if isinstance(iterated, ast.Subscript) and isinstance(iterated.slice, ast.Slice) and _from_start(iterated.slice):
        iterated = iterated.value
    blocks = tree.resolve(iterated)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not isinstance(target, ast.Name):
        return [], None
    for inner in tree.places:
        if not _inside(inner, place):
            continue
        value, name = getattr(inner.statement, "value", None), assigned(inner.statement)
        if (
            name is not None
            and isinstance(value, ast.Call)
            and isinstance(value.func, ast.Name)
            and value.func.id == target.id
            and value.args
            and isinstance(value.args[0], ast.Name)
            and value.args[0].id == name
        ):
            reads = sum(isinstance(n, ast.Name) and n.id == name for s in statement.body for n in ast.walk(s))
            return (list(blocks), name) if reads == 2 else ([], None)
    return [], None


def _from_start(node: ast.Slice) -> bool:
    return node.lower is None and node.step is None


def _inside(place: Place, outer: Place) -> bool:
    parent = place.parent
    while parent is not None:
        if parent.statement is outer.statement:
            return True
        parent = parent.parent
    return False


def _sequential(tree: Tree, place: Place) -> tuple[list[nn.Module], str | None]:
    """The blocks of ``h = self.blocks(h)``, an ``nn.Sequential``."""
    value, name = getattr(place.statement, "value", None), assigned(place.statement)
    if name is None or not isinstance(value, ast.Call) or len(value.args) != 1 or value.keywords:
        return [], None
    blocks = tree.resolve(value.func)
    if type(blocks) is not nn.Sequential or not len(blocks) or mentions(value.func, {name}):
        return [], None
    return list(blocks), name
