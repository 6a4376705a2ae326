"""The methods of a module that may be rewritten, as trees."""

from __future__ import annotations

import ast
import inspect
import types

from torch import nn

from . import recognise, source
from .tree import Tree


def methods(module: nn.Module) -> list[Tree]:
    """``forward``, and those that it calls on self. Raises :class:`source.Unreadable` where forward cannot be read."""
    cls = type(module)
    if "forward" in module.__dict__:
        raise source.Unreadable("its forward was replaced")
    if recognise.why_not_derived(cls):
        raise source.Unreadable(recognise.why_not_derived(cls))
    home = inspect.getattr_static(cls, "forward").__module__
    trees, names, seen = [], ["forward"], {"forward"}
    while names:
        name = names.pop(0)
        try:
            tree = Tree(module, source.read(cls, name, module.__dict__), name)
        except source.Unreadable:
            if name == "forward":
                raise
            continue
        trees.append(tree)
        for node in ast.walk(tree.function):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == tree.self_name
                and node.attr not in seen
                and node.attr not in module.__dict__
            ):
                seen.add(node.attr)
                method = inspect.getattr_static(cls, node.attr, None)
                if isinstance(method, types.FunctionType) and method.__module__ == home:
                    names.append(node.attr)
    return trees
