"""Every public name has a docstring with an example, and the examples give what they say."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import fusednorm


def test_names_are_sorted():
    assert sorted(fusednorm.__all__) == fusednorm.__all__


@pytest.mark.parametrize("name", fusednorm.__all__)
def test_example(name):
    text = inspect.cleandoc(getattr(fusednorm, name).__doc__ or "")  # of its own: no class that it is derived from
    assert "Example:" in text, f"{name} has no example"
    example = doctest.DocTestParser().get_doctest(text, {"torch": torch, "fusednorm": fusednorm}, name, None, None)
    assert example.examples
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert result.failed == 0, "".join(said)
