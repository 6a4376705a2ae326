"""Products with one vector for each sample, as source text: ``gate * branch`` and ``normed * (1 + scale) + shift``."""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .._activations import GELUS
from .source import HELPER, Unreadable, read_function
from .tree import Tree, mentions

Pure = Callable[[ast.expr], bool]


class Gating(NamedTuple):
    """``gate * branch``."""

    gate: ast.expr  # without the dimension that is added for the product
    branch: ast.expr
    unsqueezed: bool


class Modulated(NamedTuple):
    """``normed * (1 + scale) + shift`` with factors and summands in any order; shift None where nothing is added."""

    normed: ast.expr
    scale: ast.expr  # without the dimension that is added for the product
    shift: ast.expr | None
    unsqueezed: bool


def helper(name: str) -> ast.Attribute:
    return ast.Attribute(ast.Name(HELPER, ast.Load()), name, ast.Load())


def function_of(node: Any, part: ast.expr, name: str) -> ast.Lambda:
    """``lambda name: node``, where the name stands for a part of the node."""
    while mentions(node, {name}):
        name += "_"
    body = copy.deepcopy(node, {id(part): ast.Name(name, ast.Load())})
    arguments = ast.arguments(posonlyargs=[], args=[ast.arg(name)], kwonlyargs=[], kw_defaults=[], defaults=[])
    return ast.Lambda(arguments, body)


def gate_step(node: ast.AST, parts: Gating) -> ast.expr:
    """``fused.Gate(gate, lambda branch: gate * branch)``."""
    unsqueezed = [ast.keyword("unsqueezed", ast.Constant(True))] if parts.unsqueezed else []
    return ast.Call(helper("Gate"), [parts.gate, function_of(node, parts.branch, "branch")], unsqueezed)


def gating(node: ast.AST, pure: Pure, of_module: Callable[[ast.AST], bool]) -> Gating | None:
    """The parts of a product with a gate, or None.

    The gate is the side that gets a dimension, or the one that is no output of a module beside one that is.
    """
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return None
    sides = [(*_stripped(side), other) for side, other in ((node.left, node.right), (node.right, node.left))]
    found = [Gating(root, other, added) for root, added, other in sides if pure(root)]
    viewed = [parts for parts in found if parts.unsqueezed]
    found = viewed or [parts for parts in found if of_module(parts.branch) and not of_module(parts.gate)]
    return found[0] if len(found) == 1 else None


def modulated(node: ast.AST, pure: Pure) -> Modulated | None:
    if not isinstance(node, ast.BinOp):
        return None
    if isinstance(node.op, ast.Mult):
        return _product(node, pure)
    if not isinstance(node.op, ast.Add):
        return None
    for one, other in ((node.left, node.right), (node.right, node.left)):
        product, (shift, added) = _product(one, pure), _stripped(other)
        if product is not None and pure(shift) and product.unsqueezed is added:
            return product._replace(shift=shift)
    return None


def _product(node: ast.expr, pure: Pure) -> Modulated | None:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return None
    for factor, normed in ((node.left, node.right), (node.right, node.left)):
        total, outside = _stripped(factor)
        if not isinstance(total, ast.BinOp) or not isinstance(total.op, ast.Add):
            continue
        for one, other in ((total.left, total.right), (total.right, total.left)):
            scale, inside = _stripped(other)
            is_one = isinstance(one, ast.Constant) and type(one.value) in (int, float) and one.value == 1
            if is_one and pure(scale) and not (outside and inside):
                return Modulated(normed, scale, None, outside or inside)
    return None


def _stripped(node: ast.expr) -> tuple[ast.expr, bool]:
    """A value without ``[:, None]`` or ``.unsqueeze(1)``, and whether it had that."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
        first, *others = node.slice.elts
        if _is_all(first) and others and _is(others[0], None) and all(_is_all(o) or _is(o, ...) for o in others[1:]):
            return node.value, True
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "unsqueeze":
        given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "dim")]
        if len(given) == len(node.args) + len(node.keywords) == 1 and _is(given[0], 1):
            return node.func.value, True
    return node, False


def _is(node: ast.expr, value: Any) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is type(value) and node.value == value


def _is_all(node: ast.expr) -> bool:
    return isinstance(node, ast.Slice) and node.lower is node.upper is node.step is None


_PURE_METHODS = {"to", "type_as", "float", "bfloat16", "half", "double", "unsqueeze", "squeeze", "reshape", "view"}


def is_pure(tree: Tree, node: ast.expr) -> bool:
    """Whether a value may be read earlier or twice: names, a module's tensors, constant indices, casts and views."""
    if isinstance(node, ast.Name):
        return node.id != tree.self_name
    if isinstance(node, ast.Attribute):
        return isinstance(tree.resolve(node), Tensor)
    if isinstance(node, ast.Subscript):
        constant = not any(isinstance(n, (ast.Name, ast.Call)) for n in ast.walk(node.slice))
        return constant and is_pure(tree, node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _PURE_METHODS:
        inner = [n for given in (*node.args, *node.keywords) for n in ast.walk(given)]
        return is_pure(tree, node.func.value) and not any(isinstance(n, (ast.Call, ast.NamedExpr)) for n in inner)
    return False


class Reading(NamedTuple):
    """Which argument of a function is what in its ``normed * (1 + scale) + shift``."""

    normed: int
    scale: int
    shift: int | None
    unsqueezed: bool


def reading(function: Any) -> Reading | None:
    """What a function of a user's own computes, such as ``modulate(x, shift, scale)``; None if it is something else."""
    if type(function) is not types.FunctionType or function.__defaults__ or function.__kwdefaults__:
        return None
    return _reading(function.__code__, function)


@functools.lru_cache(maxsize=256)
def _reading(code: types.CodeType, function: types.FunctionType) -> Reading | None:
    try:
        tree = read_function(function)
    except Unreadable:
        return None
    body = [s for s in tree.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    arguments, last = tree.args, body[0] if len(body) == 1 else None
    if arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg:
        return None
    names = [argument.arg for argument in arguments.args]
    value = last.value if isinstance(last, ast.Return) else None
    found = None if value is None else modulated(value, lambda node: isinstance(node, ast.Name))
    if found is None:
        return None
    parts = [found.normed, found.scale, *([] if found.shift is None else [found.shift])]
    used = [part.id for part in parts if isinstance(part, ast.Name)]
    if sorted(used) != sorted(names) or len(set(used)) != len(parts):
        return None
    normed, scale, *shift = (names.index(name) for name in used)
    return Reading(normed, scale, shift[0] if shift else None, found.unsqueezed)


def gelu(tree: Tree, node: ast.Call) -> tuple[str | None, ast.expr]:
    """(name, function) of ``F.gelu(x, approximate=...)``; the name is None where the form is not known now."""
    if [keyword.arg for keyword in node.keywords] != ["approximate"]:
        return None, node.func
    value = node.keywords[0].value
    form = value.value if isinstance(value, ast.Constant) else tree.resolve(value)
    name = GELUS.get(form) if isinstance(form, str) else None
    return name, node.func if name is None else ast.Call(helper("gelu_of"), [value], [])
