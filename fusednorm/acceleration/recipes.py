"""Edits that bring a method into a form which the search for sums understands, without a change of what it computes.

A recipe is for one method of one class: its path, and pairs of (text, replacement). Each text must stand in the method
exactly once, else the recipe is not used. The edited method then goes through the same search as any other. To add one:

1. Run ``print(fusednorm.accelerate(model))``, and find the class and the statement in the way.
2. Add the edit here, with the reason why the values stay the same.
3. Add the model to ``tests/helpers/model_zoo.py``: its tests compare outputs and gradients.
"""

from __future__ import annotations

Edits = tuple[tuple[str, str], ...]

RECIPES: dict[tuple[str, str], Edits] = {
    # Norms and linear layers take the last dimension: the rows need not be one dimension.
    ("transformers.models.opt.modeling_opt.OPTDecoderLayer", "forward"): (
        ("hidden_states = hidden_states.reshape(-1, hidden_states.size(-1))\n", "pass\n"),
        ("(residual + hidden_states).view(hidden_states_shape)", "residual + hidden_states"),
    ),
    # The method self.gelu() calls this, but for processors of Apple under torch 1.
    ("diffusers.models.activations.GELU", "forward"): (
        ("self.gelu(hidden_states)", "F.gelu(hidden_states, approximate=self.approximate)"),
    ),
}


def edited(cls: type, method: str, text: str) -> str:
    """The source of a method after its recipe, if there is one that fits."""
    edits = RECIPES.get((f"{cls.__module__}.{cls.__qualname__}", method), ())
    if any(text.count(old) != 1 for old, _ in edits):
        return text
    for old, new in edits:
        text = text.replace(old, new)
    return text
