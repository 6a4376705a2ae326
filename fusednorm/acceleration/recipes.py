"""Edits that bring a method into a form which the search for sums understands, without a change of what it computes.

A recipe is for one method of one class: its path, and pairs of (text, replacement). Each text must stand in the method
exactly once, else the recipe is not used. Where an edit stands for a call of another method, the recipe names that
method and the SHA-256 of its source: a class that has another one is left. The edited method then goes through the same
search as any other. To add one:

1. Run ``print(fusednorm.accelerate(model))``, and find the class and the statement in the way.
2. Add the edit here, with the reason why the values stay the same.
3. Add the model to ``tests/helpers/model_zoo.py``: its tests compare outputs and gradients.
"""

from __future__ import annotations

import hashlib
import inspect
import textwrap
import types
from collections.abc import Mapping
from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """Edits of a method, and the methods that they stand for."""

    edits: tuple[tuple[str, str], ...]
    inlined: tuple[tuple[str, str], ...] = ()  # (name, SHA-256 of the source)


RECIPES: dict[tuple[str, str], Recipe] = {
    # Norms and linear layers take the last dimension: the rows need not be one dimension.
    ("transformers.models.opt.modeling_opt.OPTDecoderLayer", "forward"): Recipe(
        (
            ("hidden_states = hidden_states.reshape(-1, hidden_states.size(-1))\n", "pass\n"),
            ("(residual + hidden_states).view(hidden_states_shape)", "residual + hidden_states"),
        ),
    ),
    # The method calls this, but for processors of Apple under torch 1.
    ("diffusers.models.activations.GELU", "forward"): Recipe(
        (("self.gelu(hidden_states)", "F.gelu(hidden_states, approximate=self.approximate)"),),
        (("gelu", "9688d8847aaf631efc87b0a341b3c520572fd26edded765a56b60c8b15f2622e"),),
    ),
}


def digest(function: types.FunctionType) -> str:
    """SHA-256 of a function's source."""
    return hashlib.sha256(textwrap.dedent(inspect.getsource(function)).encode()).hexdigest()


def recipe(cls: type, owner: type, method: str, own: Mapping[str, Any]) -> Recipe | None:
    """The recipe for a method that `owner` defines, as a class `cls` and an instance with these attributes call it."""
    found = RECIPES.get((f"{owner.__module__}.{owner.__qualname__}", method))
    for name, source in () if found is None else found.inlined:
        called = inspect.getattr_static(cls, name, None)
        if name in own or not isinstance(called, types.FunctionType) or digest(called) != source:
            return None
    return found


def edited(text: str, found: Recipe | None) -> str:
    """The source of a method after a recipe, if it fits."""
    if found is None or any(text.count(old) != 1 for old, _ in found.edits):
        return text
    for old, new in found.edits:
        text = text.replace(old, new)
    return text
