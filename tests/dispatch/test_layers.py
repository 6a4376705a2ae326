"""Which part of the package imports which: public functions, autograd, dispatch, providers, each only what is below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fusednorm
from fusednorm import dispatch

PACKAGE = Path(fusednorm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
PROVIDERS = tuple(dispatch.PROVIDERS)
SHARED = ("forms", "native", "samples", "strides")  # by several providers
# Above the providers. `dropout` is a provider's own arithmetic too: the mask that all of them reproduce.
ABOVE_PROVIDERS = ("autograd", "dispatch", "modules", "norm", "activation", "attention", "_ops")


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, without the package's name."""
    name = name_of(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in NAMES else base)
    return {module.removeprefix("fusednorm").removeprefix(".") for module in found}


def test_the_walk_sees_imports():
    assert "providers.strides" in imported(PACKAGE / "providers" / "triton" / "norm.py")
    assert {"dispatch", "_ops", "autograd.norm"} <= {
        module for path in FILES for module in imported(path) if not module.startswith("providers")
    }


@pytest.mark.parametrize("path", [p for p in FILES if "providers" in p.parts], ids=name_of)
def test_a_provider_imports_no_other_and_nothing_above(path):
    own = name_of(path).split(".")[2:3]
    for module in imported(path):
        head, *rest = module.split(".")
        assert head not in ABOVE_PROVIDERS, f"{name_of(path)} imports {module}"
        if head == "providers" and rest:
            assert rest[0] in SHARED or rest[:1] == own, f"{name_of(path)} imports {module}"


PUBLIC = ("modules", "norm", "activation", "attention")
MAY_NOT_IMPORT = {"dispatch": ("autograd", *PUBLIC), "autograd": PUBLIC, "modules": ("providers",)}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in MAY_NOT_IMPORT], ids=name_of)
def test_a_folder_imports_nothing_that_it_may_not(path):
    found = {module for module in imported(path) if module.split(".")[0] in MAY_NOT_IMPORT[path.parent.name]}
    assert not found, f"{name_of(path)} imports {found}"
