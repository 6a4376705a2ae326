"""Reads a method's syntax tree, and makes a method of a changed one, with the same globals, closure and decorators."""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import hashlib
import inspect
import linecache
import textwrap
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from . import recipes

HELPER = "fused"  # the name by which a rewritten method sees the module of the same name


class Method(NamedTuple):
    """A method of a class, below its decorators."""

    wrappers: tuple[types.FunctionType, ...]  # outermost first
    function: Any  # a plain function
    tree: ast.FunctionDef
    text: str

    @property
    def self_name(self) -> str:
        return self.tree.args.args[0].arg

    def global_value(self, node: ast.expr) -> Any:
        """What a dotted name is in the method's globals and closure, or None."""
        path: list[str] = []
        while isinstance(node, ast.Attribute):
            path.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self.function.__code__.co_varnames:
            return None  # a variable of the method's own
        cells = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))
        value = self.function.__globals__.get(node.id)
        if node.id in cells:
            try:
                value = cells[node.id].cell_contents
            except ValueError:  # still empty
                return None
        for name in reversed(path):
            value = getattr(value, name, None)
        return value


class Unreadable(Exception):
    """Why a method is left as it is."""


_SCOPE_READERS = {"locals", "vars", "eval", "exec", "dir"}


def read(cls: type, name: str, own: Mapping[str, Any] = types.MappingProxyType({})) -> Method:
    """The method `name` of a class, for an instance with these attributes.

    Raises:
        Unreadable: its source cannot be had, or is none that can be compiled again with the same meaning.
    """
    owner = next((base for base in cls.__mro__ if name in base.__dict__), cls)
    try:
        recipe = recipes.recipe(cls, owner, name, own)
    except (OSError, TypeError):  # of a method without source
        recipe = None
    return _read(inspect.getattr_static(cls, name, None), name, recipe)


def read_function(function: types.FunctionType) -> ast.FunctionDef:
    """The tree of a function without decorators.

    Raises:
        Unreadable: as for :func:`read`.
    """
    method = _read(function, function.__name__, None)
    if method.wrappers or method.tree.decorator_list:
        raise Unreadable(f"{function.__name__} has a decorator")
    return method.tree


@functools.lru_cache(maxsize=4096)
def _read(found: Any, name: str, recipe: recipes.Recipe | None) -> Method:
    if not isinstance(found, types.FunctionType):
        raise Unreadable(f"{name} is no plain method")
    wrappers = []
    function: Any = found
    while hasattr(function, "__wrapped__"):
        inner = function.__wrapped__
        if not isinstance(inner, types.FunctionType) or not any(_holds(c, inner) for c in function.__closure__ or ()):
            raise Unreadable(f"{name} has a decorator whose inner function cannot be replaced")
        wrappers.append(function)
        function = inner
    try:
        text = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(recipes.edited(text, recipe)).body[0]
    except (OSError, TypeError, SyntaxError, IndexError) as error:
        raise Unreadable(f"the source of {name} cannot be had") from error
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args or tree.name != function.__name__:
        raise Unreadable(f"{name} is no plain method")
    if getattr(tree, "type_params", None):
        raise Unreadable(f"{name} has type parameters")
    if tree.decorator_list and not wrappers:
        raise Unreadable(f"{name} has a decorator that hides the function inside")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in _SCOPE_READERS:
            raise Unreadable(f"{name} calls {node.id}()")
        if isinstance(node, (ast.Yield, ast.YieldFrom, ast.Await, ast.Nonlocal, ast.Global)):
            raise Unreadable(f"{name} has a {type(node).__name__.lower()} statement")
        for identifier in (getattr(node, "attr", None), getattr(node, "id", None)):
            if isinstance(identifier, str) and identifier.startswith("__") and not identifier.endswith("__"):
                raise Unreadable(f"{name} has the private name {identifier}")
            if identifier == HELPER and isinstance(node, ast.Name):
                raise Unreadable(f"{name} has a variable of the name {HELPER}")
    if function.__code__.co_name == "<lambda>" or _changed(function):
        raise Unreadable(f"the source of {name} is not that of the running code")
    return Method(tuple(wrappers), function, tree, text)


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # still empty
        return False


def _changed(function: types.FunctionType) -> bool:
    """Whether the file was edited since it was imported: its code is not what the source compiles to."""
    code = function.__code__
    every = _codes(code.co_filename, "".join(linecache.getlines(code.co_filename)))
    same = (other for other in every if other.co_firstlineno == code.co_firstlineno)
    return not any(_fingerprint(other) == _fingerprint(code) for other in same)


def _fingerprint(code: types.CodeType) -> tuple[Any, ...]:
    constants = tuple(repr(c) for c in code.co_consts if not isinstance(c, types.CodeType))
    return code.co_code, code.co_names, code.co_varnames, constants


@functools.lru_cache(maxsize=256)
def _codes(filename: str, text: str) -> tuple[types.CodeType, ...]:
    """Every function of a file, compiled as a whole: how a call compiles depends on what the file imports."""
    found: list[types.CodeType] = []
    try:
        stack = [compile(text, filename, "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        return ()
    while stack:
        code = stack.pop()
        found.append(code)
        stack += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return tuple(found)


def _bare(tree: ast.FunctionDef) -> ast.FunctionDef:
    """The tree without decorators, annotations and defaults, which are evaluated where a function is defined."""
    bare = copy.deepcopy(tree)
    bare.decorator_list = []
    bare.returns = None
    arguments = bare.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in [*every, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [None if value is None else ast.Constant(None) for value in arguments.kw_defaults]
    return bare


def _compile(function: types.FunctionType, text: str, filename: str) -> types.CodeType:
    """The code of the method, compiled where its free variables are those of an enclosing function."""
    free = (*function.__code__.co_freevars, HELPER)
    maker = f"def _({', '.join(free)}):\n{textwrap.indent(text, '    ')}\n"
    code = compile(maker, filename, "exec", dont_inherit=True, flags=_future_flags(function))
    lines = maker.splitlines(keepends=True)
    linecache.cache[filename] = (len(maker), None, lines, filename)
    outer = next(c for c in code.co_consts if isinstance(c, types.CodeType))
    return next(c for c in outer.co_consts if isinstance(c, types.CodeType) and c.co_name == function.__name__)


def _future_flags(function: types.FunctionType) -> int:
    every = (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
    return function.__code__.co_flags & functools.reduce(int.__or__, every, 0)


def rebuild(method: Method, tree: ast.FunctionDef) -> tuple[types.FunctionType, str]:
    """(a method with the new body inside the same decorators, its source text)."""
    function = method.function
    text = ast.unparse(_bare(tree))
    code = _compile(function, text, f"<fusednorm: {function.__module__}.{function.__qualname__} {_digest(text)}>")
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    from . import fused  # which reads the source of functions

    cells[HELPER] = types.CellType(fused)
    closure = tuple(cells[name] for name in code.co_freevars)
    new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    _dress(new, function)
    for wrapper in reversed(method.wrappers):
        new = _rewrap(wrapper, new)
    shown = copy.deepcopy(tree)
    shown.decorator_list = []
    return new, ast.unparse(shown)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _dress(new: types.FunctionType, old: types.FunctionType) -> None:
    new.__dict__.update(old.__dict__)
    new.__doc__, new.__qualname__, new.__module__ = old.__doc__, old.__qualname__, old.__module__
    new.__annotations__ = old.__annotations__
    new.__type_params__ = getattr(old, "__type_params__", ())  # type: ignore[attr-defined]


def _rewrap(wrapper: types.FunctionType, inner: types.FunctionType) -> types.FunctionType:
    """A copy of the wrapper around another inner function."""
    replaced = wrapper.__wrapped__  # type: ignore[attr-defined]
    closure = tuple(types.CellType(inner) if _holds(cell, replaced) else cell for cell in wrapper.__closure__ or ())
    new = types.FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, closure)
    new.__kwdefaults__ = wrapper.__kwdefaults__
    _dress(new, wrapper)
    new.__wrapped__ = inner  # type: ignore[attr-defined]
    return new
